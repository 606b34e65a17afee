"""Train low-rank adapters beside frozen weights, and merge them at the end."""

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
    """Give linear layers a trainable product of two small matrices, and freeze all the rest.

    A layer computes ``W x + alpha / rank * B A x`` with its weight W frozen (Hu et al., "LoRA:
    Low-Rank Adaptation of Large Language Models", 2021). B begins as zeros, so the run begins with
    exactly what the model computes without adapters.
    """

    role = "training"

    targets: list[str] = field(factory=lambda: ["*"])
    """Globs on the names of linear layers (`*` matches dots too) that get adapters, such as
    `["*.attention.qkv"]`. By default all of them."""
    except_for: list[str] = field(factory=list)
    """Globs on the names of linear layers that get none although a target matches."""
    rank: int = field(default=8, validator=ge(1))
    """Rows of A and columns of B: what an adapter can express, and its size."""
    alpha: float = field(default=16.0, validator=gt(0))
    """The adapters' output is multiplied by this over `rank`."""
    dropout: float = field(default=0.0, validator=[ge(0), lt(1)])
    """Probability of dropping an input of an adapter; the frozen weight gets all of them."""
    train_also: list[str] = field(factory=list)
    """Globs on the names of parameters that are trained beside the adapters, such as
    `["*norm*", "*.bias"]`."""
    base: Path | None = None
    """Where the frozen weights come from: a safetensors file, or a checkpoint's folder. Without it
    they are the model's initial ones."""

    _missing: str = field(init=False, repr=False, default="")

    def __attrs_post_init__(self) -> None:
        if not self.targets:
            raise ValueError('targets: is empty; name linear layers, or leave it out for ["*"]')

    @hookimpl
    def adapt_model(self, run: Run) -> None:
        """Load the base weights, add the adapters and freeze the rest."""
        from fundamentallm_lora.adapting import adapt
        from fundamentallm_lora.base import file_of, load

        name = next((n for n, one in run.plugins.items() if one is self), "lora")
        if self.base is not None:
            file = file_of(self.base)
            self._missing = "" if file.is_file() else f"{name}.base: there is no file {file}"
            if not self._missing:
                load(run.model, file, f"{name}.base")
        adapted = adapt(run, self, name)
        sizes = [(p.numel(), p.requires_grad) for p in run.model.parameters()]
        trained, total = sum(n for n, on in sizes if on), sum(n for n, _ in sizes)
        log.info(
            "%s: %d adapters; %s of %s weights are trained",
            name,
            len(adapted),
            f"{trained:,}",
            f"{total:,}",
        )

    @hookimpl(wrapper=True)
    def read_checkpoint(self) -> Generator[None, Any, Any]:
        """Refuse to start without the base weights; who goes on has them in the checkpoint."""
        snapshot = yield
        if snapshot is None and self._missing:
            raise SettingsError(self._missing)
        return snapshot
