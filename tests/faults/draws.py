"""Moments and faults as Hypothesis draws them: other ones at every run, the same in quick tests.

Hypothesis prints the draws of a failing case as its ``Falsifying example``; ``--hypothesis-seed`` draws all
of it again.
"""

from __future__ import annotations

import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import layer
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from tiny import LAST, SAVES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hypothesis.strategies import SearchStrategy

_YES, _NOT = st.sampled_from([True]), st.sampled_from([False])

PLAIN = 70
"""System calls of a save that deletes nothing after."""
START = 21
"""System calls of a run's start, of those that the saves go through: its id, and a probe."""


@attrs.frozen
class AfterStep:
    """So many seconds after the row of a step was seen from outside."""

    step: int
    delay: float


@attrs.frozen
class WhileSaving:
    """So many seconds after the folder of a step's checkpoint in the making was seen."""

    step: int
    delay: float


def faults(fault: Callable[..., None], **drawn: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """Draw calls of a fault of the file layer, or of the loop, to be installed before a start."""
    return st.builds(partial, st.just(fault), **drawn)


def act_at(
    act: SearchStrategy[Any], torn: SearchStrategy[bool] = _NOT
) -> dict[str, SearchStrategy[Any]]:
    """Draw the moments at which a process does something to itself, by their kind; ``torn``: whether
    in the midst of a write."""
    return {
        "a system call of a save": faults(
            layer.act_in_save,
            act=act,
            step=st.sampled_from(SAVES),
            number=st.integers(1, PLAIN),
            torn=torn,
        ),
        "a name given or taken": faults(
            layer.act_at_rename, act=act, count=st.integers(1, 13), after=st.integers(0, 7)
        ),
        "a call of the start": faults(layer.act_at, act=act, number=st.integers(1, START)),
        "a hook": faults(
            layer.act_at_hook, act=act, hook=st.sampled_from(HOOKS), step=st.integers(0, LAST)
        ),
        "a validation": faults(
            layer.act_at_hook,
            act=act,
            step=st.integers(0, LAST),
            hook=st.sampled_from(
                ["forward", "evaluation_weights", "validate", "on_validation_end"]
            ),
            validating=_YES,
        ),
        "a task": faults(
            layer.act_at_task, act=act, task=st.sampled_from(TASKS), count=st.integers(1, 3)
        ),
    }


SEEN = {
    "any time": st.builds(AfterStep, st.integers(1, LAST - 1), st.floats(0, 0.03)),
    "while it saves": st.builds(WhileSaving, st.sampled_from(SAVES), st.floats(0, 0.01)),
}
HOOKS = (
    "on_run_start",
    "build_data",
    "build_tokenizer",
    "build_model",
    "build_optimizer",
    "read_checkpoint",
    "on_train_start",
    "collect_batches",
    "weigh_window",
    "train_microbatch",
    "forward",
    "backward",
    "lr_factor",
    "optimizer_step",
    "settle_step",
    "validate",
    "on_validation_end",
    "reduce_metrics",
    "on_log",
    "stop_agreed",
    "on_safe_point",
    "on_train_end",
)
"""Hooks that the tiny run's plugins and the core's defaults answer."""
TASKS = ("reading the alphabet", "tokenizing", "validation", "saving")
"""The tasks of the tiny run that report progress."""


def often(
    count: int,
    drawn: SearchStrategy[Any],
    check: Callable[[Any, Path], bool],
    place: Path,
    *,
    quick: bool = False,
) -> None:
    """Check so many examples, each in its own folder.

    An example for which ``check`` returns False had no effect and does not count: another is drawn.
    """
    numbers = iter(range(10**6))
    counted = []

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        derandomize=quick,
        suppress_health_check=[*HealthCheck],
    )
    @given(drawn)
    def one(example: Any) -> None:
        folder = place / str(next(numbers))
        assume(check(example, folder))
        counted.append(example)
        shutil.rmtree(folder, ignore_errors=True)

    one()
    assert len(counted) == count, "there are fewer such moments than that"
