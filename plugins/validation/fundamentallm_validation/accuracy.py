"""How many targets get the highest score: counted, and divided once, so that it is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fundamentallm import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fundamentallm import Batch, Run

IGNORED = -100  # the target that counts for nothing, as for torch's cross_entropy


def check(run: Run) -> str | None:
    """Return what keeps the accuracy from being measured, as far as is known before training."""
    if not callable(getattr(run.model, "logits", None)):
        return f"{type(run.model).__name__} has no method logits(inputs) that returns its scores"
    batches = (batch for split in run.data.validation().values() for batch in split)
    batch = next(batches, None)
    return None if batch is None or _divided(batch.data) else _unfit(batch.data)


def accuracies(run: Run) -> dict[str, float]:
    """Return ``<split>/accuracy`` of every split; nothing if a signal asks for the end.

    Leaves modes, random states and what is logged as they were. The forward passes go through the
    hook ``forward``, so that they are computed as the loss is: in autocast, say.
    """
    counts: dict[str, Hits] = {}
    with _evaluating(run):
        for split, batches in run.data.validation().items():
            run.phase = split
            counts[split] = hits = Hits(run.model, run.device)
            for batch in _reported(run, batches):
                if run.signal is not None:
                    return {}
                if batch.weight:
                    _count(run, batch, hits)
    # One device read for all of them.
    pairs = torch.stack([hits.counts for hits in counts.values()]).tolist()
    return {
        f"{split}/accuracy": right / total
        for split, (right, total) in zip(counts, pairs, strict=True)
        if total
    }


class Hits(nn.Module):
    """Stands in for ``run.module``: counts in place of computing a loss.

    ``counts`` holds, on the device, the targets that got the highest score (of equal scores the
    first one counts) and all targets that are not -100.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.scores: Any = model.logits
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.asked = False

    def forward(self, *given: Any, **named: Any) -> Tensor:
        """Count those of one batch; the 0 it returns stands for the loss."""
        parts = _divided(named or given)
        if parts is None:
            raise SettingsError(f"validation.accuracy: {_unfit(named or given)}")
        inputs, named_inputs, targets = parts
        guesses: Tensor = self.scores(*inputs, **named_inputs).argmax(dim=-1)
        if guesses.shape != targets.shape:
            raise SettingsError(
                f"validation.accuracy: logits() gives scores for targets of shape "
                f"{tuple(guesses.shape)}, but theirs is {tuple(targets.shape)}: it must return the "
                "scores of all classes, in one more dimension, for every target"
            )
        wanted = targets != IGNORED
        self.counts += torch.stack([((guesses == targets) & wanted).sum(), wanted.sum()])
        self.asked = True
        return torch.zeros((), device=targets.device)


def _count(run: Run, batch: Batch, hits: Hits) -> None:
    # Only for this call: another plugin may put a module of its own in place for a validation.
    module, run.module, hits.asked = run.module, hits, False
    run.weight = batch.weight
    try:
        run.hook.forward(run=run, batch=batch)
    finally:
        run.module = module
    if not hits.asked:
        raise SettingsError(
            "validation.accuracy: a plugin answers 'forward' without calling run.module, so there "
            "is nothing to count with; let that plugin log an accuracy of its own"
        )


@contextmanager
def _evaluating(run: Run) -> Iterator[None]:
    modes = {module: module.training for module in run.model.modules()}
    devices = [torch.cuda.current_device()] if run.device.startswith("cuda") else []
    logged = run.swap_logged()
    run.model.eval()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            run.hook.evaluation_weights(run=run),
        ):
            yield
    finally:
        run.swap_logged(logged)  # what forward has logged, the validation has already
        run.phase, run.weight = "train", 1.0
        for module, mode in modes.items():
            module.training = mode


def _reported(run: Run, batches: Iterable[Batch]) -> Iterator[Batch]:
    total = len(batches) if isinstance(batches, Sized) else None
    for index, batch in enumerate(batches):
        yield batch
        run.report("accuracy", index + 1, total)


def _divided(data: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor] | None:
    """Part what the model is given into what ``logits`` takes and the targets; None if unfit."""
    if isinstance(data, Mapping) and "targets" in data:
        named = {name: part for name, part in data.items() if name != "targets"}
        return (), named, data["targets"]
    if isinstance(data, tuple | list) and len(data) > 1:
        return tuple(data[:-1]), {}, data[-1]
    return None


def _unfit(data: Any) -> str:
    held = f"a dict of {', '.join(data)}" if isinstance(data, Mapping) else f"{len(data)} tensors"
    return (
        f"a batch of the held-out data is {held}; it must be (inputs, ..., targets), or a dict "
        "with 'targets'"
    )
