"""Retention is a pure function of the manifests that are there."""

from __future__ import annotations

import math

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from fundamentallm_checkpoint.storage.manifest import Manifest
from fundamentallm_checkpoint.storage.retention import MILESTONE, Rules, plan, ranked


def known(
    step: int, loss: float | None = None, tags: tuple[str, ...] = (), *, finite: bool = True
) -> Manifest:
    metrics = {} if loss is None else {"val/loss": loss}
    return Manifest(
        step=step,
        run="it",
        created=0.0,
        settings="",
        data="",
        metrics=metrics,
        tags=tags,
        finite=finite,
    )


existing = st.lists(
    st.builds(
        known,
        st.integers(0, 50),
        st.none() | st.floats(allow_nan=True),
        st.sampled_from([(), (MILESTONE,), ("best",)]),
        finite=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda m: m.step,
)
rules = st.builds(
    Rules,
    keep_last=st.integers(1, 5),
    keep_best=st.integers(0, 4),
    monitor=st.just("val/loss"),
    mode=st.sampled_from(["min", "max"]),
)


@settings(deadline=None)
@given(existing, rules)
def test_checkpoints_that_the_rules_protect_are_kept(there: list[Manifest], given_: Rules) -> None:
    gone = plan(there, given_)
    stays = sorted((m for m in there if m.step not in gone), key=lambda m: m.step)
    newest = sorted(there, key=lambda m: m.step)
    assert stays[-2:] == newest[-2:]
    assert newest[-given_.keep_last :] == stays[-given_.keep_last :]
    assert all(m in stays for m in there if MILESTONE in m.tags)
    finite = [m for m in newest if m.finite]
    assert not finite or finite[-1] in stays
    assert all(m in stays for m in ranked(there, given_)[: given_.keep_best])


@settings(deadline=None)
@given(existing, rules)
def test_nothing_is_kept_without_a_rule(there: list[Manifest], given_: Rules) -> None:
    gone = plan(there, given_)
    milestones = sum(MILESTONE in m.tags for m in there)
    assert len(there) - len(gone) <= max(given_.keep_last, 2) + given_.keep_best + milestones + 1


@settings(deadline=None)
@given(existing, rules)
def test_deleting_twice_deletes_nothing_more(there: list[Manifest], given_: Rules) -> None:
    gone = plan(there, given_)
    assert plan([m for m in there if m.step not in gone], given_) == set()


@settings(deadline=None)
@given(existing, rules)
def test_the_order_they_are_found_in_does_not_matter(there: list[Manifest], given_: Rules) -> None:
    assert plan(there, given_) == plan(list(reversed(there)), given_)


@settings(deadline=None)
@given(existing, rules)
def test_the_best_come_first_and_nan_never(there: list[Manifest], given_: Rules) -> None:
    scores = [m.metrics["val/loss"] for m in ranked(there, given_)]
    assert not any(map(math.isnan, scores))
    assert scores == sorted(scores, reverse=given_.mode == "max")


def test_of_equals_the_earlier_is_the_better() -> None:
    kept = Rules(keep_last=1, keep_best=1, monitor="val/loss")
    there = [known(step, 1.0) for step in (1, 2, 3, 4, 5)]
    assert plan(there, kept) == {2, 3}


def test_a_restarted_run_needs_no_memory_of_the_best() -> None:
    kept = Rules(keep_last=2, keep_best=1, monitor="val/loss")
    there = [known(1, 0.5), *[known(step, 1.0) for step in range(2, 9)]]
    remaining = there
    for count in range(1, len(there) + 1):
        found = [m for m in there[:count] if m in remaining or m is there[count - 1]]
        gone = plan(found, kept)
        remaining = [attrs.evolve(m) for m in found if m.step not in gone]
    assert [m.step for m in remaining] == [1, 7, 8]
