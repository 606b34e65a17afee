"""Where a NaN or an infinity comes from: which data, which module, which parameter."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from fundamentallm import Run
    from fundamentallm_guard.faults import Fault
    from fundamentallm_guard.origin import Origin


def describe(run: Run, fault: Fault, origin: Origin) -> str:
    """Say what a rejected step's fault is: the step, the data and, unless all is finite, where it
    ceases to be."""
    if fault.kind == "memory":
        return fault.text
    text = f"step {run.progress.step}: {fault.text} ({samples(run)})"
    return text if fault.kind == "spike" else f"{text}; {find(run, origin)}"


def samples(run: Run) -> str:
    """Say which samples the window holds; of several micro-batches only those that are to blame,
    if their losses tell. Reads the device."""
    window = run.window
    losses = [float(loss) for loss in run.losses]
    blamed = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    if len(window) == 1 or not blamed:
        count = sum(batch.samples for batch in window)
        return f"{count} samples from index {window[0].first} in the order of the data"
    batch = window[blamed[0]]
    return (
        f"micro-batch {blamed[0] + 1} of {len(window)}: {batch.samples} samples from index "
        f"{batch.first} in the order of the data"
    )


def find(run: Run, origin: Origin) -> str:
    """Say where the window at hand stops being finite: run its forward passes again as they were.

    Tells the first module with an output that is not finite; if all are finite, the parameter.
    Leaves random state and buffers as they were at the beginning of the step.
    """
    origin.put_back()
    module = _first_module(run)
    origin.put_back()
    if module is not None:
        return f"first module with a non-finite output: {module}"
    names = [
        name
        for name, parameter in run.model.named_parameters()
        if parameter.grad is not None and not _finite(parameter.grad)
    ]
    if names and all(math.isfinite(float(loss)) for loss in run.losses):
        more = f", one of {len(names)}" if names[1:] else ""
        return (
            f"every module's output is finite; first parameter with a non-finite gradient: "
            f"{names[0]}{more}"
        )
    return (
        "every module's output is finite when the window is run again: either what makes the loss "
        "of them is not, or the device does not compute the same twice"
    )


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
    logged = run.swap_logged()
    try:
        # What is compiled would run without the hooks.
        with torch.compiler.set_stance("force_eager"):
            for batch in run.window:
                run.weight = batch.weight
                run.hook.forward(run=run, batch=batch)
    finally:
        run.weight = 1.0
        run.swap_logged(logged)
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _described(name: str, module: nn.Module, given: Any) -> str:
    text = f"{name or 'the model itself'} ({type(module).__name__})"
    if not _finite(given):
        return f"{text}, whose input is not finite already"
    if not _finite(list(module.parameters(recurse=False))):
        return f"{text}, whose weights are not finite"
    return text


def _finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors(value))


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a tree of tuples, lists, dicts and objects with attributes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors(one)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif hasattr(value, "__dataclass_fields__"):  # what models of some libraries return
        yield from tensors(list(vars(value).values()))
