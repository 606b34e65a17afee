"""What a probe has found, in lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fundamentallm_tuning.units import counted, duration, size

if TYPE_CHECKING:
    from fundamentallm import Composed
    from fundamentallm_tuning.probe import Probe


def line(label: str, text: str) -> str:
    """Return a line of the report."""
    return f"{label:<10} {text}"


def in_step(samples: int, tokens: int) -> str:
    """Tell what a step is made of."""
    return f"{counted(samples, 'sample')}, {counted(tokens, 'token')}"


def taking_part(composed: Composed, left_out: Sequence[str]) -> Iterator[str]:
    """Tell which plugins run, and which only follow the run and are left out."""
    names = [name for name in composed.plugins if name not in left_out]
    yield line("plugins", ", ".join(names))
    if left_out:
        yield line("", f"left out, since they only follow a run: {', '.join(left_out)}")


def all_of(probe: Probe) -> Iterator[str]:
    """Tell what was measured, as far as the run came."""
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
    yield line(
        "step",
        f"{made_of}, in {counted(counts['microbatches'], 'micro-batch')}".replace(
            "batchs", "batches"
        ),
    )
    yield line("loss", ", ".join(f"{loss:.4g}" for loss in losses[:5]) + _chance(probe))
    rates = ", ".join(f"{rate:.3g}" for rate in probe.rates[:5])
    yield line("", f"learning rate {rates}; gradient norm {probe.gradient_norm:.4g}")


def _chance(probe: Probe) -> str:
    if not probe.vocab_size or probe.vocab_size < 2:
        return ""
    guess, first = math.log(probe.vocab_size), probe.losses[0]
    text = f"; guessing among {counted(probe.vocab_size, 'token')} has {guess:.4g}"
    if first > 1.2 * guess:
        return f"{text}: the untrained model is worse"
    return f"{text}: the model knows something already" if first < 0.8 * guess else text


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


def notes(probe: Probe) -> list[str]:
    """Return what may be meant, or may be a mistake."""
    found = []
    if probe.without_gradient:
        found.append(f"no gradient reaches {_some(probe.without_gradient)}")
    if probe.without_optimizer:
        found.append(f"the optimizer does not have {_some(probe.without_optimizer)}")
    if probe.rejections:
        count = counted(len(probe.rejections), "step")
        found.append(f"rejected: {count} of {len(probe.losses)}: {probe.rejections[-1].text}")
    if not any(probe.rates):
        found.append("the learning rate was 0 in all these steps: a warmup may begin there")
    if _chance(probe).endswith("is worse"):
        found.append(
            "a first loss this high means large initial weights, or other targets than "
            "the vocabulary's"
        )
    if _chance(probe).endswith("already"):
        found.append(
            "a first loss this low means weights that were trained before, or inputs "
            "that give the targets away"
        )
    return found


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    more = f" and {len(names) - 5} more" if names[5:] else ""
    return f"{counted(len(names), 'trained tensor')}: {shown}{more}"
