"""Find where a NaN or an infinity comes from: which data, which module, which parameter."""

from __future__ import annotations

import math
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from fundamentallm import Rejection, Run
    from fundamentallm_guard.step_state import StepState


def describe(run: Run, rejection: Rejection, before: StepState) -> str:
    """Return the message about a rejected step: its number, its data, and where a value that is not
    finite appears first. ``before`` is the state at the beginning of the step.

    Of several processes, the one in which there is such a value describes it for all.
    """
    if rejection.cause == "memory":
        return rejection.text
    where, cause = samples(run), ""
    if rejection.cause != "spike":
        cause = f"; {first_nonfinite(run, before)}"
    if run.world_size > 1:
        # By then, a loss that is not finite has spoilt the gradients of all processes.
        signs = 2 * bool(_bad_losses(run)) + bool(_bad_gradients(run))
        everyones = run.hook.agree(run=run, topic="guard: cause", mine=[signs, where, cause])
        _, where, cause = max(everyones, key=itemgetter(0))
    return f"step {run.progress.step}: {rejection.text} ({where}){cause}"


def samples(run: Run) -> str:
    """Name the samples of the window; of several micro-batches, the first one with a loss that is
    not finite, if there is one. Reads the device."""
    window = run.window
    bad = _bad_losses(run)
    if len(window) == 1 or not bad:
        count, first, place = sum(batch.samples for batch in window), window[0].first, ""
    else:
        batch, place = window[bad[0]], f"micro-batch {bad[0] + 1} of {len(window)}: "
        count, first = batch.samples, batch.first
    # ``Batch.samples`` counts those of all processes.
    part = f"process {run.rank}'s part of " if bad and run.world_size > 1 else ""
    return f"{place}{part}{count} samples from index {first} in the order of the data"


def first_nonfinite(run: Run, before: StepState) -> str:
    """Repeat the window's forward passes; return the first module with a non-finite output.

    If all outputs are finite, return the first parameter with a non-finite gradient. Random state
    and buffers are afterwards as they were at the beginning of the step.
    """
    before.restore()
    module = _first_module(run)
    before.restore()
    if module is not None:
        return f"first module with a non-finite output: {module}"
    names = _bad_gradients(run)
    if names and not _bad_losses(run):
        more = f", one of {len(names)}" if names[1:] else ""
        return (
            f"every module's output is finite; first parameter with a non-finite gradient: "
            f"{names[0]}{more}"
        )
    return (
        "every module's output is finite when the window is repeated: either the loss is computed "
        "outside of the modules, or the device does not compute the same twice"
    )


def _bad_losses(run: Run) -> list[int]:
    """Return the indices of the micro-batches whose loss is not finite."""
    return [i for i, loss in enumerate(run.losses) if not math.isfinite(float(loss))]


def _bad_gradients(run: Run) -> list[str]:
    """Return the names of the parameters with a gradient that is not finite."""
    return [
        name
        for name, parameter in run.model.named_parameters()
        if parameter.grad is not None and not _finite(parameter.grad)
    ]


@torch.no_grad()
def _first_module(run: Run) -> str | None:
    found: list[str] = []

    def note(name: str, module: nn.Module, given: Any, output: Any) -> None:
        if not found and not _finite(output):
            found.append(_described(name, module, given))

    hooks = [
        module.register_forward_hook(partial(note, name))
        for name, module in run.model.named_modules()
    ]
    logged, weight = run.swap_logged(), run.weight
    try:
        # Compiled code runs without the hooks of modules.
        with torch.compiler.set_stance("force_eager"):
            for batch in run.window:
                run.weight = batch.weight
                run.hook.forward(run=run, batch=batch)
    finally:
        run.weight = weight
        # A divided model keeps its whole weights after a forward pass, until a backward pass.
        for module in run.model.modules():
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]
        run.swap_logged(logged)
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _described(name: str, module: nn.Module, given: Any) -> str:
    text = f"{name or 'the model itself'} ({type(module).__name__})"
    if not _finite(given):
        return f"{text}, whose input is already not finite"
    if not _finite(list(module.parameters(recurse=False))):
        return f"{text}, whose weights are not finite"
    return text


def _finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors(value))


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a tree of tuples, lists, dicts and objects with attributes."""
    if isinstance(value, torch.Tensor):
        # Of a sharded tensor the values that this process holds: the others do not wait here.
        yield value.to_local() if hasattr(value, "to_local") else value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors(one)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif hasattr(value, "__dataclass_fields__"):  # models of some libraries return dataclasses
        yield from tensors(list(vars(value).values()))
