"""A setting of a plugin that follows a schedule: check it, and set it during the run."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from fundamentallm import (
    HOOKS,
    SettingsError,
    check_setting,
    hook_methods,
    setting_fields,
    suggest,
)
from fundamentallm_lr_schedule.segments import Levels, PiecewiseSchedule, count_period, lay_out

if TYPE_CHECKING:
    from fundamentallm import Run
    from fundamentallm_lr_schedule.schedules import Scheduled, Schedules

# A plugin that has no hooks except these does nothing during steps, so its settings have no effect.
_OUTSIDE = {*HOOKS[: HOOKS.index("on_step_start")], "on_train_end"}
# Settings that PyTorch stores as elements of a tuple.
_TUPLE_SETTINGS = {"beta1": ("betas", 0), "beta2": ("betas", 1)}


def schedule_settings(schedules: Schedules, run: Run) -> list[ScheduledSetting]:
    """Return all scheduled settings of a run; raise ``SettingsError`` with every problem."""
    name = run.name_of(schedules)
    found: list[ScheduledSetting] = []
    problems: list[str] = []
    for plugin, settings in schedules.of.items():
        for setting, scheduled in settings.items():
            key = f"{name}.of.{plugin}.{setting}"
            try:
                _check_rivals(run, schedules, plugin, setting)
                found.append(ScheduledSetting(run, plugin, setting, scheduled))
            except ValueError as error:
                inner = str(error).partition(": ")[0] in setting_fields(type(scheduled))
                problems.append(f"{key}.{error}" if inner else f"{key}: {error}")
    if problems:
        raise SettingsError(problems)
    return found


class ScheduledSetting:
    """A setting and its schedule; ``value`` is its current value, None before the run starts.

    ``cuts_data`` is whether the stream of micro-batches depends on the setting. Raises
    ``ValueError`` if the schedule does not fit the setting.
    """

    def __init__(self, run: Run, plugin: str, setting: str, scheduled: Scheduled) -> None:
        self.plugin, self.setting = _find(run.plugins, plugin, "is no listed plugin"), setting
        hooks = {hook for hook, _, _ in hook_methods(type(self.plugin))}
        self.cuts_data, self.optimizes = "build_data" in hooks, "build_optimizer" in hooks
        fields = setting_fields(type(self.plugin))
        self.attribute = _find(fields, setting, f"is no setting of {plugin}")
        self.base: Any = getattr(self.plugin, setting)
        self.value: Any = None
        self.metric = f"schedules/{plugin}.{setting}"
        self.groups: list[int] = []
        self.integer = _is_integer(self.attribute.type)
        self._check_use(hooks)
        if scheduled.multiple_of is not None and not self.integer:
            raise ValueError("multiple_of: works with integer settings only")
        self.multiple = scheduled.multiple_of or 1
        self.schedule = self._make_schedule(scheduled, run)

    def bind(self, run: Run) -> Iterator[str]:
        """Find the parameter groups to change; yield an error for each problem."""
        key = self.metric.partition("/")[2]
        if self.schedule.unit == "epochs" and run.progress.epoch_samples is None:
            yield f"the schedule of {key} is counted in epochs, but the data source has no epochs"
        if not self.optimizes:
            return
        groups = run.optimizer.param_groups
        self.groups = [i for i, group in enumerate(groups) if self._read(group) == self.base]
        if not self.groups:
            yield (
                f"{key} cannot follow a schedule: no parameter group of {type(run.optimizer)} has "
                f"{self.setting} = {self.base}"
            )

    def update(self, run: Run) -> bool:
        """Set the value for the run's progress; return whether it has changed."""
        schedule = self.schedule
        value = self._rounded(schedule.value(schedule.position(run.progress)))
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
            # Looked up at each change, because loading a state replaces the group dicts.
            self._write(run.optimizer.param_groups[index], value)
        return True

    def _make_schedule(self, scheduled: Scheduled, run: Run) -> PiecewiseSchedule:
        start = self.base if scheduled.start is None else scheduled.start
        if start is None:
            raise ValueError("start: is missing; the table of the plugin has no value")
        peak = start if scheduled.peak is None else scheduled.peak
        end = peak if scheduled.end is None else scheduled.end
        levels = Levels(float(start), float(peak), float(end))
        for name, level in levels._asdict().items():
            self._check_level(name, level)
        # Not from one: the first update should use the first value.
        schedule = lay_out(scheduled, levels, run.settings.length, count_from_one=False)
        if scheduled.shape == "step":
            for position in _extremes(schedule, run):
                self._check_level("gamma", schedule.value(position))
        return schedule

    def _check_level(self, name: str, value: float) -> None:
        try:
            self._check_value(self._rounded(value))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _check_value(self, value: float) -> None:
        try:
            check_setting(self.attribute, value, self.plugin)
        except ValueError as error:
            raise ValueError(f"{self.setting} {error}") from None

    def _check_use(self, hooks: set[str]) -> None:
        """Raise ``ValueError`` for a setting that has no effect during the run."""
        name = self.metric.partition("/")[2].partition(".")[0]
        changeable = getattr(type(self.plugin), "changeable", None)
        if self.optimizes and self.setting == "lr":
            raise ValueError("the learning rate follows the plugin lr_schedule, not schedules")
        if self.optimizes and self.setting == "weight_decay" and not self.base:
            raise ValueError(
                f"{name}.weight_decay is 0, so no parameter group has weight decay; set it to "
                f"another value, and start = 0 here if the schedule should begin at 0"
            )
        if changeable is not None and self.setting not in changeable:
            known = f"settings that may change: {', '.join(changeable)}" if changeable else ""
            raise ValueError("is read only at the start" + (known and f"; {known}"))
        if hooks <= _OUTSIDE and not (self.cuts_data or self.optimizes):
            raise ValueError(f"{name} has no hook during steps, so a schedule has no effect")

    def _rounded(self, value: float) -> float:
        return self.multiple * math.floor(value / self.multiple + 0.5) if self.integer else value

    def _read(self, group: dict[str, Any]) -> Any:
        key, part = _TUPLE_SETTINGS.get(self.setting, (self.setting, None))
        value = group.get(key)
        return value if part is None or value is None else value[part]

    def _write(self, group: dict[str, Any], value: float) -> None:
        key, part = _TUPLE_SETTINGS.get(self.setting, (self.setting, None))
        if part is None:
            group[key] = value
        else:
            group[key] = tuple(value if i == part else old for i, old in enumerate(group[key]))


def _check_rivals(run: Run, schedules: Schedules, plugin: str, setting: str) -> None:
    for name, other in run.plugins.items():
        rival = type(other) is type(schedules) and other is not schedules
        if rival and setting in other.of.get(plugin, {}):
            raise ValueError(f"follows a schedule of {name} too; only one may set it")


def _find(known: Any, name: str, otherwise: str) -> Any:
    """Return the value of a name; raise ``ValueError`` with the closest known name."""
    if name in known:
        return known[name]
    raise ValueError(f"{name!r} {otherwise}{suggest(name, known)}")


def _is_integer(kind: Any) -> bool:
    """Return whether a type is an integer; raise ``ValueError`` if it is not a number."""
    union = get_origin(kind) in (Union, types.UnionType)
    members = {one for one in (get_args(kind) if union else (kind,)) if one is not types.NoneType}
    if members not in ({int}, {float}):
        raise ValueError("is not a number")
    return members == {int}


def _extremes(schedule: PiecewiseSchedule, run: Run) -> Iterator[float]:
    """Yield the positions where the value may be the largest or smallest of the schedule."""
    yield from (segment.until for segment in schedule.segments if segment.until < math.inf)
    unit, end = count_period(run.settings.length)
    if unit == schedule.unit:
        yield end - (unit == "steps")
