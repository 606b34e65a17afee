"""What is frozen, until when, and what becomes of it as the run goes on."""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import attrs

from fundamentallm import SettingsError
from fundamentallm_freeze.names import parameter_names, unmatched

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from fundamentallm import Period, Run
    from fundamentallm_freeze import Freeze

log = logging.getLogger("fundamentallm")


@attrs.define
class Freezing:
    """The frozen parameters by name, each with the periods that end it: the first that comes."""

    name: str
    until: dict[str, list[Period]]
    eval_mode: bool
    _modules: list[nn.Module] = attrs.field(factory=list)

    def check(self, run: Run) -> None:
        """Raise ``SettingsError`` if something could not be trained once it is unfrozen."""
        waiting = [name for name, periods in self.until.items() if periods]
        if waiting and run.world_size > 1:
            raise SettingsError(
                f"{self.name}.unfreeze: takes one process; with {run.world_size}, the gradients of "
                f"what is frozen at the start are never averaged over them"
            )
        held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        parameters = dict(run.model.named_parameters())
        lost = [name for name in waiting if id(parameters[name]) not in held]
        if lost:
            raise SettingsError(
                f"{self.name}.unfreeze: the optimizer was made without {lost[0]!r}, so it would "
                f"never be trained; use an optimizer that takes frozen parameters, too"
            )

    def follow(self, run: Run) -> list[Period]:
        """Freeze and unfreeze as the run's progress demands; return the periods still to come."""
        parameters = dict(run.model.named_parameters())
        for name, periods in self.until.items():
            over = any(period.reached(run.progress) for period in periods)
            parameters[name].requires_grad_(over)
        sizes = [(p.numel(), p.requires_grad) for p in parameters.values()]
        frozen, total = sum(n for n, on in sizes if not on), sum(n for n, _ in sizes)
        share = f"{frozen:,} of {total:,} weights"
        log.info("%s: from step %d on, %s are frozen", self.name, run.progress.step + 1, share)
        if self.eval_mode:
            self._set_modes(run.model)
        ends = {period for periods in self.until.values() for period in periods}
        return [period for period in ends if not period.reached(run.progress)]

    def _set_modes(self, model: nn.Module) -> None:
        for module in self._modules:
            module.train(model.training)
        self._modules = [module for module in model.modules() if _is_frozen(module)]
        for module in self._modules:
            module.eval()


def freeze(model: nn.Module, settings: Freeze, name: str) -> Freezing:
    """Freeze the parameters of ``model`` that the settings name; ``name`` is the plugin's.

    A parameter that several modules share matches by any of its names. What is frozen already is
    left alone, now and when it would be unfrozen. Raises ``SettingsError`` if a pattern matches
    nothing, or if nothing is left to train.
    """
    known = parameter_names(model)
    every = [alias for aliases in known.values() for alias in aliases]
    frozen = {
        name: aliases
        for name, aliases in known.items()
        if _matches(aliases, settings.patterns) and not _matches(aliases, settings.except_for)
    }
    held = [alias for aliases in frozen.values() for alias in aliases]
    problems = [
        *unmatched(f"{name}.patterns", settings.patterns, every),
        *unmatched(f"{name}.except_for", settings.except_for, every),
        *unmatched(f"{name}.unfreeze", settings.unfreeze, held, "frozen "),
    ]
    if problems:
        raise SettingsError(problems)
    parameters = dict(model.named_parameters())
    until = {
        name: [p for glob, p in settings.unfreeze.items() if _matches(aliases, [glob])]
        for name, aliases in frozen.items()
        if parameters[name].requires_grad
    }
    for frozen_name in until:
        parameters[frozen_name].requires_grad_(False)  # noqa: FBT003 - it takes no keyword in torch's stub
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise SettingsError(f"{name}.patterns: nothing is left to train; except_for keeps some")
    return Freezing(name, until, settings.eval_mode)


def _matches(names: Iterable[str], globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
