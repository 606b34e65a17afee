"""The contract that every plugin fulfils, as a class of tests to subclass."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fundamentallm import SettingsError, attribute_docs, plugin_name, setting_fields
from fundamentallm.host import Source, build, class_problems, get_state, plain, set_state, structure
from fundamentallm.settings import HOST, hook_methods, role_of
from fundamentallm.testing.processes import Trained, TwoProcesses
from fundamentallm.testing.recorder import Memory, assert_same_weights
from fundamentallm.testing.tiny import TinyRun, tiny_parts

HEAVY = ("torch", "numpy", "mlflow", "matplotlib", "pandas", "tokenizers", "transformers")


class PluginContract:
    """Tests of what every plugin promises. Subclass it in the plugin's suite and set ``plugin``."""

    plugin: ClassVar[type]
    needs: ClassVar[dict[str, Any]] = {}
    """The settings that the plugin needs; ``instance()`` uses them."""
    companions: ClassVar[tuple[Callable[[], object], ...]] = ()
    """Callables that make the other plugins that it needs in a run."""

    wrong_settings: ClassVar[tuple[tuple[dict[str, Any], str], ...]] = ()
    """Tables with a mistake, each with a part of the error that reports it."""

    def instance(self) -> Any:
        """Build the plugin as from a settings file with the settings that it needs."""
        return structure(self.needs, self.plugin)

    def test_importing_it_imports_nothing_heavy(self) -> None:
        assert not set(HEAVY) & imported_by(self.plugin)

    def test_builds_from_an_empty_table_or_names_what_it_needs(self) -> None:
        problems = _problems(self.plugin, {})
        missing = [name for name in self.needs if _required(self.plugin, name)]
        for name in missing:
            assert any(f".{name}: is missing" in text for text in problems), problems
        assert problems or not missing

    def test_builds_from_what_it_needs(self) -> None:
        assert not _problems(self.plugin, self.needs)

    def test_rejects_unknown_settings(self) -> None:
        (problem,) = _problems(self.plugin, {**self.needs, "no_such_setting": 1})
        assert "no_such_setting: unknown setting" in problem

    def test_rejects_a_table_in_place_of_every_setting(self) -> None:
        for name in setting_fields(self.plugin):
            wrong: Any = {"no": {"such": {"thing": []}}}
            problems = _problems(self.plugin, {**self.needs, name: wrong})
            assert any(f".{name}" in text for text in problems), name

    def test_reports_wrong_settings(self) -> None:
        for values, text in self.wrong_settings:
            problems = _problems(self.plugin, values)
            assert any(text in problem for problem in problems), (values, text, problems)

    def test_describes_itself_and_every_setting(self) -> None:
        assert (self.plugin.__doc__ or "").strip()
        assert set(setting_fields(self.plugin)) <= set(attribute_docs(self.plugin))

    def test_its_hooks_are_those_of_the_contract(self) -> None:
        assert list(class_problems(HOST, self.plugin)) == []
        assert list(hook_methods(self.plugin)), "it implements no hook"

    def test_its_settings_survive_a_settings_file(self) -> None:
        written = plain(self.instance())
        assert plain(structure(written, self.plugin)) == written

    def test_its_state_survives_a_checkpoint(self, tiny_run: TinyRun) -> None:
        trained, resumed = self.instance(), self.instance()
        tiny_run(trained, *(make() for make in self.companions))
        kept = get_state(trained)
        set_state(resumed, copy.deepcopy(kept))
        assert _comparable(get_state(resumed)) == _comparable(kept)

    def test_its_place_in_the_list_does_not_matter(self, tiny_run: TinyRun, tmp_path: Path) -> None:
        runs = []
        for place in ("first", "last"):
            others = [make() for make in self.companions]
            listed = [self.instance(), *others] if place == "first" else [*others, self.instance()]
            listed = listed if place == "first" else [*tiny_parts(listed), *listed]
            runs.append(tiny_run(*listed, run_dir=tmp_path / place))
        assert_same_weights(*runs)
        assert runs[0].outcome == runs[1].outcome

    def test_a_role_outside_the_training_changes_no_weights(
        self, tiny_run: TinyRun, tmp_path: Path
    ) -> None:
        if role_of(self.plugin) not in ("control", "saver", "observer"):
            return
        runs = []
        for own in ([], [self.instance()]):
            others = [make() for make in self.companions]
            runs.append(tiny_run(*others, *own, run_dir=tmp_path / str(len(own))))
        if runs[0].progress.step == runs[1].progress.step:  # it may stop a run
            assert_same_weights(*runs)

    def test_a_resumed_run_ends_with_the_same_bits(self, tiny_run: TinyRun) -> None:
        memory = Memory(step=2)
        listed = [self.instance(), *(make() for make in self.companions)]
        if any(hook == "read_checkpoint" for one in listed for hook, *_ in hook_methods(type(one))):
            return  # it brings the checkpoints, and tests them
        whole = tiny_run(*listed, memory)
        again = [self.instance(), *(make() for make in self.companions)]
        assert_same_weights(whole, tiny_run(*again, memory))

    @pytest.mark.parametrize("kind", ["ddp", "fsdp"])
    def test_two_processes_end_alike(self, two_processes: TwoProcesses, kind: str) -> None:
        first, second = self.in_two_processes(two_processes, kind)
        if isinstance(first.error, SettingsError):
            assert isinstance(second.error, SettingsError), second.error
            return  # it says that it works in one process only
        assert first.outcome in ("finished", "stopped"), first.error
        parts = ["outcome", "step", "history", "weights"]
        # An observer may observe in the first process only, whose state a checkpoint has.
        parts += ["states"] if role_of(self.plugin) != "observer" else []
        for part in parts:
            assert _comparable(getattr(first, part)) == _comparable(getattr(second, part))

    def in_two_processes(self, two_processes: TwoProcesses, kind: str) -> list[Trained]:
        """Train a tiny run with the plugin in two processes, and return what each ended with."""
        listed = [make() for make in self.companions]
        if any(hook == "join_processes" for hook, *_ in hook_methods(self.plugin)):
            name = plugin_name(self.plugin)
            return two_processes(*listed, kind=name, settings={name: self.needs})
        return two_processes(self.instance(), *listed, kind=kind)


_IMPORTS = """
import importlib, os, sys
import fundamentallm
for name in sys.argv[1:]:
    if not os.fork():
        importlib.import_module(name)
        print(name, *sys.modules, flush=True)
        os._exit(0)
    os.wait()
"""
_imported: dict[str, set[str]] = {}


def imported_by(plugin: type) -> set[str]:
    """Return the names of the modules that are loaded once the module of a plugin is imported.

    One process imports the modules of all plugins under test, each in a fork of its own: a start of
    Python for each plugin would take longer than the rest of its contract.
    """
    if plugin.__module__ not in _imported:
        names = {plugin.__module__} | {cls.plugin.__module__ for cls in _contracts(PluginContract)}
        words = [sys.executable, "-c", _IMPORTS, *sorted(names - _imported.keys())]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            name, *modules = line.split()
            _imported[name] = set(modules)
        assert plugin.__module__ in _imported, done.stderr
    return _imported[plugin.__module__]


def _contracts(cls: type[PluginContract]) -> Iterator[type[PluginContract]]:
    for subclass in cls.__subclasses__():
        yield from _contracts(subclass)
        if hasattr(subclass, "plugin"):
            yield subclass


def _problems(cls: type, values: Mapping[str, Any]) -> list[str]:
    source = Source(values={"it": dict(values)})
    build(cls, source.values["it"], source, (plugin_name(cls),))
    return list(map(str, source.mistakes))


def _comparable(state: Any) -> str:
    """Write a state out in full; what JSON cannot hold and is no tensor is a mistake."""

    def tensor(value: Any) -> Any:
        return [str(value.dtype), value.tolist()]

    return json.dumps(state, default=tensor, sort_keys=True)


def _required(cls: type, name: str) -> bool:
    import attrs

    return setting_fields(cls)[name].default is attrs.NOTHING
