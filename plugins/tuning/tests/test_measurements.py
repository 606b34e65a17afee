"""What is read from curves and from trials, without any run."""

from __future__ import annotations

import math
import random

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from fundamentallm import Period, field, hookimpl, plugin
from fundamentallm.testing import compose_tiny
from fundamentallm_tuning.batch_size_finder import StepSettings, fastest_of, largest_that_fits
from fundamentallm_tuning.estimate import Plan, estimated
from fundamentallm_tuning.extrapolate import StepSample, total_of
from fundamentallm_tuning.lr_curve import Curve, choose
from fundamentallm_tuning.overfit import advice
from fundamentallm_tuning.probe import Probe
from fundamentallm_tuning.units import duration, size, toml_float

RATES = [1e-6 * 10 ** (6 * k / 99) for k in range(100)]


def bathtub(fall: int, rise: int) -> list[float]:
    """A loss that falls by 3 around step ``fall``, and rises around ``rise``."""
    drops = [3 / (1 + math.exp(-(k - fall) / 4)) for k in range(100)]
    rises = [9 / (1 + math.exp(-(k - rise) / 2)) for k in range(100)]
    return [5 - drop + up for drop, up in zip(drops, rises, strict=True)]


def test_the_plan_has_the_periods_that_savers_declare_as_settings() -> None:
    @plugin
    class Saves:
        """Saves with a period that settings state."""

        role = "saver"
        every: Period = Period(3)

        @hookimpl
        def on_safe_point(self) -> None: ...

    @plugin
    class Counts(Saves):
        """Has a period of its own, which is no setting."""

        every: Period = field(init=False, default=Period(5))

    @plugin
    class Watches:
        """Has a setting of that name, and saves nothing."""

        role = "observer"
        every: Period = Period(7)

        @hookimpl
        def on_log(self) -> None: ...

    assert Plan.of(compose_tiny(Saves(), Counts(), Watches(), length=4)).saves == [Period(3)]


@pytest.mark.parametrize("fall", [30, 50, 64])
def test_the_steepest_descent_is_found_where_it_is(fall: int) -> None:
    found = choose(Curve(RATES, bathtub(fall, 90)))
    assert found is not None
    assert found.steepest == RATES[fall]
    assert RATES[fall] < found.lowest < RATES[90]
    assert found.loss == pytest.approx(2, abs=0.2)


@settings(deadline=None)
@given(st.lists(st.floats(-0.02, 0.02), min_size=100, max_size=100))
def test_noise_moves_the_steepest_descent_by_little(noise: list[float]) -> None:
    losses = [loss + n for loss, n in zip(bathtub(50, 90), noise, strict=True)]
    found = choose(Curve(RATES, losses))
    assert found is not None
    assert RATES[45] <= found.steepest <= RATES[55]


NOISES = {
    "normal": lambda rng: rng.gauss(0, 1),
    "uniform": lambda rng: rng.random(),
    "either": lambda rng: rng.choice([0.0, 1.0]),
    "skewed": lambda rng: rng.lognormvariate(0, 1),
    "skewed down": lambda rng: -rng.lognormvariate(0, 1),
}


SEEDS = st.integers(0, 2**32).map(random.Random)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("steps", [10, 20, 50, 100])
def test_of_noise_around_a_constant_next_to_nothing_is_suggested(kind: str, steps: int) -> None:
    rng = random.Random(f"{kind} {steps}")
    rates, noise = RATES[:steps], NOISES[kind]
    found = sum(
        choose(Curve(rates, [20 + noise(rng) for _ in rates])) is not None for _ in range(150)
    )
    # Fewer than 1 of 1,000 where noise is normal, fewer than 25 where it is skewed or coarse.
    assert found <= (1 if kind in ("normal", "uniform") else 4)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.floats(0, 5e-3), st.floats(0.01, 100), st.sampled_from(sorted(NOISES)))
def test_a_slight_drift_is_no_fall_however_small_the_noise(rng, drift, level, kind) -> None:
    losses = [level * (1 - drift * k / 100 + 1e-5 * NOISES[kind](rng)) for k in range(100)]
    assert choose(Curve(RATES, losses)) is None


@settings(deadline=None, max_examples=30)
@given(
    SEEDS,
    st.floats(0.05, 100),
    st.floats(0, 0.15),
    st.integers(20, 64),
    st.integers(80, 95),
    st.sampled_from(sorted(NOISES)),
)
def test_a_fall_is_found_in_noise_that_is_smaller_than_it(
    rng, scale, noise, fall, rise, kind
) -> None:
    clean = bathtub(fall, rise)
    losses = [scale * (loss + noise * NOISES[kind](rng)) for loss in clean]
    found = choose(Curve(RATES, losses))
    assert found is not None
    assert RATES[fall - 15] <= found.steepest <= RATES[fall + 15]


def test_coming_back_from_a_rise_is_no_descent() -> None:
    spike = [6 * math.exp(-((k - 70) ** 2) / 20) for k in range(100)]
    losses = [loss + up for loss, up in zip(bathtub(40, 99), spike, strict=True)]
    found = choose(Curve(RATES, losses))
    assert found is not None
    assert found.steepest == RATES[40]


@pytest.mark.parametrize(
    "losses",
    [
        [4.0] * 100,
        [4 + k / 100 for k in range(100)],
        [4 + 0.1 * (-1) ** k for k in range(100)],
        [4.0, 3.0, 2.0],
        [],
    ],
)
def test_where_the_loss_does_not_fall_clearly_nothing_is_suggested(losses: list[float]) -> None:
    assert choose(Curve(RATES[: len(losses)], losses)) is None


def test_averaging_keeps_a_straight_line_as_it_is() -> None:
    line = [float(k) for k in range(20)]
    assert Curve(RATES[:20], line).smoothed() == pytest.approx(line)


def test_the_drawing_marks_the_suggestion_and_keeps_to_its_frame() -> None:
    drawn = Curve(RATES, bathtub(50, 90)).drawn(RATES[50], width=40, height=8)
    assert len(drawn) == 10
    assert {row.index("│") for row in drawn[:8]} == {len(drawn[8].split("└")[0])}
    assert all(len(row) <= 40 + drawn[0].index("│") + 1 for row in drawn)
    assert sum("┊" in row for row in drawn) >= 6
    assert drawn[-1].split() == ["loss", "1.0e-6", "1.0e0"]


SIZES = st.one_of(
    st.builds(range, st.integers(1, 50), st.integers(51, 5000)),
    st.sets(st.integers(1, 5000), min_size=1).map(sorted),
)


@settings(deadline=None)
@given(SIZES, st.integers(0, 6000))
def test_the_largest_size_that_fits_is_found_to_a_sixteenth(sizes, limit: int) -> None:
    tried = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= limit

    found = largest_that_fits(sizes, fits)
    assert len(set(tried)) == len(tried) <= 30
    assert set(tried) <= set(sizes)
    fitting = [n for n in sizes if n <= limit]
    if not fitting:
        assert found is None
        assert tried == [sizes[0]]
    else:
        assert found in tried
        assert found in fitting
        assert max(fitting) - found <= found // 16


def test_of_equally_fast_sizes_the_smallest_is_suggested() -> None:
    assert fastest_of({1: 100.0, 2: 190.0, 4: 297.0, 8: 300.0, 16: 290.0}) == 4


def test_a_step_keeps_its_size_with_the_sizes_that_divide_it() -> None:
    place = StepSettings("text", 12, "many", 3)
    assert list(place.sizes(2, 20, keeps=True)) == [2, 3, 4, 6, 9, 12, 18]
    for n in place.sizes(1, 99, keeps=True):
        pasted = tomli.loads("\n".join(place.setting(n, keeps=True)))
        assert pasted["text"]["batch_size"] * pasted["many"]["microbatches"] == 36


def test_a_setting_without_accumulation_says_that_it_needs_it() -> None:
    place = StepSettings("text", 12, None, 1)
    assert place.setting(12, keeps=True) == ["[text]", "batch_size = 12"]
    text = "\n".join(place.setting(4, keeps=True))
    assert 'add "accumulate" to the plugins list' in text
    assert tomli.loads(text)["accumulate"] == {"microbatches": 3}
    assert tomli.loads("\n".join(place.setting(4, keeps=False))) == {"text": {"batch_size": 4}}


@given(st.floats(1e-12, 1e6))
def test_a_rate_to_paste_is_toml_and_close(rate: float) -> None:
    assert tomli.loads(f"lr = {toml_float(rate)}")["lr"] == pytest.approx(rate, rel=0.05)


def probed(steps: list[float], validations: list[float], samples: int, epoch: int) -> Probe:
    probe = Probe(steps=2)
    probe.seconds["step"] += steps
    probe.seconds["on_safe_point"] += [0.0, 1.0]
    probe.validations += validations
    probe.counts |= {"tokens": 100, "samples": samples}
    probe.metrics = {"val/loss": 1.0}
    probe.epoch_samples = epoch
    return probe


@pytest.mark.parametrize(
    ("length", "steps"),
    [("100 steps", 100), ("10_000 tokens", 100), ("2 epochs", 50), ("50 seconds", 83)],
)
def test_the_run_s_length_is_estimated_in_every_unit(length: str, steps: int) -> None:
    probe = probed([9.0, 0.5], [2.0], samples=4, epoch=100)
    plan = Plan(Period.parse(length), Period(40), validates_first=True, saves=[Period(30)])
    speed, run = estimated(plan, probe, [StepSample.of(probe, 0.0)])
    assert "500 ms for a step; the first 9.0 seconds; 200 tokens/s" in speed
    validations, saves = math.ceil(steps / 40) + 1, math.ceil(steps / 30)
    assert f"{steps} steps of 500 ms (the first 9.0 seconds), {validations} validations of 2" in run
    assert f"{saves} saves of 1.0 seconds at most" in run
    total = 9 + (steps - 1) * 0.5 + validations * 2 + saves
    assert f"about {duration(total)} for {steps * 100:,}" in run


def test_the_extra_time_of_the_first_step_and_validation_is_counted_once() -> None:
    probe = probed([12.3, 0.1, 0.15, 0.1], [7.5, 0.2], samples=4, epoch=100)
    plan = Plan(Period(20), Period(5), validates_first=False, saves=[])
    *_, run = estimated(plan, probe, [StepSample.of(probe, 0.0)])
    assert run.endswith(
        f"about {duration(12.3 + 19 * 0.1 + 7.5 + 3 * 0.2)} for 2,000 tokens: 20 steps of 100 ms "
        f"(the first 12.3 seconds), 4 validations of 200 ms (the first 7.5 seconds)"
    )


def test_a_run_shorter_than_its_first_step_has_that_one() -> None:
    probe = probed([9.0, 0.5], [2.0], samples=4, epoch=100)
    plan = Plan(Period(5, "seconds"), None, validates_first=False, saves=[])
    *_, run = estimated(plan, probe, [StepSample.of(probe, 0.0)])
    assert "about 11.0 seconds for 100 tokens: 1 step of 500 ms" in run


def test_three_epochs_have_three_validations_of_one_epoch_each() -> None:
    probe = probed([0.5, 0.5], [2.0], samples=6, epoch=179)
    plan = Plan(Period(3, "epochs"), Period(1, "epochs"), validates_first=False, saves=[])
    *_, run = estimated(plan, probe, [StepSample.of(probe, 0.0)])
    assert "90 steps of 500 ms, 3 validations of" in run


@pytest.mark.parametrize("length", ["1000 steps", "55_000 tokens", "100 epochs", "20 seconds"])
@settings(deadline=None, max_examples=20)
@given(until=st.floats(0.01, 1))
def test_steps_that_grow_in_a_straight_line_are_added_up(length: str, until: float) -> None:
    points = [
        StepSample(0.0, 0.01, 10, 1),
        StepSample(0.5, 0.03, 55, 5.5),
        StepSample(1.0, 0.05, 100, 10),
    ]
    period = Period.parse(length)
    found = total_of(period, points, 55, until)
    assert found.times(period, 55) == pytest.approx(until)

    def steps_at(at: float) -> float:  # the integral of 1 / (a + b x) has a formula
        base, slope = {
            "steps": (1, 0),
            "tokens": (10, 90),
            "epochs": (1 / 55, 9 / 55),
            "seconds": (0.01, 0.04),
        }[period.unit]
        return period.amount * (math.log1p(slope / base * at) / slope if slope else at)

    assert found.steps == pytest.approx(steps_at(until), rel=1e-3)
    if period.unit == "steps":
        assert found.tokens == pytest.approx(1000 * (10 * until + 45 * until**2), rel=1e-3)
        assert found.seconds == pytest.approx(1000 * (0.01 * until + 0.02 * until**2), rel=1e-3)


def test_the_range_of_a_step_ends_where_steps_change() -> None:
    probe = probed([0.1, 0.1], [1.0, 1.0], samples=1, epoch=100)
    points = [
        StepSample.of(probe, 0.0),
        StepSample(0.5, 0.2, 200, 2, 2.0),
        StepSample(1.0, 0.3, 300, 3, 3.0),
    ]
    plan = Plan(Period(100), Period(50), validates_first=False, saves=[])
    _, half, end, run = estimated(plan, probe, points)
    assert "after 50% 200 ms for a step of 2 samples, 200 tokens; 1,000 tokens/s" in half
    assert "at the end 300 ms for a step of 3 samples, 300 tokens; 1,000 tokens/s" in end
    assert "about 24.0 seconds for 20,000 tokens: 100 steps of 100 ms to 300 ms, 2 valid" in run


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([4.0, 5.0, 9.0], "It rises"),
        ([4.0] * 50, "It hardly falls"),
        ([4.0, 1.0, 3.0], "rose again"),
        ([4.0 - k / 20 for k in range(50)], "still falling"),
        ([4.0] + [1.0] * 50, "no longer falls"),
    ],
)
def test_the_advice_follows_from_how_the_loss_went(losses: list[float], said: str) -> None:
    assert said in advice(losses)


def test_numbers_are_written_for_people() -> None:
    assert [size(n) for n in (12, 2048, 3 << 20, 5 << 30)] == [
        "12 bytes",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]
    assert [duration(s) for s in (0.0123, 12, 600, 7200, 86400 * 4)] == [
        "12.3 ms",
        "12.0 seconds",
        "10.0 minutes",
        "2.0 hours",
        "4.0 days",
    ]
