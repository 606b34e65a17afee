"""What the processes of one run agree on.

Every function is called by all processes at the same moment, since each sends one message with the
hook ``agree`` and waits for those of the others. A run of one process sends none.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from fundamentallm import errors
from fundamentallm.data import Rejection
from fundamentallm.errors import DataError, FundamentalError, PeerError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fundamentallm.data import Batch
    from fundamentallm.run import Run

T = TypeVar("T")
Sums: TypeAlias = dict[str, tuple[float, float]]
"""By name: the sum of the weighted values, and the sum of the weights."""
LOOK_EVERY = 32  # micro-batches of a validation between two looks for signals


def from_first(run: Run, make: Callable[[], T]) -> T:
    """Call ``make`` in the first process and return its result, JSON values, in all of them.

    An error of ``make`` is raised in all of them. Only the first process prints it.
    """
    made: Any = None
    error: Exception | None = None
    if run.rank == 0:
        try:
            made = make()
        except Exception as caught:  # noqa: BLE001 - raised below, once the others know of it
            error = caught
    facts = [type(error).__name__, str(error)] if error else None
    made, facts = run.hook.agree(run=run, topic="first process", mine=[made, facts])[0]
    if error is not None:
        raise error
    if facts is not None:
        raise _of_first_process(*facts)
    return cast("T", made)


def of_each_part(run: Run, topic: str, mine: T) -> list[T]:
    """Return the values of one process for each part of the data: several may share a part."""
    everyones = run.hook.agree(run=run, topic=topic, mine=mine)
    return everyones[:: run.world_size // run.data_size]


def _of_first_process(kind: str, text: str) -> FundamentalError:
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, FundamentalError):
        error = known(text)
        error.printed_elsewhere = True
        return error
    return PeerError(f"process 0 failed: {kind}: {text}")


def in_all(rank: int, error: FundamentalError) -> FundamentalError:
    """Return an error that every process raises, so that the first one alone prints it."""
    error.printed_elsewhere = rank > 0
    return error


def total_weight(run: Run, window: list[Batch]) -> float:
    """Return the weight of a window over all processes; no message where the data states it."""
    if not run.data_compared:
        _compare_data(run, window)
        run.data_compared = True
    stated = [batch.total for batch in window]
    if None in stated:
        mine = sum(batch.weight for batch in window)
        stated = list(of_each_part(run, "weight of the window", mine))
    total = math.fsum(weight for weight in stated if weight is not None)
    if not total:
        step = run.progress.step + 1
        text = f"step {step}: no micro-batch of the window has a target, in any process"
        raise in_all(run.rank, DataError(text))
    return total


def _compare_data(run: Run, window: list[Batch]) -> None:
    """Check that the processes read different samples, in windows of one length, and that the
    weight which the source states for all of them is right."""
    mine = [len(window), window[0].first, math.fsum(batch.weight for batch in window)]
    everyones = run.hook.agree(run=run, topic="first window", mine=mine)
    lengths, firsts, weights = zip(*everyones, strict=True)
    if len(set(lengths)) > 1:
        text = f"a window must have as many micro-batches in every process; it has {lengths}"
        raise in_all(run.rank, SettingsError(text))
    if len(set(firsts)) < run.data_size:
        text = (
            f"the data source gives the same sample, {firsts[0]}, to several of the "
            f"{run.world_size} processes: it has to read only the part of `run.data_rank` of "
            "`run.data_size`, and to state the index of the first sample as `Batch.first`"
        )
        raise in_all(run.rank, SettingsError(text))
    found = math.fsum(weights[:: run.world_size // run.data_size])
    stated = [batch.total for batch in window if batch.total is not None]
    total = math.fsum(stated)
    if len(stated) == len(window) and not math.isclose(total, found):
        text = f"the `Batch.total` of the first window is {total:g}, as the data source states it"
        text += f", but the weights in all processes add up to {found:g}"
        raise in_all(run.rank, SettingsError(text))


def all_rejections(run: Run, mine: list[Rejection]) -> list[Rejection]:
    """Return the rejections of all processes: one of them is enough for a step."""
    facts = [[rejection.cause, rejection.text] for rejection in mine]
    everyones = run.hook.agree(run=run, topic="rejections", mine=facts)
    return list(dict.fromkeys(Rejection(*fact) for facts in everyones for fact in facts))


def agreed_seconds(run: Run, seconds: float) -> float:
    """Return the first process's seconds of the step before, and keep ``seconds`` to be sent.

    Periods in time must come due in all processes at once. The clock of the first one travels with
    the message about stopping, so a run of several processes counts a step's time one step later.
    """
    if run.world_size == 1:
        return seconds
    agreed, run.first_seconds, run.own_seconds = run.first_seconds, 0.0, seconds
    return agreed


def stop_agreed(run: Run) -> bool:
    """Return whether a process wants to stop; adopt its reason or signal, and the first's clock."""
    mine = [run.stop_reason, run.received_signal, run.own_seconds]
    reasons, signals, seconds = zip(*run.hook.agree(run=run, topic="stop", mine=mine), strict=True)
    run.first_seconds = seconds[0]
    run.stop_reason = run.stop_reason or next(filter(None, reasons), None)
    run.signal = run.signal or next(filter(None, signals), None)
    return run.stop_reason is not None or run.signal is not None


def interrupts_validation(run: Run, index: int) -> bool:
    """Return whether a signal ends the validation before its micro-batch ``index``."""
    if run.world_size > 1 and index % LOOK_EVERY == LOOK_EVERY - 1:
        stop_agreed(run)
    return run.signal is not None


def has_target(run: Run, *, mine: bool) -> bool:
    """Return whether the current split has a target in any process."""
    return any(run.hook.agree(run=run, topic=f"targets of {run.phase}", mine=mine))


def all_sums(run: Run, mine: Sums) -> Sums:
    """Return the sums over all processes, of all names that a process logged."""
    everyones = of_each_part(run, "metrics", mine)
    names = sorted({name for sums in everyones for name in sums})
    parts = {name: [sums[name] for sums in everyones if name in sums] for name in names}
    return {
        name: (math.fsum(value for value, _ in found), math.fsum(weight for _, weight in found))
        for name, found in parts.items()
    }


def all_logged(run: Run, mine: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the entries that the processes have logged since the last row, by name."""
    everyones = of_each_part(run, "logged", mine)
    names = sorted({name for logged in everyones for name in logged})
    return {name: [e for logged in everyones for e in logged.get(name, ())] for name in names}


def all_pieces(run: Run, name: str, pieces: list[Tensor]) -> list[Tensor]:
    """Return the collected tensors of all processes, in the order of the micro-batches."""
    import torch

    mine = [piece.tolist() for piece in pieces]
    everyones = of_each_part(run, f"collected {name}", mine)
    dtype, device, shape = pieces[0].dtype, pieces[0].device, pieces[0].shape[1:]
    return [
        torch.tensor(values, dtype=dtype, device=device).reshape(-1, *shape)
        for batch in zip(*everyones, strict=True)
        for values in batch
    ]
