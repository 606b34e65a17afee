"""Averages of the weights: exponential (``ema``) and equal (``swa``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fundamentallm import Period, field, ge, lt, plugin
from fundamentallm_ema.averaging import Averaging

if TYPE_CHECKING:
    from fundamentallm_ema.average import Rule

__all__ = ["Ema", "Swa"]


@plugin
class Ema(Averaging):
    """Keep an exponential moving average of the weights, and validate and sample with it.

    The average is beside the weights that are trained, which it never touches, and in every
    checkpoint. Updates that were rejected do not count.
    """

    role = "control"

    decay: float = field(default=0.999, validator=[ge(0), lt(1)])
    """How much of the average each update keeps; the rest comes from the weights."""
    warmup: bool = True
    """Let the decay rise towards `decay`, so that the first weights are soon forgotten: after n
    updates it is at most (1 + n) / (10 + n)."""
    start: Period | float = 0.0
    """When the average begins: after this much training, or after this fraction of the run."""
    every: Period = Period(1)
    """How often the weights enter the average."""
    evaluate: bool = True
    """Whether validation and samples use the average; else only checkpoints and `save` do. Of
    several averages in a run, one may."""
    save: bool = False
    """Whether the end of the run writes the averaged model into the run folder, as
    `ema.safetensors`."""

    def __attrs_post_init__(self) -> None:
        self.settle()

    def rule(self) -> Rule:
        """Return how weights enter the average."""
        from fundamentallm_ema.average import decaying

        return decaying(self.decay, warmup=self.warmup)


@plugin
class Swa(Averaging):
    """Keep the equal average of the weights from ``start`` on, and validate and sample with it.

    Stochastic weight averaging: Izmailov et al., "Averaging Weights Leads to Wider Optima and
    Better Generalization" (2018, arXiv:1803.05407). The average is beside the weights that are
    trained, which it never touches, and in every checkpoint. Rejected updates do not count.
    """

    role = "control"

    start: Period | float = 0.75
    """When the average begins: after this much training, or after this fraction of the run."""
    every: Period = Period(1)
    """How often the weights enter the average."""
    evaluate: bool = True
    """Whether validation and samples use the average; else only checkpoints and `save` do. Of
    several averages in a run, one may."""
    save: bool = False
    """Whether the end of the run writes the averaged model into the run folder, as
    `swa.safetensors`."""

    def __attrs_post_init__(self) -> None:
        self.settle()

    def rule(self) -> Rule:
        """Return how weights enter the average."""
        from fundamentallm_ema.average import equal

        return equal()
