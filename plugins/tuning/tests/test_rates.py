"""What is read from curves and from trials, without any run."""

from __future__ import annotations

import math

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm import Period
from fundamentallm_tuning.batch_sizes import Place, fastest_of, largest_that_fits
from fundamentallm_tuning.estimate import Plan, Speed, estimated
from fundamentallm_tuning.overfitting import advice
from fundamentallm_tuning.probe import Probe
from fundamentallm_tuning.rates import Curve, choose
from fundamentallm_tuning.units import duration, size, toml_float

RATES = [1e-6 * 10 ** (6 * k / 99) for k in range(100)]


def bathtub(fall: int, rise: int) -> list[float]:
    """A loss that falls by 3 around step ``fall``, and rises around ``rise``."""
    drops = [3 / (1 + math.exp(-(k - fall) / 4)) for k in range(100)]
    rises = [9 / (1 + math.exp(-(k - rise) / 2)) for k in range(100)]
    return [5 - drop + up for drop, up in zip(drops, rises, strict=True)]


@pytest.mark.parametrize("fall", [30, 50, 64])
def test_the_steepest_descent_is_found_where_it_is(fall: int) -> None:
    found = choose(Curve(RATES, bathtub(fall, 90)))
    assert found is not None
    assert found.steepest == RATES[fall]
    assert RATES[fall] < found.lowest < RATES[90]
    assert found.loss == pytest.approx(2, abs=0.2)


@given(st.lists(st.floats(-0.02, 0.02), min_size=100, max_size=100))
def test_noise_moves_the_steepest_descent_by_little(noise: list[float]) -> None:
    losses = [loss + n for loss, n in zip(bathtub(50, 90), noise, strict=True)]
    found = choose(Curve(RATES, losses))
    assert found is not None
    assert RATES[45] <= found.steepest <= RATES[55]


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
    place = Place("text", 12, "many", 3)
    assert list(place.sizes(2, 20, keeps=True)) == [2, 3, 4, 6, 9, 12, 18]
    for n in place.sizes(1, 99, keeps=True):
        pasted = tomli.loads("\n".join(place.setting(n, keeps=True)))
        assert pasted["text"]["batch_size"] * pasted["many"]["microbatches"] == 36


def test_a_setting_without_accumulation_says_that_it_needs_it() -> None:
    place = Place("text", 12, None, 1)
    assert place.setting(12, keeps=True) == ["[text]", "batch_size = 12"]
    text = "\n".join(place.setting(4, keeps=True))
    assert '"accumulate" has to be in the plugins list' in text
    assert tomli.loads(text)["accumulate"] == {"microbatches": 3}
    assert tomli.loads("\n".join(place.setting(4, keeps=False))) == {"text": {"batch_size": 4}}


@given(st.floats(1e-12, 1e6))
def test_a_rate_to_paste_is_toml_and_close(rate: float) -> None:
    assert tomli.loads(f"lr = {toml_float(rate)}")["lr"] == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize(
    ("length", "steps"),
    [("100 steps", 100), ("10_000 tokens", 100), ("2 epochs", 50), ("50 seconds", 100)],
)
def test_the_run_s_length_is_estimated_in_every_unit(length: str, steps: int) -> None:
    probe = Probe(steps=2)
    probe.seconds["step"] += [9.0, 0.5]
    probe.seconds["validate"] += [2.0]
    probe.seconds["on_safe_point"] += [0.0, 1.0]
    probe.counts |= {"tokens": 100, "samples": 4}
    probe.metrics = {"val/loss": 1.0}
    probe.epoch_samples = 100
    assert Speed(0.5, 100, 4, 100).steps_in(Period.parse(length)) == steps
    plan = Plan(Period.parse(length), Period(40), validates_first=True, saves=[Period(30)])
    speed, run = estimated(plan, probe)
    assert "500 ms for a step; the first 9.0 seconds; 200 tokens/s" in speed
    validations, saves = math.ceil(steps / 40) + 1, math.ceil(steps / 30)
    assert f"{steps} steps of 500 ms, {validations} validations of 2.0 seconds" in run
    assert f"{saves} saves of 1.0 seconds at most" in run
    assert f"about {duration(steps * 0.5 + validations * 2 + saves)} for {steps * 100:,}" in run


def test_three_epochs_have_three_validations_of_one_epoch_each() -> None:
    probe = Probe(steps=2)
    probe.seconds["step"] += [0.5, 0.5]
    probe.seconds["validate"] += [2.0]
    probe.counts |= {"tokens": 100, "samples": 6}
    probe.metrics = {"val/loss": 1.0}
    probe.epoch_samples = 179
    plan = Plan(Period(3, "epochs"), Period(1, "epochs"), validates_first=False, saves=[])
    *_, run = estimated(plan, probe)
    assert "90 steps of 500 ms, 3 validations of" in run


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([4.0, 5.0, 9.0], "It rises"),
        ([4.0] * 50, "It hardly falls"),
        ([4.0, 1.0, 3.0], "rose again"),
        ([4.0 - k / 20 for k in range(50)], "still falling"),
        ([4.0] + [1.0] * 50, "come to a halt"),
    ],
)
def test_the_advice_follows_from_how_the_loss_went(losses: list[float], said: str) -> None:
    assert said in advice(losses)


def test_numbers_are_written_for_people() -> None:
    assert [size(n) for n in (12, 2048, 3 << 20, 5 << 30)] == [
        "12 bytes", "2.0 KiB", "3.0 MiB", "5.0 GiB",
    ]  # fmt: skip
    assert [duration(s) for s in (0.0123, 12, 600, 7200, 86400 * 4)] == [
        "12.3 ms", "12.0 seconds", "10.0 minutes", "2.0 hours", "4.0 days",
    ]  # fmt: skip
