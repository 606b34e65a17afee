"""Average the weights: exponentially (``ema``) or equally (``swa``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fundamentallm import Period, field, ge, lt, plugin
from fundamentallm_ema.weight_averaging import WeightAveraging

if TYPE_CHECKING:
    from fundamentallm_ema.average import Rule

__all__ = ["Ema", "Swa"]


@plugin
class Ema(WeightAveraging):
    """Average the weights exponentially, and validate and sample with the average.

    The trained weights are never changed. Every checkpoint contains the average. Rejected updates
    do not count.
    """

    role = "control"

    decay: float = field(default=0.999, validator=[ge(0), lt(1)])
    """The average becomes this times itself, plus 1 minus this times the weights."""
    warmup: bool = True
    """Limit the decay to (1 + n) / (10 + n) after n updates, so that the first weights lose their
    influence soon."""
    start: Period | float = 0.0
    """When the average begins: after this much training, or after this fraction of the run."""
    every: Period = Period(1)
    """How often the weights are added to the average."""
    evaluate: bool = True
    """Whether validation and samples use the average; if not, it is only in checkpoints and in the
    file of `save`. At most one average of a run may."""
    save: bool = False
    """Whether to write the averaged model into the run folder at the end of the run, as
    `ema.safetensors`."""

    def __attrs_post_init__(self) -> None:
        self.apply_settings()

    def rule(self) -> Rule:
        """Return how weights enter the average."""
        from fundamentallm_ema.average import decaying

        return decaying(self.decay, warmup=self.warmup)


@plugin
class Swa(WeightAveraging):
    """Average the weights equally from ``start`` on, and validate and sample with the average.

    Stochastic weight averaging: Izmailov et al., "Averaging Weights Leads to Wider Optima and
    Better Generalization" (2018, arXiv:1803.05407). The trained weights are never changed. Every
    checkpoint contains the average. Rejected updates do not count.
    """

    role = "control"

    start: Period | float = 0.75
    """When the average begins: after this much training, or after this fraction of the run."""
    every: Period = Period(1)
    """How often the weights are added to the average."""
    evaluate: bool = True
    """Whether validation and samples use the average; if not, it is only in checkpoints and in the
    file of `save`. At most one average of a run may."""
    save: bool = False
    """Whether to write the averaged model into the run folder at the end of the run, as
    `swa.safetensors`."""

    def __attrs_post_init__(self) -> None:
        self.apply_settings()

    def rule(self) -> Rule:
        """Return how weights enter the average."""
        from fundamentallm_ema.average import equal

        return equal()
