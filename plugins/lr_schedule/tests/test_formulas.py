"""Every shape equals PyTorch's scheduler or the paper's formula, at every update."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.optim import SGD, lr_scheduler

from fundamentallm import Period, Progress, Run, RunSettings
from fundamentallm_lr_schedule import LrSchedule

STEPS = 10_000


def factors(steps: int, updates: list[int] | None = None, /, **table: Any) -> list[float]:
    """Return the factors of a run of some steps, at every update or at the given ones."""
    schedule = LrSchedule(**table)
    run = Run(RunSettings(length=Period(steps)), {"lr_schedule": schedule}, Path())
    schedule.on_run_start(run)
    found: list[float] = []
    for index in range(steps) if updates is None else updates:
        run.progress = Progress(step=index + 3, applied=index)  # three steps were rejected
        found.append(schedule.lr_factor(run))
    return found


def scheduled(make: Callable[[SGD], lr_scheduler.LRScheduler], steps: int) -> list[float]:
    """Return what a scheduler of PyTorch makes of a learning rate of 1."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def same(mine: list[float], theirs: list[float]) -> None:
    """Compare up to rounding: PyTorch computes some learning rates from the ones before them."""
    assert len(mine) == len(theirs)
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert math.isclose(a, b, rel_tol=1e-10, abs_tol=1e-13), (index, a, b)


TORCH: dict[str, tuple[dict[str, Any], Callable[[SGD], lr_scheduler.LRScheduler]]] = {
    "constant": ({"shape": "constant"}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "linear": (
        {"shape": "linear", "decay_to": 0.2},
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, STEPS),
    ),
    "cosine": (
        {"shape": "cosine", "decay_to": 0.1},
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.1),
    ),
    "polynomial": (
        {"shape": "polynomial", "power": 3.0},
        lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=3.0),
    ),
    "restarts of one length": (
        {"shape": "cosine_with_restarts", "cycle": Period(700), "decay_to": 0.05},
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 700, eta_min=0.05),
    ),
    "restarts that grow": (
        {"shape": "cosine_with_restarts", "cycle": Period(100), "cycle_growth": 3.0},
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 100, T_mult=3),
    ),
    "steps of one length": (
        {"shape": "step", "at": Period(2500), "gamma": 0.1},
        lambda o: lr_scheduler.StepLR(o, 2500, gamma=0.1),
    ),
    "steps at some moments": (
        {"shape": "step", "at": [0.1, Period(5001), Period(7500)], "gamma": 0.3},
        lambda o: lr_scheduler.MultiStepLR(o, [1000, 5001, 7500], gamma=0.3),
    ),
    "an exponential": (
        {"shape": "step", "at": Period(1), "gamma": 0.999},
        lambda o: lr_scheduler.ExponentialLR(o, 0.999),
    ),
    "one cycle as it is": (
        {"shape": "one_cycle", "warmup": 0.3, "decay_to": 1 / (25 * 1e4)},
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, STEPS, cycle_momentum=False),
    ),
    "one cycle of another form": (
        {"shape": "one_cycle", "warmup": 0.25, "start": 0.1, "decay_to": 0.01},
        lambda o: lr_scheduler.OneCycleLR(
            o, 1.0, STEPS, pct_start=0.25, div_factor=10, final_div_factor=10, cycle_momentum=False
        ),
    ),
}


@pytest.mark.parametrize("case", TORCH)
def test_equals_torchs_scheduler_at_each_of_ten_thousand_updates(case: str) -> None:
    table, make = TORCH[case]
    same(factors(STEPS, **table), scheduled(make, STEPS))


AFTER_WARMUP: dict[str, Callable[[SGD, int, float], lr_scheduler.LRScheduler]] = {
    "constant": lambda o, rest, lowest: lr_scheduler.ConstantLR(o, factor=1.0),
    "linear": lambda o, rest, lowest: lr_scheduler.LinearLR(o, 1.0, lowest, rest),
    "cosine": lambda o, rest, lowest: lr_scheduler.CosineAnnealingLR(o, rest, eta_min=lowest),
    "polynomial": lambda o, rest, lowest: lr_scheduler.PolynomialLR(o, rest, power=2.0),
    "cosine_with_restarts": lambda o, rest, lowest: lr_scheduler.CosineAnnealingWarmRestarts(
        o, 300, T_mult=2, eta_min=lowest
    ),
}
OWN: dict[str, dict[str, Any]] = {
    "polynomial": {"power": 2.0, "decay_to": 0.0},
    "cosine_with_restarts": {"cycle": Period(300), "cycle_growth": 2.0},
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from(sorted(AFTER_WARMUP)),
    st.integers(1, STEPS - 1),
    st.floats(0, 1),
    st.integers(0, STEPS - 1),
)
def test_equals_torchs_sequential_schedulers_after_any_warmup_and_any_resumption(
    shape: str, warmup: int, lowest: float, resumed: int
) -> None:
    def row(optimizer: SGD) -> lr_scheduler.LRScheduler:
        rise = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup)
        fall = AFTER_WARMUP[shape](optimizer, STEPS - warmup, lowest)
        return lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup])

    table = {"shape": shape, "warmup": Period(warmup), "decay_to": lowest, **OWN.get(shape, {})}
    mine = factors(STEPS, **table)
    same(mine, scheduled(row, STEPS))
    assert factors(STEPS, list(range(resumed, STEPS)), **table) == mine[resumed:]


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.integers(1, STEPS), min_size=1, max_size=8),
    st.floats(0.05, 1.5),
    st.integers(0, 500),
)
def test_step_equals_torchs_scheduler_at_any_positions_and_after_any_warmup(
    moments: list[int], gamma: float, warmup: int
) -> None:
    table = {"at": [Period(moment) for moment in moments], "gamma": gamma}
    mine = factors(STEPS, shape="step", warmup=lead(warmup), **table)
    theirs = scheduled(lambda o: lr_scheduler.MultiStepLR(o, moments, gamma=gamma), STEPS)
    same(mine[warmup:], theirs[warmup:])
    same(mine[:warmup], [(it + 1) / (warmup + 1) for it in range(warmup)])


def test_a_schedule_shorter_than_the_run_keeps_its_last_value() -> None:
    cosine = scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, 2500, eta_min=0.1), 2500)
    mine = factors(STEPS, shape="cosine", length=Period(2500), decay_to=0.1)
    same(mine, cosine + [0.1] * 7500)


def nanogpt(it: int, warmup: int, length: int, lowest: float) -> float:
    """The learning rate of nanoGPT's train.py, for one of 1."""
    if it < warmup:
        return (it + 1) / (warmup + 1)
    if it > length:
        return lowest
    ratio = (it - warmup) / (length - warmup)
    return lowest + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (1 - lowest)


def vaswani(step: float, warmup: float) -> float:
    """Equation 3 of arXiv:1706.03762 over its maximum, which is at ``step == warmup``."""
    return min(1 / math.sqrt(step), step * math.pow(warmup, -1.5)) * math.sqrt(warmup)


def minicpm(
    it: int, warmup: int, stable: int, fall: Callable[[float], float], length: int
) -> float:
    """The schedule of arXiv:2404.06395: warmup, stable, decay."""
    if it < warmup:
        return (it + 1) / (warmup + 1)
    return 1.0 if it < stable else fall((it - stable) / (length - stable))


def around(length: int, *edges: int) -> list[int]:
    """Return the updates at and next to the ends of a schedule's segments."""
    return [at for edge in edges for at in (edge - 1, edge, edge + 1) if 0 <= at < length]


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int, float, list[int]]:
    """Draw a length, a warmup, a final factor, and updates to resume at, the edges among them."""
    length = draw(st.integers(2, STEPS))
    warmup = draw(st.integers(0, length - 1))
    resumed = draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=30))
    return length, warmup, draw(st.floats(0, 1)), resumed + around(length, 0, warmup, length)


def lead(warmup: int) -> Period | float:
    return Period(warmup) if warmup else 0.0


@given(runs())
def test_cosine_equals_nanogpts_at_any_warmup_and_resume_point(drawn: Any) -> None:
    length, warmup, lowest, at = drawn
    mine = factors(length, at, shape="cosine", warmup=lead(warmup), decay_to=lowest)
    same(mine, [nanogpt(it, warmup, length, lowest) for it in at])


@given(runs())
def test_linear_falls_in_a_straight_line_at_any_warmup_and_resume_point(drawn: Any) -> None:
    length, warmup, lowest, at = drawn
    mine = factors(length, at, shape="linear", warmup=lead(warmup), decay_to=lowest)
    same(
        mine,
        [
            (it + 1) / (warmup + 1)
            if it < warmup
            else lowest + (1 - lowest) * (length - it) / (length - warmup)
            for it in at
        ],
    )


@given(runs(), st.floats(0.1, 5))
def test_polynomial_is_the_power_of_the_remaining_fraction_at_any_warmup(
    drawn: Any, power: float
) -> None:
    length, warmup, lowest, at = drawn
    table = {"shape": "polynomial", "power": power, "decay_to": lowest}
    same(
        factors(length, at, warmup=lead(warmup), **table),
        [
            (it + 1) / (warmup + 1)
            if it < warmup
            else lowest + (1 - lowest) * ((length - it) / (length - warmup)) ** power
            for it in at
        ],
    )


@given(runs())
def test_constant_stays_at_one_after_any_warmup(drawn: Any) -> None:
    length, warmup, _, at = drawn
    mine = factors(length, at, shape="constant", warmup=lead(warmup))
    assert mine == [(it + 1) / (warmup + 1) if it < warmup else 1.0 for it in at]


@given(runs())
def test_inverse_sqrt_equals_the_formula_of_attention_is_all_you_need(drawn: Any) -> None:
    length, warmup, _, at = drawn
    assume(warmup > 0)
    mine = factors(length, at, shape="inverse_sqrt", warmup=Period(warmup))
    same(mine, [vaswani(it + 1, warmup + 1) for it in at])


def test_inverse_sqrt_equals_its_formula_at_each_of_ten_thousand_updates() -> None:
    mine = factors(STEPS, shape="inverse_sqrt", warmup=Period(400))
    same(mine, [vaswani(it + 1, 401) for it in range(STEPS)])


FALLS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda x, lowest: 1 - x * (1 - lowest),
    "cosine": lambda x, lowest: lowest + (1 - lowest) * math.cos(math.pi * x / 2) ** 2,
    "sqrt": lambda x, lowest: 1 - (1 - lowest) * x**0.5,
}


@given(runs(), st.sampled_from(sorted(FALLS)), st.data())
def test_wsd_equals_minicpms_at_any_warmup_and_decay(drawn: Any, fall: str, data: Any) -> None:
    length, warmup, lowest, at = drawn
    decay = data.draw(st.integers(1, length - warmup))
    at = at + around(length, length - decay)
    table = {"shape": "wsd", "decay": Period(decay), "decay_shape": fall, "decay_to": lowest}
    same(
        factors(length, at, warmup=lead(warmup), **table),
        [
            minicpm(it, warmup, length - decay, lambda x: FALLS[fall](x, lowest), length)
            for it in at
        ],
    )


@pytest.mark.parametrize("fall", FALLS)
def test_wsd_equals_its_formula_at_each_of_ten_thousand_updates(fall: str) -> None:
    table: dict[str, Any] = {"decay": 0.2, "decay_shape": fall, "decay_to": 0.1}
    mine = factors(STEPS, shape="wsd", warmup=Period(400), **table)
    theirs = FALLS[fall]
    same(mine, [minicpm(it, 400, 8000, lambda x: theirs(x, 0.1), STEPS) for it in range(STEPS)])


def sgdr(it: int, cycle: int, growth: int, lowest: float) -> float:
    """Walk through the cycles of arXiv:1608.03983 one by one."""
    while it >= cycle:
        it, cycle = it - cycle, cycle * growth
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * it / cycle)) / 2


@given(runs(), st.integers(1, 500), st.integers(1, 12))
def test_restarts_equal_sgdrs_at_any_warmup(drawn: Any, cycle: int, growth: int) -> None:
    length, warmup, lowest, at = drawn
    at = at + around(length, warmup + cycle, warmup + cycle * (1 + growth))
    table = {"cycle": Period(cycle), "cycle_growth": float(growth), "decay_to": lowest}
    mine = factors(length, at, shape="cosine_with_restarts", warmup=lead(warmup), **table)
    same(
        mine,
        [
            (it + 1) / (warmup + 1) if it < warmup else sgdr(it - warmup, cycle, growth, lowest)
            for it in at
        ],
    )


@given(runs(), st.floats(0, 1))
def test_one_cycle_equals_torchs_at_any_warmup(drawn: Any, start: float) -> None:
    length, warmup, lowest, at = drawn
    assume(warmup > 1)

    def anneal(begin: float, end: float, share: float) -> float:
        return end + (begin - end) / 2 * (1 + math.cos(math.pi * share))

    top, last = warmup - 1, length - 1
    table = {"warmup": Period(warmup), "start": start, "decay_to": lowest}
    same(
        factors(length, at, shape="one_cycle", **table),
        [
            anneal(start, 1, it / top)
            if it <= top
            else anneal(1, lowest, (it - top) / (last - top))
            for it in at
        ],
    )


SHAPES: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"cycle": 0.3, "cycle_growth": 1.5},
    "wsd": {"decay": 0.2, "decay_shape": "sqrt"},
    "inverse_sqrt": {},
    "polynomial": {"power": 2.0},
    "one_cycle": {},
    "step": {"at": [0.2, 0.9], "gamma": 0.5},
}


@given(
    st.sampled_from(sorted(SHAPES)),
    st.integers(2, STEPS),
    st.floats(1e-3, 0.7),
    st.floats(0, 1),
    st.integers(0, 2 * STEPS),
)
def test_every_factor_is_between_zero_and_one(
    shape: str, length: int, warmup: float, lowest: float, at: int
) -> None:
    table = {**SHAPES[shape], "shape": shape, "warmup": warmup, "decay_to": lowest}
    (factor,) = factors(length, [at], **table)
    assert -1e-12 <= factor <= 1 + 1e-12
