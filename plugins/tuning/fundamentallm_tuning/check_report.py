"""Turn what a check found into the lines of its report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from fundamentallm_tuning.check import source
from fundamentallm_tuning.estimate import estimated
from fundamentallm_tuning.units import counted, duration, in_step, line, size

if TYPE_CHECKING:
    from fundamentallm import Composed
    from fundamentallm_tuning.check import CheckResult
    from fundamentallm_tuning.probe import Probe


def plugins(composed: Composed, left_out: Sequence[str]) -> Iterator[str]:
    """Yield which plugins take part, and which are left out."""
    names = [name for name in composed.plugins if name not in left_out]
    yield line("plugins", ", ".join(names))
    if left_out:
        yield line("", f"left out, since they only follow a run: {', '.join(left_out)}")


def lines(result: CheckResult) -> Iterator[str]:
    """Yield the report: measurements, and if nothing failed, estimate, notes and verdict."""
    yield from _measured(result.probe)
    if result.error is not None or result.restored is None:
        return
    yield from estimated(result.plan, result.probe, result.samples)
    same = "weights, optimizer, plugins and next micro-batch are bit for bit what they were"
    yield line("restore", f"{source(result.restored)}: {same}")
    found = notes(result)
    yield from (f"note: {note}" for note in found)
    yield "nothing wrong was found, but see the notes" if found else "nothing wrong was found"


def _measured(probe: Probe) -> Iterator[str]:
    """Yield what was measured, as far as the run came."""
    if probe.counts:
        yield from _model(probe)
    if probe.losses:
        yield from _steps(probe)
    if probe.metrics:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in sorted(probe.metrics.items()))
        yield line("validation", f"{shown}; took {duration(probe.validations[-1])}")
    if "peak" in probe.sizes:
        yield line("memory", _memory(probe))


def _model(probe: Probe) -> Iterator[str]:
    counts = probe.counts
    frozen = counts["parameters"] - counts["trained"]
    kept = f"{frozen:,} of them frozen" if frozen else "none frozen"
    tensors = counted(counts["tensors"], "tensor")
    found = f"{counted(counts['parameters'], 'parameter')} in {tensors}, {kept}"
    yield line("model", f"{found}; {' and '.join(probe.dtypes)}, on {probe.device}")


def _steps(probe: Probe) -> Iterator[str]:
    counts, losses = probe.counts, probe.losses
    made_of = in_step(counts["samples"], counts["tokens"])
    parts = counted(counts["microbatches"], "micro-batch", "micro-batches")
    yield line("step", f"{made_of}, in {parts}")
    yield line("loss", ", ".join(f"{loss:.4g}" for loss in losses[:5]) + _guessing(probe))
    rates = ", ".join(f"{rate:.3g}" for rate in probe.rates[:5])
    yield line("", f"learning rate {rates}; gradient norm {probe.gradient_norm:.4g}")


def first_loss(probe: Probe) -> Literal["high", "low", "usual", "unknown"]:
    """Compare the first loss with that of guessing among the vocabulary, ln V."""
    if not probe.losses or not probe.vocab_size or probe.vocab_size < 2:
        return "unknown"
    ratio = probe.losses[0] / math.log(probe.vocab_size)
    return "high" if ratio > 1.2 else "low" if ratio < 0.8 else "usual"


def _guessing(probe: Probe) -> str:
    kind, vocab_size = first_loss(probe), probe.vocab_size
    if kind == "unknown" or vocab_size is None:
        return ""
    end = {"high": ": the untrained model is worse", "low": ": the model is already better"}
    guess = f"guessing among {counted(vocab_size, 'token')} has {math.log(vocab_size):.4g}"
    return f"; {guess}{end.get(kind, '')}"


def _memory(probe: Probe) -> str:
    sizes = probe.sizes
    names = {
        "parameters": "parameters",
        "buffers": "buffers",
        "gradients": "gradients",
        "optimizer": "optimizer state",
    }
    parts = ", ".join(
        f"{text} {size(sizes[name])}" for name, text in names.items() if sizes.get(name)
    )
    what = "the GPU's peak" if probe.device.startswith("cuda") else "the peak of the process"
    return f"{parts}; {what} {size(sizes['peak'])}"


def notes(result: CheckResult) -> list[str]:
    """Return what may be intended or may be a mistake."""
    found, probe = [], result.probe
    if probe.without_gradient:
        found.append(f"no gradient reaches {_some(probe.without_gradient)}")
    if probe.without_optimizer:
        found.append(f"the optimizer does not have {_some(probe.without_optimizer)}")
    if probe.rejections:
        count = counted(len(probe.rejections), "step")
        found.append(f"rejected: {count} of {len(probe.losses)}: {probe.rejections[-1].text}")
    if not any(probe.rates):
        found.append("the learning rate was 0 in all these steps: a warmup may begin there")
    kind = first_loss(probe)
    if kind == "high":
        found.append(
            "a first loss this high means large initial weights, or other targets than "
            "the vocabulary's"
        )
    if kind == "low":
        found.append(
            "a first loss this low means weights that were trained before, or inputs "
            "that contain the targets"
        )
    if result.untried is not None:
        found.append(
            f"time and memory are those of the first steps; later ones fail: {result.untried}"
        )
    return found


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    more = f" and {len(names) - 5} more" if names[5:] else ""
    return f"{counted(len(names), 'trained tensor')}: {shown}{more}"
