"""One setting of a plugin that follows a schedule: what fits it, and how it is set."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from fundamentallm import HOOKS, SettingsError, hook_methods, setting_fields
from fundamentallm_lr_schedule.parts import Course, Levels, count, divide

if TYPE_CHECKING:
    from fundamentallm import Run
    from fundamentallm_lr_schedule.schedules import Scheduled, Schedules

# Who hears none of the hooks between these does nothing that a changed setting could change.
_OUTSIDE = {*HOOKS[: HOOKS.index("on_step_start")], "on_train_end"}
# Settings that PyTorch keeps as parts of one value.
_PARTS = {"beta1": ("betas", 0), "beta2": ("betas", 1)}


def follow(schedules: Schedules, run: Run) -> list[Followed]:
    """Lay all schedules over the run; raise ``SettingsError`` with everything that does not fit."""
    name = next(name for name, one in run.plugins.items() if one is schedules)
    found: list[Followed] = []
    problems: list[str] = []
    for plugin, settings in schedules.of.items():
        for setting, scheduled in settings.items():
            key = f"{name}.of.{plugin}.{setting}"
            try:
                _check_rivals(run, schedules, plugin, setting)
                found.append(Followed(run, plugin, setting, scheduled))
            except ValueError as error:
                inner = str(error).partition(": ")[0] in setting_fields(type(scheduled))
                problems.append(f"{key}.{error}" if inner else f"{key}: {error}")
    if problems:
        raise SettingsError(problems)
    return found


class Followed:
    """A setting and its schedule; ``value`` is what it is set to, once the run has begun.

    ``cuts_data`` tells whether the stream of micro-batches depends on it. Raises ``ValueError`` if
    setting and schedule do not fit each other.
    """

    def __init__(self, run: Run, plugin: str, setting: str, scheduled: Scheduled) -> None:
        self.plugin, self.setting = _named(run.plugins, plugin, "is no listed plugin"), setting
        hooks = {hook for hook, _, _ in hook_methods(type(self.plugin))}
        self.cuts_data, self.optimizes = "build_data" in hooks, "build_optimizer" in hooks
        fields = setting_fields(type(self.plugin))
        self.attribute = _named(fields, setting, f"is no setting of {plugin}")
        self.base: Any = getattr(self.plugin, setting)
        self.value: Any = None
        self.metric = f"schedules/{plugin}.{setting}"
        self.groups: list[int] = []
        self.whole = _is_whole(self.attribute.type)
        self._check_use(hooks)
        if scheduled.multiple_of is not None and not self.whole:
            raise ValueError("multiple_of: is for whole numbers, and this is none")
        self.multiple = scheduled.multiple_of or 1
        self.course = self._course(scheduled, run)

    def bind(self, run: Run) -> Iterator[str]:
        """Find the parameter groups to change; yield what of the run does not fit."""
        key = self.metric.partition("/")[2]
        if self.course.unit == "epochs" and run.progress.epoch_samples is None:
            yield f"the schedule of {key} is counted in epochs, but the data source has no epochs"
        if not self.optimizes:
            return
        groups = run.optimizer.param_groups
        self.groups = [i for i, group in enumerate(groups) if self._of(group) == self.base]
        if not self.groups:
            yield (
                f"{key} cannot follow a schedule: no parameter group of {type(run.optimizer)} has "
                f"{self.setting} = {self.base}"
            )

    def update(self, run: Run) -> bool:
        """Set the value of where the run is; tell whether it is another than before."""
        course = self.course
        value = self._rounded(course.value(course.position(run.progress)))
        if value == self.value:
            return False
        try:
            self._check_value(value)
        except ValueError as error:
            key = self.metric.partition("/")[2]
            raise SettingsError(f"step {run.progress.step + 1}: {key}: {error}") from error
        self.value = value
        setattr(self.plugin, self.setting, value)
        for index in self.groups:
            # Found anew at each change: loading a state puts others in the place of the groups.
            self._put(run.optimizer.param_groups[index], value)
        return True

    def _course(self, scheduled: Scheduled, run: Run) -> Course:
        start = self.base if scheduled.start is None else scheduled.start
        if start is None:
            raise ValueError("start: is missing; the plugin's own table states no value")
        peak = start if scheduled.peak is None else scheduled.peak
        end = peak if scheduled.end is None else scheduled.end
        levels = Levels(float(start), float(peak), float(end))
        for name, level in levels._asdict().items():
            self._checked(name, level)
        # No lead: nothing is lost in a first update at the very first value.
        course = divide(scheduled, levels, run.settings.length, lead=False)
        if scheduled.shape == "step":
            for position in _edges(course, run):
                self._checked("gamma", course.value(position))
        return course

    def _checked(self, name: str, value: float) -> None:
        try:
            self._check_value(self._rounded(value))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _check_value(self, value: float) -> None:
        if self.attribute.validator is not None:
            try:
                self.attribute.validator(self.plugin, self.attribute, value)
            except (ValueError, TypeError) as error:
                text = re.sub(r"^'\w+' ", "", str((*error.args, error)[0]))
                raise ValueError(f"{self.setting} {text}") from None

    def _check_use(self, hooks: set[str]) -> None:
        """Raise ``ValueError`` for what has no effect once the run has begun."""
        name = self.metric.partition("/")[2].partition(".")[0]
        changeable = getattr(type(self.plugin), "changeable", None)
        if self.optimizes and self.setting == "lr":
            raise ValueError("the learning rate follows the plugin lr_schedule")
        if self.optimizes and self.setting == "weight_decay" and not self.base:
            raise ValueError(
                f"{name}.weight_decay is 0, so nothing is decayed; state another value there, "
                f"and 0 as start here if that is what is meant"
            )
        if changeable is not None and self.setting not in changeable:
            known = f"what can change there: {', '.join(changeable)}" if changeable else ""
            raise ValueError("is read at the start only" + (known and f"; {known}"))
        if hooks <= _OUTSIDE and not (self.cuts_data or self.optimizes):
            raise ValueError(f"{name} does nothing during the steps that could follow a schedule")

    def _rounded(self, value: float) -> float:
        return self.multiple * math.floor(value / self.multiple + 0.5) if self.whole else value

    def _of(self, group: dict[str, Any]) -> Any:
        key, part = _PARTS.get(self.setting, (self.setting, None))
        value = group.get(key)
        return value if part is None or value is None else value[part]

    def _put(self, group: dict[str, Any], value: float) -> None:
        key, part = _PARTS.get(self.setting, (self.setting, None))
        if part is None:
            group[key] = value
        else:
            group[key] = tuple(value if i == part else old for i, old in enumerate(group[key]))


def _check_rivals(run: Run, schedules: Schedules, plugin: str, setting: str) -> None:
    for name, other in run.plugins.items():
        rival = type(other) is type(schedules) and other is not schedules
        if rival and setting in other.of.get(plugin, {}):
            raise ValueError(f"follows a schedule of {name}, too; only one can set it")


def _named(known: Any, name: str, otherwise: str) -> Any:
    """Return what goes by a name; raise ``ValueError`` with the name that comes close to it."""
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    names = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
    raise ValueError(f"{name!r} {otherwise} ({names})")


def _is_whole(kind: Any) -> bool:
    """Whether a setting of this type is a whole number; raise ``ValueError`` if it is no number."""
    union = get_origin(kind) in (Union, types.UnionType)
    members = {one for one in (get_args(kind) if union else (kind,)) if one is not types.NoneType}
    if members not in ({int}, {float}):
        raise ValueError("is no number")
    return members == {int}


def _edges(course: Course, run: Run) -> Iterator[float]:
    """Yield the positions where a value may be the largest or smallest of a course."""
    yield from (part.until for part in course.parts if part.until < math.inf)
    unit, end = count(run.settings.length)
    if unit == course.unit:
        yield end - (unit == "steps")
