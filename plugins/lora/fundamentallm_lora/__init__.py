"""Train low-rank adapters on frozen weights, and merge them at the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm import SettingsError, field, ge, gt, hookimpl, lt, plugin

if TYPE_CHECKING:
    from collections.abc import Generator

    from fundamentallm import Run

__all__ = ["Lora"]

log = logging.getLogger("fundamentallm")


@plugin
class Lora:
    """Give linear layers a trainable product of two small matrices, and freeze all other weights.

    A layer computes ``W x + alpha / rank * B A x`` with its weight W frozen (Hu et al., "LoRA:
    Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685). B starts at zero, so the
    model first computes exactly what it computes without adapters.
    """

    role = "training"
    # A resumed run has the base weights in its checkpoint.
    free = ("base",)

    targets: list[str] = field(factory=lambda: ["*"])
    """Glob patterns on the names of the linear layers that get adapters (`*` also matches dots),
    such as `["*.attention.qkv"]`. By default all linear layers."""
    except_for: list[str] = field(factory=list)
    """Glob patterns on the names of linear layers that get no adapter although a target matches."""
    rank: int = field(default=8, validator=ge(1))
    """Rows of A and columns of B. More rows express more and use more memory."""
    alpha: float = field(default=16.0, validator=gt(0))
    """The output of the adapters is multiplied by this divided by `rank`."""
    dropout: float = field(default=0.0, validator=[ge(0), lt(1)])
    """Probability of dropping an input of an adapter. The frozen layer gets all inputs."""
    train_also: list[str] = field(factory=list)
    """Glob patterns on the names of parameters that are trained as well as the adapters, such as
    `["*norm*", "*.bias"]`."""
    base: Path | None = None
    """The source of the frozen weights: a safetensors file, or the folder of a checkpoint. By
    default the model's initial weights."""

    _missing: str = field(init=False, repr=False, default="")

    def __attrs_post_init__(self) -> None:
        if not self.targets:
            raise ValueError('targets: is empty; name linear layers, or leave it out for ["*"]')

    @hookimpl
    def adapt_model(self, run: Run) -> None:
        """Load the base weights, add the adapters, and freeze all other weights."""
        from fundamentallm_lora.adapt import adapt
        from fundamentallm_lora.base import load, weights_file

        name = run.name_of(self)
        if self.base is not None:
            file = weights_file(self.base)
            self._missing = "" if file.is_file() else f"{name}.base: there is no file {file}"
            if not self._missing:
                load(run.model, file, f"{name}.base")
        adapted = adapt(run, self, name)
        sizes = [(p.numel(), p.requires_grad) for p in run.model.parameters()]
        trained, total = sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)
        log.info(
            "%s: %d adapters; %s of %s weights are trained",
            name,
            len(adapted),
            f"{trained:,}",
            f"{total:,}",
        )

    @hookimpl(wrapper=True)
    def read_checkpoint(self) -> Generator[None, Any, Any]:
        """Refuse a start without the base weights. A resumed run has them in its checkpoint."""
        snapshot = yield
        if snapshot is None and self._missing:
            raise SettingsError(self._missing)
        return snapshot

    @hookimpl
    def finish_model(self, run: Run) -> None:
        """Merge the adapters into the weights of ``run.model``."""
        from fundamentallm_lora.merge import merge_adapters

        merge_adapters(run.model)
