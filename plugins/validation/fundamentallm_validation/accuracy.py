"""Count the targets with the highest score, and divide once, so that the accuracy is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fundamentallm import SettingsError

if TYPE_CHECKING:
    from fundamentallm import Batch, Run

IGNORED = -100  # the target that does not count, as in torch's cross_entropy


def check(run: Run) -> str | None:
    """Return why the accuracy cannot be measured, as far as is known before training, or None."""
    if not callable(getattr(run.model, "logits", None)):
        return f"{type(run.model).__name__} has no method logits(inputs) that returns its scores"
    batches = (batch for split in run.data.validation().values() for batch in split)
    batch = next(batches, None)
    return None if batch is None or _divided(batch.data) else _unfit(batch.data)


def accuracies(run: Run) -> dict[str, float]:
    """Return ``<split>/accuracy`` of every split; nothing if a signal asks for the end.

    The forward passes go through the hook ``forward``, so that they are computed like the loss, for
    example with autocast.
    """
    counts: dict[str, AccuracyCounter] = {}
    with run.evaluating():
        for split, batch in run.held_out("accuracy"):
            if split not in counts:
                counts[split] = AccuracyCounter(run.model, run.device)
            _count(run, batch, counts[split])
    if run.signal is not None or not counts:
        return {}
    # One device read for all of them.
    mine = torch.stack([hits.counts for hits in counts.values()]).tolist()
    everyones = run.of_each_part("accuracy", mine)
    pairs = torch.tensor(everyones).sum(0).tolist()
    return {
        f"{split}/accuracy": right / total
        for split, (right, total) in zip(counts, pairs, strict=True)
        if total
    }


class AccuracyCounter(nn.Module):
    """Replaces ``run.module``: counts in place of computing a loss.

    ``counted`` are two numbers of one batch, on the device: the targets with the highest score (of
    equal scores, the first one), and all targets that are not -100. ``counts`` are their sums.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.scores: Any = model.logits
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.counted: Tensor | None = None

    def forward(self, *given: Any, **named: Any) -> Tensor:
        """Count the targets of one batch; return 0 in place of the loss."""
        parts = _divided(named or given)
        if parts is None:
            raise SettingsError(f"validation.accuracy: {_unfit(named or given)}")
        inputs, named_inputs, targets = parts
        guesses: Tensor = self.scores(*inputs, **named_inputs).argmax(dim=-1)
        if guesses.shape != targets.shape:
            raise SettingsError(
                f"validation.accuracy: logits() gives scores for targets of shape "
                f"{tuple(guesses.shape)}, but they have {tuple(targets.shape)}: it must return the "
                "scores of all classes, in one more dimension, for every target"
            )
        wanted = targets != IGNORED
        found = torch.stack([((guesses == targets) & wanted).sum(), wanted.sum()])
        self.counted = found if self.counted is None else self.counted + found
        return torch.zeros((), device=targets.device)


def _count(run: Run, batch: Batch, hits: AccuracyCounter) -> None:
    # Only for this call: another plugin may replace the module, too.
    module, run.module, hits.counted = run.module, hits, None
    run.weight = batch.weight
    try:
        run.hook.forward(run=run, batch=batch)
    finally:
        run.module = module
    if hits.counted is None:
        raise SettingsError(
            "validation.accuracy: a plugin answers 'forward' without calling run.module, so there "
            "is nothing to count with; let that plugin log an accuracy of its own"
        )
    # A batch without weight is there because other processes wait in its forward pass.
    if batch.weight:
        hits.counts += hits.counted


def _divided(data: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor] | None:
    """Split the data of a batch into the arguments of ``logits`` and the targets; None if unfit."""
    if isinstance(data, Mapping) and "targets" in data:
        named = {name: part for name, part in data.items() if name != "targets"}
        return (), named, data["targets"]
    if isinstance(data, tuple | list) and len(data) > 1:
        return tuple(data[:-1]), {}, data[-1]
    return None


def _unfit(data: Any) -> str:
    given = f"a dict of {', '.join(data)}" if isinstance(data, Mapping) else f"{len(data)} tensors"
    return (
        f"a batch of the held-out data is {given}; it must be (inputs, ..., targets), or a dict "
        "with 'targets'"
    )
