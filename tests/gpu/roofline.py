"""The shortest time of a training step of GPT-2, from two measured ceilings.

docs/performance.md derives it. Each term is the larger of operations over the rate of matrix
products and bytes over the bandwidth of copies. Operations that no kernel can overlap follow each
other, so the terms are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from device import Device

HALF, FULL = 2, 4  # bytes of bf16 and of fp32
TIMED, WARM = 20, 3


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at its best."""

    flops: float
    """Operations per second of a bf16 matrix product."""
    bandwidth: float
    """Bytes per second of a copy in device memory, read and written ones together."""


@dataclass(frozen=True)
class Model:
    """The sizes that the time of a step depends on."""

    layers: int
    width: int
    vocabulary: int
    """Rows of the output matrix, with padding."""
    context: int

    @property
    def matrices(self) -> int:
        """The weights of the blocks: 12 x width² in each."""
        return 12 * self.layers * self.width**2

    @property
    def parameters(self) -> int:
        """All parameters without biases; those of norms are too few to count."""
        return self.matrices + (self.vocabulary + self.context) * self.width


def measure_ceilings(device: Device, size: int, copied: int) -> Ceilings:
    """Time a bf16 product of ``size``³ and a copy of ``copied`` bytes, as medians of twenty."""
    left, right = (
        torch.randn(size, size, device=device.kind, dtype=torch.bfloat16) for _ in range(2)
    )
    product = torch.empty_like(left)
    source = torch.randint(256, (copied,), device=device.kind, dtype=torch.uint8)
    target = torch.empty_like(source)
    multiplied = timed(device, lambda: torch.mm(left, right, out=product))
    moved = timed(device, lambda: target.copy_(source))
    return Ceilings(2 * size**3 / multiplied, 2 * copied / moved)


def timed(device: Device, work: object) -> float:
    """Return the median seconds of some calls of ``work``, by the device's clock."""
    for _ in range(WARM):
        work()
    marks = [device.mark()]
    for _ in range(TIMED):
        work()
        marks.append(device.mark())
    device.synchronize()
    return median(map(device.seconds, marks, marks[1:]))


def terms(model: Model, micro: int, count: int, ceilings: Ceilings) -> dict[str, float]:
    """Return the seconds of each part of a step of ``count`` micro-batches of ``micro`` tokens."""
    tokens, width, layers = micro * count, model.width, model.layers
    rate, bandwidth = ceilings.flops, ceilings.bandwidth
    logits = tokens * model.vocabulary * HALF
    return {
        # A forward product, and two backward: by the weights and by the inputs.
        "matrix products of the blocks": 6 * tokens * model.matrices / rate,
        "matrix products of the output layer": 6 * tokens * model.vocabulary * width / rate,
        # Scores and weighted values, forward and twice backward; half of each is masked.
        "attention": 6 * tokens * layers * model.context * width / rate,
        # See residual_bytes(); no kernel of a library for matrix products does this.
        "norms, residuals and GELU": tokens * layers * residual_bytes(width) / bandwidth,
        # Read for the loss, read again for its gradient, which is written.
        "loss": 3 * logits / bandwidth,
        # The stream of residuals and its gradient, each written and read.
        "embeddings": 4 * tokens * width * FULL / bandwidth,
        # In each micro-batch: weights to bf16; gradients to fp32 and, after the first, added.
        "casts of weights and gradients": count
        * model.parameters
        * (FULL + HALF + HALF + FULL)
        / bandwidth
        + (count - 1) * model.parameters * FULL / bandwidth,
        # Gradients: read for the norm, read and written by the clipping.
        "clipping": model.parameters * 3 * FULL / bandwidth,
        # Weight and two moments, read and written, and the gradient.
        "optimizer": model.parameters * 7 * FULL / bandwidth,
    }


def residual_bytes(width: int) -> int:
    """Return the bytes that a token moves in the element-wise operations of a block.

    The stream of residuals is fp32 under autocast, what enters and leaves matrix products is bf16.
    """
    forward_norm = FULL + HALF + FULL + HALF  # read stream and branch, write stream and normed
    backward_norm = HALF + FULL + FULL + FULL + HALF  # two gradients and input in, two out
    forward_gelu = 4 * (HALF + HALF)
    backward_gelu = 4 * (HALF + HALF + HALF)
    return width * (2 * forward_norm + 2 * backward_norm + forward_gelu + backward_gelu)
