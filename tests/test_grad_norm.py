"""``run.grad_norm()``: torch's bits, computed once for all plugins, never that of older gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode

from fundamentallm import Run, hookimpl, plugin
from fundamentallm.gradients import total_norm
from fundamentallm.testing import TinyRun

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e25, float("nan"), float("inf")]),
)
def test_the_norm_has_the_bits_of_torchs(
    shapes: list[list[int]], dtypes: list[torch.dtype], scale: float
) -> None:
    generator = torch.Generator().manual_seed(len(shapes))
    gradients = [
        (scale * torch.randn(shape, generator=generator)).to(dtypes[i % len(dtypes)])
        for i, shape in enumerate(shapes)
    ]
    alike = len({one.dtype for one in gradients}) == 1
    expected = get_total_norm(gradients)
    found = total_norm(gradients, alike=alike)
    assert found.dtype == expected.dtype
    assert torch.equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0))


def by_torch(run: Run) -> Tensor:
    return get_total_norm([p.grad for p in run.parameters if p.grad is not None])


@plugin
class Ask:
    """Asks for the norm at every point of a step, and compares it with torch's."""

    points: Any = None

    def compare(self, run: Run, point: str) -> None:
        assert torch.equal(run.grad_norm(), by_torch(run)), point
        self.points.append(point)

    @hookimpl
    def finish_gradients(self, run: Run) -> None:
        self.compare(run, "before the gradients are finished")
        for parameter in run.parameters:
            parameter.grad = torch.full_like(parameter, 2.0)

    @hookimpl
    def judge_step(self, run: Run) -> None:
        self.compare(run, "judge_step")

    @hookimpl
    def settle_step(self, run: Run) -> None:
        self.compare(run, "settle_step")

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.compare(run, "on_step_end")


@plugin
class Halve:
    """Halves all gradients."""

    before = ("grad_clip",)

    @hookimpl
    def edit_gradients(self, run: Run) -> None:
        for parameter in run.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


@pytest.mark.parametrize("editors", [[], ["grad_clip"], [Halve], [Halve, "grad_clip"]])
def test_the_norm_is_that_of_the_gradients_at_hand(editors: list[Any], tiny_run: TinyRun) -> None:
    ask, norms = Ask(points=[]), []

    @plugin
    class Look:
        """Asks for the norm between two editors."""

        after = ("halve",)
        before = ("grad_clip",)

        @hookimpl
        def edit_gradients(self, run: Run) -> None:
            assert torch.equal(run.grad_norm(), by_torch(run))
            norms.append(run.grad_norm())

    looks = [Look()] if Halve in editors else []
    listed = [one if isinstance(one, str) else one() for one in editors]
    run = tiny_run(ask, *listed, *looks, length=2, log_every=1)
    assert len(ask.points) == 2 * 4
    logged = [row["optim/grad_norm"] for row in run.history if "optim/grad_norm" in row]
    if norms and logged:
        assert logged == [float(norm) for norm in norms]


def test_guard_and_grad_clip_share_one_computation(tiny_run: TinyRun) -> None:
    computed: list[str] = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            computed.extend([func._schema.name] if "foreach_norm" in func._schema.name else [])
            return func(*args, **(kwargs or {}))

    for plugins in (["grad_clip"], ["guard"], ["guard", "grad_clip"]):
        computed.clear()
        with Operations():
            tiny_run(*plugins, length=3)
        assert len(computed) == 3, plugins
