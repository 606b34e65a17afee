"""Which parameters are frozen, and until when."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import attrs

from fundamentallm import SettingsError, matches, parameter_names, unmatched

if TYPE_CHECKING:
    from torch import nn

    from fundamentallm import Period, Run
    from fundamentallm_freeze import Freeze

log = logging.getLogger("fundamentallm")


@attrs.define
class FreezeSchedule:
    """The frozen parameters by name, each with the periods that end it; the earliest one counts."""

    plugin: str
    until: dict[str, list[Period]]
    eval_mode: bool
    _in_eval_mode: list[nn.Module] = attrs.field(factory=list)

    def check(self, run: Run) -> None:
        """Raise ``SettingsError`` if a parameter could not be trained once it is unfrozen."""
        temporary = [name for name, periods in self.until.items() if periods]
        if temporary and run.world_size > 1:
            error = SettingsError(
                f"{self.plugin}.unfreeze: works with one process only; with {run.world_size}, the "
                f"gradients of parameters that are frozen at the start are never added"
            )
            error.printed_elsewhere = run.rank > 0  # all processes raise it
            raise error
        optimized = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        parameters = dict(run.model.named_parameters())
        missing = [name for name in temporary if id(parameters[name]) not in optimized]
        if missing:
            raise SettingsError(
                f"{self.plugin}.unfreeze: the optimizer was built without {missing[0]!r} and would "
                f"never train it; use an optimizer that includes frozen parameters"
            )

    def apply(self, run: Run) -> list[Period]:
        """Set ``requires_grad`` and modes for the run's progress; return the periods to come."""
        parameters = dict(run.model.named_parameters())
        for name, periods in self.until.items():
            ended = any(period.reached(run.progress) for period in periods)
            parameters[name].requires_grad_(ended)
        sizes = [(p.numel(), p.requires_grad) for p in parameters.values()]
        frozen, total = sum(n for n, trained in sizes if not trained), sum(n for n, _ in sizes)
        share = f"{frozen:,} of {total:,} weights"
        log.info("%s: from step %d on, %s are frozen", self.plugin, run.progress.step + 1, share)
        if self.eval_mode:
            self._set_modes(run.model)
        distinct = {period for periods in self.until.values() for period in periods}
        return [period for period in distinct if not period.reached(run.progress)]

    def _set_modes(self, model: nn.Module) -> None:
        for module in self._in_eval_mode:
            module.train(model.training)
        self._in_eval_mode = [module for module in model.modules() if _is_frozen(module)]
        for module in self._in_eval_mode:
            module.eval()


def freeze(model: nn.Module, settings: Freeze, plugin: str) -> FreezeSchedule:
    """Freeze the parameters of ``model`` that the settings select.

    ``plugin`` is the instance name that begins errors. A parameter that several modules share
    matches by any of its names. Parameters that are frozen already are never unfrozen. Raises
    ``SettingsError`` if a pattern matches nothing, or if nothing is left to train.
    """
    known = parameter_names(model)
    every = [alias for aliases in known.values() for alias in aliases]
    selected = {
        name: aliases
        for name, aliases in known.items()
        if matches(aliases, settings.patterns) and not matches(aliases, settings.except_for)
    }
    frozen = [alias for aliases in selected.values() for alias in aliases]
    problems = [
        *unmatched(f"{plugin}.patterns", settings.patterns, every),
        *unmatched(f"{plugin}.except_for", settings.except_for, every),
        *unmatched(f"{plugin}.unfreeze", settings.unfreeze, frozen, "frozen parameter"),
    ]
    if problems:
        raise SettingsError(problems)
    parameters = dict(model.named_parameters())
    until = {
        name: [p for pattern, p in settings.unfreeze.items() if matches(aliases, [pattern])]
        for name, aliases in selected.items()
        if parameters[name].requires_grad
    }
    for name in until:
        parameters[name].requires_grad_(False)  # noqa: FBT003 - torch's stub allows no keyword
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise SettingsError(
            f"{plugin}.patterns: nothing is left to train; exclude some parameters by except_for"
        )
    return FreezeSchedule(plugin, until, settings.eval_mode)


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
