"""Parameters with settings of their own, chosen by name."""

from __future__ import annotations

from fundamentallm import field, ge, gt, optional, table


@table
class Group:
    """Parameters that are trained in a way of their own."""

    pattern: str = field()
    """A glob on the full parameter name (`*` matches dots too), such as `"*.bias"` or
    `"blocks.0.*"`. A parameter belongs to the first group that matches it."""
    lr: float | None = field(default=None, validator=optional(gt(0)))
    """The learning rate of these parameters, before any schedule."""
    lr_scale: float | None = field(default=None, validator=optional(gt(0)))
    """Or a multiple of the plugin's `lr`."""
    weight_decay: float | None = field(default=None, validator=optional(ge(0)))
    """The weight decay of all these parameters, whatever `decay` says."""

    def __attrs_post_init__(self) -> None:
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError("lr_scale: state lr or lr_scale, not both")
