"""Settings of a group of parameters, selected by name."""

from __future__ import annotations

from fundamentallm import field, ge, gt, optional, table


@table
class Group:
    """Parameters with their own learning rate or weight decay."""

    pattern: str = field()
    """A glob pattern on the full parameter name (`*` also matches dots), such as `"*.bias"` or
    `"blocks.0.*"`. A parameter belongs to the first group that matches it."""
    lr: float | None = field(default=None, validator=optional(gt(0)))
    """The learning rate of these parameters, before any schedule."""
    lr_scale: float | None = field(default=None, validator=optional(gt(0)))
    """The learning rate as a multiple of the plugin's `lr`, instead of `lr`."""
    weight_decay: float | None = field(default=None, validator=optional(ge(0)))
    """The weight decay of all parameters of this group, independent of `decay`."""

    def __attrs_post_init__(self) -> None:
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError("lr_scale: set lr or lr_scale, not both")
