"""Periods: what they look like, and when they are due, reached and how far done."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import ceil, inf

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fundamentallm import Batch, Period, Progress, SettingsError, round_up

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SIZES = {"seconds": 1, "minutes": 60, "hours": 3600}
UNITS = ("steps", "epochs", "tokens", *SIZES)

whole = st.integers(1, 2**53)
parts = st.floats(1e-9, 1e12, allow_nan=False)


@st.composite
def periods(draw: st.DrawFn) -> Period:
    unit = draw(st.sampled_from(UNITS))
    return Period(draw(whole if unit in ("steps", "tokens") else whole | parts), unit)


@unhurried
@given(periods())
def test_the_text_of_a_period_is_parsed_as_the_same_period(period: Period) -> None:
    assert Period.parse(str(period)) == period
    assert str(Period.parse(str(period))) == str(period)


@unhurried
@given(whole)
def test_a_bare_number_is_a_number_of_steps(amount: int) -> None:
    assert Period.parse(amount) == Period.parse(f"{amount} steps") == Period(amount, "steps")


@pytest.mark.parametrize(
    ("text", "period"),
    [
        ("1 step", Period(1)),
        ("2 steps", Period(2)),
        (" 2steps ", Period(2)),
        ("1_000 steps", Period(1000)),
        ("1e9 tokens", Period(10**9, "tokens")),
        ("1.5e+3 tokens", Period(1500, "tokens")),
        ("0.5 epochs", Period(0.5, "epochs")),
        ("1e-05 hours", Period(0.00001, "hours")),
        ("1 hour", Period(1, "hours")),
        ("90 seconds", Period(90, "seconds")),
        ("10 minutes", Period(10, "minutes")),
    ],
)
def test_valid_texts_are_parsed_as_periods(text: str, period: Period) -> None:
    assert Period.parse(text) == period


@pytest.mark.parametrize(
    ("period", "text"),
    [
        (Period(1), "1 step"),
        (Period(500), "500 steps"),
        (Period(1.0, "epochs"), "1 epoch"),
        (Period(0.5, "epochs"), "0.5 epochs"),
        (Period(1e9, "tokens"), "1000000000 tokens"),
    ],
)
def test_a_period_prints_as_a_person_would_write_it(period: Period, text: str) -> None:
    assert str(period) == text


@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        1.5,
        500.0,
        "500",
        "",
        "steps",
        "a step",
        "-5 steps",
        "5 steps more",
        "5,0 epochs",
        "5 STEPS",
        "0x10 steps",
        None,
        [5],
        {"steps": 5},
    ],
)
def test_the_error_for_a_text_that_is_no_period_shows_valid_ones(value: object) -> None:
    with pytest.raises(ValueError, match="expected a period such as 500 or '10 minutes', got "):
        Period.parse(value)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (
            "5 parsecs",
            "unknown unit 'parsecs'; known: steps, epochs, tokens, seconds, minutes, hours",
        ),
        ("5 stepss", "unknown unit 'stepss'"),
        ("0 steps", "more than zero, not 0"),
        (0, "more than zero, not 0"),
        (-3, "more than zero, not -3"),
        ("1e999 hours", "finite and more than zero, not inf"),
        ("1.5 steps", "a number of steps is whole, not 1.5"),
        ("0.5 tokens", "a number of tokens is whole, not 0.5"),
    ],
)
def test_the_error_for_a_wrong_period_says_what_is_wrong(value: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Period.parse(value)


@pytest.mark.parametrize("amount", [0, -1, inf, -inf, float("nan")])
def test_no_period_is_empty_or_endless(amount: float) -> None:
    with pytest.raises(ValueError, match="more than zero"):
        Period(amount, "epochs")


@st.composite
def histories(draw: st.DrawFn) -> list[Progress]:
    """The progress of a run from step 0 on: steps of one or more batches, taking any time."""
    run = Progress(epoch_samples=draw(st.integers(1, 50)))
    seen = [Progress(epoch_samples=run.epoch_samples)]
    batches = st.builds(
        Batch,
        data=st.none(),
        weight=st.just(1.0),
        samples=st.integers(0, 20),
        tokens=st.integers(0, 99),
    )
    steps = st.tuples(
        st.lists(batches, min_size=1, max_size=3),
        st.booleans(),
        st.sampled_from([0.0, 0.25, 7.5, 900.0]),
    )
    for window, applied, seconds in draw(st.lists(steps, max_size=30)):
        run.advance(window, applied, seconds)
        seen.append(
            Progress(**{name: getattr(run, name) for name in run.__slots__ if name[0] != "_"})
        )
    return seen


@st.composite
def small_periods(draw: st.DrawFn) -> Period:
    unit = draw(st.sampled_from(UNITS))
    if unit in ("steps", "tokens"):
        return Period(draw(st.integers(1, 60)), unit)
    return Period(draw(st.integers(1, 8) | st.sampled_from([0.1, 0.25, 0.07, 1.5])), unit)


def passed(period: Period, progress: Progress) -> Fraction:
    """How many periods have passed, in exact numbers."""
    amount = Fraction(str(period.amount))
    if period.unit == "epochs":
        return Fraction(progress.samples, ceil(amount * progress.epoch_samples))
    if period.unit in SIZES:
        return Fraction(progress.seconds) / Fraction(period.amount * SIZES[period.unit])
    return Fraction(progress.step if period.unit == "steps" else progress.tokens) / amount


@unhurried
@given(histories(), small_periods())
def test_a_period_is_due_after_exactly_the_steps_that_complete_one(
    history: list[Progress], period: Period
) -> None:
    due = [period.due(after) for after in history[1:]]
    expected = [
        passed(period, after) // 1 > passed(period, before) // 1
        for before, after in pairwise(history)
    ]
    assert due == expected
    assert not period.due(history[0]), "nothing is due before the first step"


@unhurried
@given(histories(), small_periods())
def test_a_length_is_reached_when_one_period_has_passed(
    history: list[Progress], period: Period
) -> None:
    for progress in history:
        assert period.reached(progress) == (passed(period, progress) >= 1)
        assert period.done(progress) == pytest.approx(float(passed(period, progress)))


@unhurried
@given(histories(), small_periods(), st.data())
def test_a_resumed_run_keeps_the_rhythm(
    history: list[Progress], period: Period, data: st.DataObject
) -> None:
    # A period has no memory: asked for the first time in the middle, it answers the same.
    asked_always = [period.due(progress) for progress in history]
    start = data.draw(st.integers(0, len(history) - 1))
    fresh = Period(period.amount, period.unit)
    assert [fresh.due(progress) for progress in history[start:]] == asked_always[start:]


def test_a_step_that_completes_several_periods_is_due_once() -> None:
    progress = Progress()
    progress.advance([Batch(None, 1.0, samples=1, tokens=35)], applied=True, seconds=1.0)
    assert Period(10, "tokens").due(progress)
    assert Period(10, "tokens").done(progress) == 3.5
    progress.advance([Batch(None, 1.0, samples=1, tokens=4)], applied=True, seconds=1.0)
    assert not Period(10, "tokens").due(progress)


def test_a_rejected_step_counts_as_a_step() -> None:
    progress = Progress()
    progress.advance([], applied=False, seconds=1.0)
    assert Period(1).due(progress)
    assert Period(1).reached(progress)


@pytest.mark.parametrize(
    ("amount", "epoch", "samples"), [(0.07, 100, 7), (0.1, 1005, 101), (0.29, 100, 29), (3, 7, 21)]
)
def test_a_part_of_an_epoch_is_a_whole_number_of_samples(
    amount: float, epoch: int, samples: int
) -> None:
    period = Period(amount, "epochs")
    assert not period.reached(Progress(samples=samples - 1, epoch_samples=epoch))
    assert period.reached(Progress(samples=samples, epoch_samples=epoch))


@pytest.mark.parametrize("epoch_samples", [None, 0])
def test_a_period_in_epochs_of_data_without_epochs_is_an_error(epoch_samples: int | None) -> None:
    for ask in (Period(2, "epochs").due, Period(2, "epochs").reached, Period(2, "epochs").done):
        with pytest.raises(SettingsError, match="2 epochs needs data with epochs"):
            ask(Progress(step=1, epoch_samples=epoch_samples))


@pytest.mark.parametrize(
    ("count", "whole"),
    [
        (0.07 * 100, 7),
        (7.0, 7),
        (7.001, 8),
        (0.1 * 1005, 101),
        (0.1 + 0.2, 1),
        (1e9 + 0.5, 10**9 + 1),
    ],
)
def test_round_up_returns_a_whole_number_not_below_apart_from_rounding_errors(count, whole):
    assert round_up(count) == whole
