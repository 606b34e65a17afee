"""Metrics of a validation: perplexity, bits per byte, accuracy, and the best values so far."""

from __future__ import annotations

import logging
import math
import sys
from typing import TYPE_CHECKING, Any

from fundamentallm import SettingsError, field, hookimpl, plugin, state

if TYPE_CHECKING:
    from collections.abc import Generator

    from fundamentallm import Outcome, Run

__all__ = ["Validation"]

log = logging.getLogger("fundamentallm")

# Metric -> whether a larger value is better.
LARGER = {"loss": False, "perplexity": False, "bits_per_byte": False, "accuracy": True}


@plugin
class Validation:
    """Log perplexity, bits per byte, accuracy and the best values of every held-out split."""

    role = "control"

    perplexity: bool = True
    """Log ``val/perplexity``: e to the power of the loss."""
    bits_per_byte: bool = False
    """Log ``val/bits_per_byte``, which does not depend on the tokenizer. The data must have
    ``bytes_per_token``."""
    accuracy: bool = False
    """Log ``val/accuracy``: the share of targets with the highest score. The model must have
    ``logits``; it costs one more forward pass over the splits."""
    best: bool = True
    """Log the best value so far of each of these and of the loss, as ``best/val_loss`` and so on,
    and print them with their steps at the end."""

    found: dict[str, list[float]] = state(factory=dict)
    """Metric -> its best value and its step."""
    _splits: dict[str, float | None] = field(init=False, factory=dict, repr=False)

    @property
    def produces(self) -> tuple[str, ...]:
        """The metrics it logs, for every split."""
        kinds = [kind for kind in LARGER if getattr(self, kind, False)]
        best = [f"best/*_{kind}" for kind in ("loss", *kinds)] if self.best else []
        return (*(f"*/{kind}" for kind in kinds), *best)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Check that the data and the model have what the chosen metrics need."""
        splits = run.data.validation()
        self._splits = {split: self._bytes_per_token(run, split) for split in splits}
        if not splits:
            log.warning("%s: the data has no held-out split to measure", run.name_of(self))
        elif self.accuracy:
            from fundamentallm_validation.accuracy import check

            problem = check(run)
            if problem:
                raise SettingsError(f"{run.name_of(self)}.accuracy: {problem}")

    @hookimpl(wrapper=True)
    def validate(self, run: Run) -> Generator[None, dict[str, float], dict[str, float]]:
        """Add the accuracy of every split."""
        metrics = yield
        if not self.accuracy:
            return metrics
        from fundamentallm_validation.accuracy import accuracies

        return metrics | accuracies(run)

    @hookimpl(wrapper=True)
    def reduce_metrics(self) -> Generator[None, dict[str, float], dict[str, float]]:
        """Add the metrics that follow from the loss of a split, averaged over all processes."""
        # The mean of the perplexities of several processes is not that of their mean loss.
        metrics = yield
        derived: dict[str, float] = {}
        for split, size in self._splits.items():
            loss = metrics.get(f"{split}/loss")
            if loss is not None and self.perplexity:
                derived[f"{split}/perplexity"] = perplexity_of(loss)
            if loss is not None and size is not None:
                derived[f"{split}/bits_per_byte"] = loss / math.log(2) / size
        return metrics | derived

    @hookimpl
    def on_validation_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Update and log the best values so far."""
        if not self.best:
            return
        for name, value in metrics.items():
            split, _, kind = name.partition("/")
            if split in self._splits and kind in LARGER:
                best, _ = self._compared(name, value, run.progress.step)
                if run.rank == 0:  # all know it, and their mean could be rounded
                    run.log(f"best/{split}_{kind}", best, weight=1.0)

    @hookimpl
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """Print the best values and their steps."""
        if run.rank == 0 and self.best and outcome != "failed":
            for name, (value, step) in self.found.items():
                log.info("best %s: %.6g at step %d", name, value, step)

    def _compared(self, name: str, value: float, step: int) -> list[float]:
        """Return the best value of a metric so far and its step; of equal values the first one."""
        sign = -1 if LARGER[name.partition("/")[2]] else 1
        known = self.found.get(name)
        if known is None or sign * value < sign * known[0] or math.isnan(known[0]):
            # A new dict: a snapshot may still refer to the old one.
            self.found = self.found | {name: [value, step]}
        return self.found[name]

    def _bytes_per_token(self, run: Run, split: str) -> float | None:
        if not self.bits_per_byte:
            return None
        ask: Any = getattr(run.data, "bytes_per_token", None)
        size: float | None = ask(split) if callable(ask) else None
        if not size:
            raise SettingsError(
                f"{run.name_of(self)}.bits_per_byte: the data ({type(run.data).__name__}) does not "
                f"know the bytes of text of a token of the split {split!r}: text files do, files "
                "of tokens do not; set it to false for these"
            )
        return size


def perplexity_of(loss: float) -> float:
    """Return ``exp(loss)``, or the largest float if that would overflow: the perplexity of a finite
    loss is finite."""
    try:
        return math.exp(loss)
    except OverflowError:
        return sys.float_info.max
