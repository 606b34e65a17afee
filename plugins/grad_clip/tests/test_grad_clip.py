"""Clipping is bit-identical to PyTorch's, reads no device value, and logs the norm before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from python_calls import python_calls
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from fundamentallm import Run, hookimpl, plugin
from fundamentallm.testing import HostReads, PluginContract, TinyRun
from fundamentallm_grad_clip import GradClip

Clip = Callable[[list[torch.nn.Parameter]], Tensor]


class TestContract(PluginContract):
    plugin = GradClip
    wrong_settings = (
        (
            {"max_norm": 1.0, "max_value": 1.0},
            "grad_clip.max_value: set max_norm or max_value, not both",
        ),
        ({"max_norm": 0.0}, "grad_clip.max_norm: must be > 0"),
        ({"max_value": -1}, "grad_clip.max_value: must be > 0"),
        ({"max_norm": 1.0, "norm_type": 0}, "grad_clip.norm_type: must be > 0"),
        ({"max_norm": math.nan}, "grad_clip.max_norm: must be > 0"),
    )


@plugin
class Witness:
    """Records the gradients of each step before and after clipping."""

    before = ("grad_clip",)

    def __attrs_post_init__(self) -> None:
        self.unclipped: list[list[Tensor]] = []
        self.clipped: list[list[Tensor]] = []

    @hookimpl
    def edit_gradients(self, run: Run) -> None:
        self.unclipped.append(copied(run))

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.clipped.append(copied(run))


def copied(run: Run) -> list[Tensor]:
    return [p.grad.clone() for p in run.parameters if p.grad is not None]


def by_torch(grads: list[Tensor], clip: Clip) -> tuple[list[Tensor], float]:
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    norm = clip(parameters)
    return [p.grad for p in parameters if p.grad is not None], float(norm)


def by_value(limit: float, norm_type: float) -> Clip:
    def clip(parameters: list[torch.nn.Parameter]) -> Tensor:
        norm = clip_grad_norm_(parameters, math.inf, norm_type)
        clip_grad_value_(parameters, limit)
        return norm

    return clip


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("limit", [1e-3, 0.5, math.inf])
@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipping_equals_torchs_bit_by_bit(
    tiny_run: TinyRun, kind: str, limit: float, norm_type: float
) -> None:
    witness = Witness()
    settings: dict[str, Any] = {f"max_{kind}": limit, "norm_type": norm_type}
    run = tiny_run(witness, GradClip(**settings), length=4, log_every=1)
    clip = by_value(limit, norm_type)
    if kind == "norm":

        def clip(parameters: list[torch.nn.Parameter]) -> Tensor:
            return clip_grad_norm_(parameters, limit, norm_type)

    for row, before, after in zip(run.history, witness.unclipped, witness.clipped, strict=True):
        expected, norm = by_torch(before, clip)
        assert all(a.equal(b) for a, b in zip(after, expected, strict=True))
        assert row["optim/grad_norm"] == norm


def test_the_clipped_norm_is_at_most_the_limit_and_the_logged_norm_is_larger(
    tiny_run: TinyRun,
) -> None:
    witness = Witness()
    run = tiny_run(witness, GradClip(max_norm=0.01), length=2, log_every=1)
    for row, after in zip(run.history, witness.clipped, strict=True):
        assert float(torch.cat([g.flatten() for g in after]).norm()) <= 0.01
        assert row["optim/grad_norm"] > 0.01


def test_without_settings_the_norm_is_clipped_at_one(tiny_run: TinyRun) -> None:
    @plugin
    class Enlarge:
        """Makes the gradients too large."""

        before = ("grad_clip",)

        @hookimpl
        def edit_gradients(self, run: Run) -> None:
            for parameter in run.parameters:
                parameter.grad = torch.full_like(parameter, 5.0)

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            norms.append(float(torch.cat([g.flatten() for g in copied(run)]).norm()))

    norms: list[float] = []
    tiny_run("grad_clip", Enlarge(), length=2)
    assert norms == pytest.approx([1.0, 1.0], abs=1e-4)


def test_the_norm_logged_is_the_mean_over_the_log_period(tiny_run: TinyRun, tmp_path: Any) -> None:
    each = tiny_run(GradClip(max_norm=1.0), length=4, log_every=1, run_dir=tmp_path / "each")
    both = tiny_run(GradClip(max_norm=1.0), length=4, log_every=4, run_dir=tmp_path / "both")
    norms = [row["optim/grad_norm"] for row in each.history]
    assert both.history[-1]["optim/grad_norm"] == math.fsum(norms) / 4


@pytest.mark.parametrize("clip", [GradClip(max_norm=0.1), GradClip(max_value=0.1)])
def test_no_step_reads_a_device_value(tiny_run: TinyRun, clip: GradClip) -> None:
    run = tiny_run(clip, length=1)
    with HostReads() as reads:
        clip.edit_gradients(run)
        assert reads.count == 0
        torch.ones(1).item()
        assert reads.count == 1, "the counter works"


def test_a_step_makes_no_more_python_calls_than_torchs_own_function(tiny_run: TinyRun) -> None:
    clip = GradClip(max_norm=1.0)
    run = tiny_run(clip, length=1)
    run.history.clear()

    def handwritten() -> None:
        run.log("optim/grad_norm", clip_grad_norm_(run.parameters, 1.0))

    assert python_calls(lambda: clip.edit_gradients(run)) <= python_calls(handwritten)


def test_parameters_without_gradients_are_skipped(tiny_run: TinyRun) -> None:
    @plugin
    class Freeze:
        """Freezes the first layer."""

        @hookimpl
        def adapt_model(self, run: Run) -> None:
            run.model.hidden.requires_grad_(False)  # noqa: FBT003 - its stub has no name for it

    witness = Witness()
    tiny_run(Freeze(), witness, GradClip(max_norm=0.1), length=2)
    assert [len(grads) for grads in witness.clipped] == [2, 2]
