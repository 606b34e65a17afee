"""Composing a run: plugins are found, built and checked; every mistake is reported at the start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fundamentallm import (
    Composed,
    Provenance,
    SettingsError,
    compose,
    find_plugins,
    hookimpl,
    order,
    plugin,
    role_of,
    train,
)

PRELUDE = """
from __future__ import annotations
from pathlib import Path
from typing import Literal
from fundamentallm import Period, field, ge, hookimpl, plugin, state
"""
PARTS = """
@plugin
class Parts:
    "What a run cannot do without."
    has_epochs = {has_epochs}
    @hookimpl
    def build_data(self): ...
    @hookimpl
    def build_model(self): ...
    @hookimpl
    def build_optimizer(self): ...
"""
RUN = {"length": 1}


@pytest.fixture(autouse=True)
def _nothing_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide what happens to be installed here, and begin in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path))  # which also puts the path back in the end
    sys.path[:] = [path for path in sys.path if "site-packages" not in path]


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """Install a distribution of one module: its name, its code, and its entry points."""
    modules: list[str] = []

    def install(distribution: str, code: str, **entries: str) -> None:
        module = distribution.replace("-", "_")
        folder = tmp_path / distribution
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        lines = [f"{name} = {module}:{target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[fundamentallm]", *lines]))
        (folder / f"{module}.py").write_text(PRELUDE + code)
        monkeypatch.syspath_prepend(str(folder))
        modules.append(module)

    yield install
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def parts(install: Install) -> None:
    """An installed plugin ``parts`` that answers all that must be answered."""
    install("acme-parts", PARTS.format(has_epochs=True), parts="Parts")


def problems(settings: Any, **more: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        compose(settings, **more)
    return caught.value.problems


def listed(*names: str, **tables: Any) -> dict[str, Any]:
    return {"plugins": list(names), "run": RUN, **tables}


def written(path: str | Path, text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def hooks(name: str, *defs: str, body: str = "") -> str:
    """The code of a plugin class with some hooks, each as ``name(arguments)``."""
    methods = [f"    @hookimpl\n    def {one}: ..." for one in defs]
    return "\n".join([f'@plugin\nclass {name}:\n    "A plugin."\n', body, *methods, ""])


# ---------------------------------------------------------------------------------------------
# The list


@pytest.mark.usefixtures("parts")
def test_the_listed_plugins_are_built_from_their_tables_in_list_order(install: Install) -> None:
    code = hooks("One", "on_log(self)", body="    size: int = 1")
    install("acme-one", code + hooks("Two", "on_log(self)"), one="One", two="Two")
    composed = compose(listed("two", "parts", "one", one={"size": 3}))
    assert list(composed.plugins) == ["two", "parts", "one"]
    assert composed.plugins["one"].size == 3
    assert {name: str(who) for name, who in composed.brought.items()} == {
        "two": "acme-one 1.0",
        "parts": "acme-parts 1.0",
        "one": "acme-one 1.0",
    }


@pytest.mark.usefixtures("parts")
def test_nothing_that_is_not_listed_is_imported(install: Install) -> None:
    install("acme-rude", "raise SystemExit('imported')", rude="Rude")
    compose(listed("parts"))
    assert "rude" in find_plugins()
    assert "acme_rude" not in sys.modules


@pytest.mark.usefixtures("parts")
def test_a_second_instance_has_a_name_and_a_table_of_its_own(install: Install) -> None:
    install("acme-saver", hooks("Saver", "on_log(self)", body="    keep: int = 1"), saver="Saver")
    settings = listed(
        "parts", "saver", "archive", archive={"plugin": "saver", "keep": 9}, saver={"keep": 2}
    )
    composed = compose(settings)
    assert {name: composed.plugins[name].keep for name in ("saver", "archive")} == {
        "saver": 2,
        "archive": 9,
    }
    assert composed.brought["archive"] == Provenance("distribution", "acme-saver", "1.0")
    assert composed.tables["archive"] == {"plugin": "saver", "keep": 9}
    assert compose(composed.tables).tables == composed.tables


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("savr", "archive.plugin: no installed plugin is named 'savr' (did you mean 'saver'?)"),
        (5, "archive.plugin: no installed plugin is named '5'"),
        (
            ["saver"],
            "archive.plugin: no installed plugin is named \"['saver']\" (did you mean 'saver'?)",
        ),
    ],
)
@pytest.mark.usefixtures("parts")
def test_a_second_instance_of_an_unknown_plugin_is_an_error(
    install: Install, value: Any, complaint: str
) -> None:
    install("acme-saver", hooks("Saver", "on_log(self)"), saver="Saver")
    (problem,) = problems(listed("parts", "archive", archive={"plugin": value}))
    assert problem.startswith(f"settings: {complaint}")


@pytest.mark.usefixtures("parts")
def test_a_plugin_that_is_listed_twice_is_an_error(install: Install) -> None:
    install("acme-saver", hooks("Saver", "on_log(self)"), saver="Saver")
    assert problems(listed("parts", "saver", "saver")) == [
        "settings: plugins: 'saver' is listed twice, or a name of the core's"
    ]


@pytest.mark.usefixtures("parts")
def test_two_local_files_of_one_name_are_an_error() -> None:
    for folder in ("a", "b"):
        written(f"{folder}/same.py", PRELUDE + hooks("Same", "on_log(self)"))
    assert problems(listed("parts", "a/same.py", "b/same.py")) == [
        "settings: plugins: 'same' is listed twice, or a name of the core's"
    ]


@pytest.mark.parametrize("name", ["run", "plugins", "extends", "core"])
@pytest.mark.usefixtures("parts")
def test_no_plugin_has_a_name_of_the_cores(install: Install, name: str) -> None:
    install("acme-odd", hooks("Odd", "on_log(self)"), **{name: "Odd"})
    found = problems({"plugins": ["parts", name]} | ({"run": RUN} if name != "plugins" else {}))
    assert f"settings: plugins: '{name}' is listed twice, or a name of the core's" in found


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("parts", 'expected a list of plugin names, got "parts"'),
        (["parts", 5], 'expected a list of plugin names, got ["parts", 5]'),
    ],
)
@pytest.mark.usefixtures("parts")
def test_a_wrong_plugins_list_is_reported_without_errors_that_follow_from_it(
    value: Any, complaint: str
) -> None:
    assert problems({"plugins": value, "run": RUN}) == [f"settings: plugins: {complaint}"]


# ---------------------------------------------------------------------------------------------
# Finding


def test_a_missing_first_party_plugin_names_what_to_install() -> None:
    assert (
        "settings: plugins: no installed plugin is named 'gpt': pip install fundamentallm-gpt"
        in problems(listed("gpt"))
    )
    assert "pip install fundamentallm-optimizers" in problems(listed("adamw"))[0]


def test_every_distribution_that_an_error_advises_to_install_is_in_this_repository() -> None:
    import tomli

    import fundamentallm

    core = Path(fundamentallm.__file__).parent
    plugins = tomli.loads((core / "first_party.toml").read_text())["plugins"]
    for name, facts in plugins.items():
        distribution = facts["distribution"]
        folder = (
            core.parent / "plugins" / distribution.removeprefix("fundamentallm-").replace("-", "_")
        )
        project = tomli.loads((folder / "pyproject.toml").read_text())["project"]
        assert project["name"] == distribution
        assert name in project["entry-points"]["fundamentallm"]


def test_no_distribution_is_invented_for_an_unknown_plugin() -> None:
    (problem,) = problems(listed("comet"))
    assert problem.startswith("settings: plugins: no installed plugin is named 'comet'")
    assert "pip install" not in problem


def test_a_typing_error_in_a_plugin_name_is_answered_by_the_name_that_was_meant(
    install: Install,
) -> None:
    install("acme-noise", hooks("Noise", "on_log(self)"), noise="Noise")
    assert problems(listed("nosie"))[0].endswith("named 'nosie' (did you mean 'noise'?)")
    assert problems(listed("grad_clpi"))[0].endswith("(did you mean 'grad_clip'?)")


@pytest.mark.usefixtures("parts")
def test_two_distributions_that_offer_one_name_are_both_named(install: Install) -> None:
    install("acme-noise", hooks("Noise", "on_log(self)"), noise="Noise")
    install("other-noise", hooks("Noise", "on_log(self)"), noise="Noise")
    (problem,) = problems(listed("parts", "noise"))
    assert problem.startswith("settings: plugins: plugin 'noise' is offered by ")
    assert "acme-noise" in problem
    assert "other-noise" in problem
    compose(listed("parts"))  # which is no error for a run that does not list it


@pytest.mark.parametrize(
    ("code", "entry", "said"),
    [
        ("raise RuntimeError('no such luck')", "Noise", "RuntimeError: no such luck"),
        ("import no_such_module", "Noise", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def (", "Noise", "SyntaxError: invalid syntax (acme_noise.py, line 6)"),
        ("", "Noise", "AttributeError: module 'acme_noise' has no attribute 'Noise'"),
    ],
)
@pytest.mark.usefixtures("parts")
def test_an_installed_plugin_that_cannot_be_loaded_is_reported_with_its_distribution(
    install: Install, code: str, entry: str, said: str
) -> None:
    install("acme-noise", code, noise=entry)
    (problem,) = problems(listed("parts", "noise"))
    assert problem.startswith("settings: plugins: noise (acme-noise 1.0) cannot be loaded: ")
    assert problem.endswith(said)


@pytest.mark.parametrize(
    ("code", "entry", "said"),
    [
        ("class Noise: ...", "Noise", "class Noise is not marked with @plugin"),
        ("noise = 5", "noise", "5 is not marked with @plugin"),
        (
            "@plugin\nclass Noise: ...",
            "Noise",
            "class Noise has no method that is marked with @hookimpl",
        ),
    ],
)
@pytest.mark.usefixtures("parts")
def test_an_entry_point_without_a_marked_class_is_named_with_the_mark_that_it_lacks(
    install: Install, code: str, entry: str, said: str
) -> None:
    install("acme-noise", code, noise=entry)
    assert problems(listed("parts", "noise")) == [
        f"settings: plugins: noise (acme-noise 1.0): {said}"
    ]


@pytest.mark.usefixtures("parts")
def test_a_missing_plugin_of_a_recorded_run_names_its_version_and_how_to_leave_it_out() -> None:
    folder = Path("runs/base")
    facts = {"beeper": {"kind": "distribution", "name": "acme-beeper", "version": "0.1.0"}}
    written(folder / "environment.json", json.dumps({"plugins": facts}))
    path = written(folder / "settings.toml", "plugins = ['parts', 'beeper']\nrun.length = 1\n")
    assert problems(path) == [
        (
            f"{path}:1: plugins: no installed plugin is named 'beeper': "
            "pip install acme-beeper==0.1.0, or leave it out: --no-plugin beeper"
        )
    ]
    compose(path, remove=["beeper"])


@pytest.mark.parametrize("record", ["", "[]", '{"plugins": 5}', '{"plugins": {"beeper": [1]}}'])
@pytest.mark.usefixtures("parts")
def test_a_damaged_record_of_a_run_gives_no_advice_and_no_error(record: str) -> None:
    written("runs/base/environment.json", record)
    path = written("runs/base/settings.toml", "plugins = ['parts', 'beeper']\nrun.length = 1\n")
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:1: plugins: no installed plugin is named 'beeper'")


# ---------------------------------------------------------------------------------------------
# Local files

LOCAL = PRELUDE + hooks("MyPlugin", "on_log(self)", body="    size: int = 1")


@pytest.mark.usefixtures("parts")
def test_a_local_file_next_to_the_settings_is_a_plugin_named_by_its_stem() -> None:
    written("sub/my_plugin.py", LOCAL)
    path = written(
        "sub/run.toml",
        "plugins = ['parts', './my_plugin.py']\nrun.length = 1\nmy_plugin.size = 5\n",
    )
    composed = compose(path)
    assert composed.plugins["my_plugin"].size == 5
    assert composed.brought["my_plugin"] == Provenance("file", str(Path.cwd() / "sub/my_plugin.py"))


@pytest.mark.usefixtures("parts")
def test_a_local_file_is_relative_to_the_file_that_lists_it() -> None:
    written("far/my_plugin.py", LOCAL)
    written("far/base.toml", "plugins = ['parts', 'my_plugin.py']\nrun.length = 1\n")
    composed = compose(written("near/run.toml", "extends = '../far/base.toml'\n"))
    assert composed.brought["my_plugin"].name.endswith("/far/my_plugin.py")


@pytest.mark.usefixtures("parts")
def test_a_local_file_is_found_again_from_the_recorded_settings() -> None:
    import tomli_w

    written("sub/my_plugin.py", LOCAL)
    path = written("sub/run.toml", "plugins = ['parts', './my_plugin.py']\nrun.length = 1\n")
    recorded = written("runs/x/settings.toml", tomli_w.dumps(compose(path).tables))
    assert compose(recorded).tables == compose(path).tables


@pytest.mark.usefixtures("parts")
def test_several_plugins_in_one_file_are_distinguished_by_the_name_of_the_file() -> None:
    other = hooks("Other", "on_log(self)")
    written("my_plugin.py", LOCAL + other)
    assert (
        type(compose(listed("parts", "my_plugin.py")).plugins["my_plugin"]).__name__ == "MyPlugin"
    )
    written("third.py", LOCAL + other)
    (problem,) = problems(listed("parts", "third.py"))
    assert problem == (
        f"settings: plugins: third ({Path.cwd()}/third.py): the file has several plugins "
        "(MyPlugin, Other), and none of them is named like the file"
    )


@pytest.mark.usefixtures("parts")
def test_a_plugin_that_a_local_file_imports_is_not_a_plugin_of_that_file() -> None:
    written("mine.py", LOCAL + "from acme_parts import Parts\n")
    assert type(compose(listed("parts", "mine.py")).plugins["mine"]).__name__ == "MyPlugin"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def (", "SyntaxError: invalid syntax (bad.py, line 1)"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
@pytest.mark.usefixtures("parts")
def test_a_local_file_that_cannot_be_loaded_is_an_error(code: str, said: str) -> None:
    written("bad.py", code)
    (problem,) = problems(listed("parts", "bad.py"))
    assert problem.startswith(f"settings: plugins: bad ({Path.cwd()}/bad.py) cannot be loaded: ")
    assert problem.endswith(said)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "",
            (
                "the file has no plugin: expected a class marked with @plugin, with methods marked "
                "with @hookimpl"
            ),
        ),
        (
            PRELUDE + "class Bad:\n    @hookimpl\n    def on_log(self): ...\n",
            "class Bad is not marked with @plugin",
        ),
        (
            PRELUDE + "@plugin\nclass Bad:\n    def on_log(self): ...\n",
            "class Bad has no method that is marked with @hookimpl",
        ),
    ],
)
@pytest.mark.usefixtures("parts")
def test_a_local_file_without_a_marked_class_is_named_with_the_mark_that_it_lacks(
    code: str, said: str
) -> None:
    written("bad.py", code)
    assert problems(listed("parts", "bad.py")) == [
        f"settings: plugins: bad ({Path.cwd()}/bad.py): {said}"
    ]


@pytest.mark.usefixtures("parts")
def test_a_missing_local_file_is_an_error() -> None:
    (problem,) = problems(listed("parts", "gone.py"))
    assert problem.startswith(
        f"settings: plugins: gone ({Path.cwd()}/gone.py) cannot be loaded: FileNotFound"
    )


# ---------------------------------------------------------------------------------------------
# Changing the list from outside


@pytest.mark.usefixtures("parts")
def test_plugins_are_added_and_removed_from_outside(install: Install) -> None:
    code = hooks("One", "on_log(self)", body="    size: int") + hooks("Two", "on_log(self)")
    install("acme-one", code, one="One", two="Two")
    written("mine.py", PRELUDE + hooks("Mine", "on_log(self)"))
    path = written(
        "sub/run.toml", "plugins = ['parts', 'one']\nrun.length = 1\none.size = 'wrong'\n"
    )
    composed = compose(path, add=["two", "mine.py"], remove=["one"])
    assert list(composed.plugins) == ["parts", "two", "mine"]
    assert composed.tables["plugins"] == ["parts", "two", str(Path.cwd() / "mine.py")]
    assert "one" not in composed.tables


@pytest.mark.usefixtures("parts")
def test_removing_a_plugin_that_is_not_listed_is_an_error() -> None:
    (problem,) = problems(listed("parts"), remove=["part"])
    assert problem == "settings: plugins: 'part' is not listed (did you mean 'parts'?)"


@pytest.mark.usefixtures("parts")
def test_adding_a_plugin_that_is_listed_already_is_an_error() -> None:
    (problem,) = problems(listed("parts"), add=["parts"])
    assert problem.startswith("settings: plugins: 'parts' is listed twice")


# ---------------------------------------------------------------------------------------------
# Objects


@plugin
class Watch:
    """Implements a hook."""

    size: int = 1

    @hookimpl
    def on_log(self) -> None: ...


@pytest.mark.usefixtures("parts")
def test_an_object_takes_part_under_the_name_of_its_class() -> None:
    watch = Watch(size=3)
    composed = compose(listed("parts"), plugins=[watch])
    assert composed.plugins["watch"] is watch
    assert composed.tables["watch"] == {"size": 3}


@pytest.mark.usefixtures("parts")
def test_two_objects_of_one_name_are_an_error() -> None:
    (problem,) = problems(listed("parts"), plugins=[Watch(), Watch()])
    assert problem.endswith("cannot be added: the name 'watch' is taken")


class Bare:
    @hookimpl
    def on_log(self) -> None: ...


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Watch, "Watch is a class: give an object of it, Watch(...)"),
        (Bare, "Bare is a class: give an object of it, Bare(...)"),
        ("watch", "'watch' is no plugin: its class str is not marked with @plugin"),
        (None, "None is no plugin: its class NoneType is not marked with @plugin"),
    ],
)
@pytest.mark.usefixtures("parts")
def test_an_object_that_is_no_plugin_is_reported_with_the_reason(wrong: Any, said: str) -> None:
    assert problems(listed("parts"), plugins=[wrong]) == [f"settings: plugins: {said}"]


def test_an_object_of_a_class_without_the_mark_is_named_with_its_class() -> None:
    (problem,) = problems(listed(), plugins=[Bare()])
    assert problem.endswith("is no plugin: its class Bare is not marked with @plugin")


# ---------------------------------------------------------------------------------------------
# Tables


@pytest.mark.usefixtures("parts")
def test_a_table_without_a_plugin_is_reported_with_the_table_that_was_meant(
    install: Install,
) -> None:
    install("acme-noise", hooks("Noise", "on_log(self)"), noise="Noise")
    settings = listed("parts", "noise", nosie={"x": 1}, lenght=5)
    assert problems(settings) == [
        "settings: nosie: unknown table (did you mean 'noise'?)",
        "settings: lenght: unknown setting (known: noise, parts, plugins, run)",
    ]


@pytest.mark.usefixtures("parts")
def test_a_table_of_an_installed_plugin_that_is_not_listed_is_an_error(install: Install) -> None:
    install("acme-noise", hooks("Noise", "on_log(self)"), noise="Noise")
    message = "has a table here, but is not in the plugins list"
    settings = listed("parts", noise={}, archive={"plugin": "noise"})
    assert problems(settings) == [f"settings: noise: {message}", f"settings: archive: {message}"]


@pytest.mark.usefixtures("parts")
def test_a_table_taken_over_from_another_file_may_stay_without_its_plugin() -> None:
    tables = "[mlflow]\nexperiment = 'x'\n[archive]\nplugin = 'checkpoint'\n"
    written("base.toml", "plugins = ['parts', 'mlflow', 'archive']\n" + tables)
    path = written("run.toml", "extends = 'base.toml'\nplugins = ['parts']\nrun.length = 1\n")
    compose(path)
    (problem,) = problems(path, overrides=["mlflow.tags={}"])
    assert problem == "--set: mlflow: has a table here, but is not in the plugins list"


@pytest.mark.usefixtures("parts")
def test_a_misspelt_table_is_reported_also_if_another_file_extends_it() -> None:
    written("base.toml", "plugins = ['parts']\n[prats]\nx = 1\n")
    path = written("run.toml", "extends = 'base.toml'\nrun.length = 1\n")
    (problem,) = problems(path)
    assert problem == "base.toml:2: prats: unknown table (did you mean 'parts'?)"


@pytest.mark.usefixtures("parts")
def test_a_local_file_may_have_a_second_instance() -> None:
    written("mine.py", PRELUDE + hooks("Mine", "on_log(self)"))
    path = written(
        "run.toml",
        "plugins = ['parts', './mine.py', 'other']\nrun.length = 1\n"
        "[other]\nplugin = './mine.py'\n",
    )
    composed = compose(path)
    assert type(composed.plugins["other"]).__name__ == "Mine"
    assert composed.plugins["other"] is not composed.plugins["mine"]
    written("again.toml", tomli_w.dumps(composed.tables))
    assert list(compose("again.toml").plugins) == ["parts", "mine", "other"]


# ---------------------------------------------------------------------------------------------
# Hooks


@pytest.mark.usefixtures("parts")
def test_two_answers_to_an_exclusive_hook_are_reported_with_both_distributions(
    install: Install,
) -> None:
    install("acme-one", hooks("One", "forward(self, run, batch)"), one="One")
    install("acme-two", hooks("Two", "forward(self)"), two="Two")
    assert problems(listed("parts", "one", "two")) == [
        (
            "settings: plugins: forward: one (acme-one 1.0) and two (acme-two 1.0) both answer, "
            "but only one can"
        )
    ]


@pytest.mark.usefixtures("parts")
def test_an_instance_may_speak_for_all_instances_of_its_class(install: Install) -> None:
    body = '    speaks_for_all = ("read_checkpoint",)'
    install("acme-one", hooks("Saver", "read_checkpoint(self)", body=body), saver="Saver")
    install("acme-two", hooks("Other", "read_checkpoint(self)", body=body), other="Other")
    compose(listed("parts", "saver", "archive", archive={"plugin": "saver"}))
    (problem,) = problems(listed("parts", "saver", "other"))
    assert "both answer" in problem, "it speaks for its own class alone"
    install("acme-mute", hooks("Mute", "read_checkpoint(self)"), mute="Mute")
    (problem,) = problems(listed("parts", "mute", "second", second={"plugin": "mute"}))
    assert "both answer" in problem, "and only where it says so"


@pytest.mark.usefixtures("parts")
def test_a_run_without_data_model_or_optimizer_says_which_plugins_bring_one(
    install: Install,
) -> None:
    path = written("run.toml", "\nplugins = []\nrun.length = 1\n")
    assert problems(path) == [
        "run.toml:2: plugins: no data: list one of text, or a plugin that answers build_data",
        "run.toml:2: plugins: no model: list one of gpt, or a plugin that answers build_model",
        (
            "run.toml:2: plugins: no optimizer: list one of adafactor, adam, adamw, muon, sgd, "
            "or a plugin that answers build_optimizer"
        ),
    ]
    install("acme-data", hooks("Data", "build_data(self)"), data="Data")
    with pytest.raises(SettingsError) as caught:
        compose(listed("data"))
    assert [(one.kind, one.hook) for one in caught.value.mistakes] == [
        ("required", "build_model"),
        ("required", "build_optimizer"),
    ]


def test_nothing_is_said_to_lack_while_a_plugin_is_missing() -> None:
    assert len(problems(listed("comet"))) == 1


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (hooks("Bad", "on_lgo(self, run)"), "there is no hook 'on_lgo' (did you mean 'on_log'?)"),
        (hooks("Bad", "zzz(self)"), "there is no hook 'zzz'"),
        (
            hooks("Bad", "on_log(self, run, metric)"),
            "on_log has no argument 'metric'; known: run, metrics, validated",
        ),
        (
            hooks("Bad", "on_log(self, **given)"),
            "on_log has no argument 'given'; known: run, metrics, validated",
        ),
        (
            hooks("Bad", "on_log(self, run=None)"),
            "on_log would never get 'run': take it by position and without default",
        ),
        (
            hooks("Bad", "on_log(self, *, run)"),
            "on_log would never get 'run': take it by position and without default",
        ),
        (
            hooks("Bad", "on_log(self)", body="    def on_step_end(self, run): ..."),
            "method on_step_end is named like a hook but lacks @hookimpl",
        ),
        (
            "@plugin\nclass Bad:\n    'Bad.'\n    @hookimpl(wrapper=True)\n    def on_log(self):\n        yield\n",
            "on_log cannot be wrapped: only exclusive hooks can",
        ),
        (
            "@plugin\nclass Bad:\n    'Bad.'\n    @hookimpl(wrapper=True)\n    def forward(self): ...\n",
            "forward: a wrapper, hookimpl(wrapper=True), must yield, and only a wrapper may",
        ),
        (
            "@plugin\nclass Bad:\n    'Bad.'\n    @hookimpl(hookwrapper=True)\n    def forward(self):\n        yield\n",
            "forward: a wrapper, hookimpl(wrapper=True), must yield, and only a wrapper may",
        ),
        (
            "@plugin\nclass Bad:\n    'Bad.'\n    @hookimpl(specname='on_lgo')\n    def log_it(self): ...\n",
            "there is no hook 'on_lgo' (did you mean 'on_log'?)",
        ),
    ],
)
@pytest.mark.usefixtures("parts")
def test_a_class_that_breaks_the_contract_is_reported_with_its_distribution(
    install: Install, code: str, problem: str
) -> None:
    install("acme-bad", code, bad="Bad")
    assert problems(listed("parts", "bad")) == [f"settings: plugins: bad (acme-bad 1.0): {problem}"]


@pytest.mark.usefixtures("parts")
def test_every_mistake_of_a_class_is_reported(install: Install) -> None:
    code = hooks("Bad", "on_lgo(self)", "on_log(self, x, y)", body="    def forward(self): ...")
    install("acme-bad", code, bad="Bad")
    assert [text.partition("): ")[2].split()[0] for text in problems(listed("parts", "bad"))] == [
        "method",
        "there",
        "on_log",
        "on_log",
    ]


@pytest.mark.usefixtures("parts")
def test_wrappers_and_events_take_any_number_of_plugins(install: Install) -> None:
    wrapper = "    @hookimpl(wrapper=True)\n    def forward(self):\n        return (yield)\n"
    for name in ("One", "Two", "Three"):
        install(
            f"acme-{name}",
            hooks(name, "on_log(self)", "judge_step(self)", "lr_factor(self)") + wrapper,
            **{name.lower(): name},
        )
    compose(listed("parts", "one", "two", "three"))


# ---------------------------------------------------------------------------------------------
# Edits and their order


def clip(name: str, **sides: tuple[str, ...]) -> str:
    body = "\n".join(f"    {side} = {names!r}" for side, names in sides.items())
    return hooks(name, "edit_gradients(self)", body=body)


@pytest.mark.usefixtures("parts")
def test_two_edits_of_one_thing_need_an_order_and_the_error_says_how_to_declare_it(
    install: Install,
) -> None:
    install("acme-one", clip("One"), one="One")
    install("acme-two", clip("Two"), two="Two")
    assert problems(listed("parts", "one", "two")) == [
        (
            "settings: plugins: edit_gradients: one (acme-one 1.0) and two (acme-two 1.0) edit the same "
            "thing; one class must declare before or after"
        )
    ]


@pytest.mark.parametrize("names", [("one", "two"), ("two", "one")])
@pytest.mark.parametrize("sides", [("before", "One", "two"), ("after", "Two", "one")])
@pytest.mark.usefixtures("parts")
def test_one_declaration_orders_two_edits_however_they_are_listed(
    install: Install, names: tuple[str, str], sides: tuple[str, str, str]
) -> None:
    side, declaring, other = sides
    for name in ("One", "Two"):
        declared = {side: (other,)} if name == declaring else {}
        install(f"acme-{name}", clip(name, **declared), **{name.lower(): name})
    composed = compose(listed("parts", *names))
    assert order(composed.plugins) == ["parts", "one", "two"]


@pytest.mark.usefixtures("parts")
def test_a_declaration_may_use_the_name_that_a_plugin_is_listed_by(install: Install) -> None:
    # plugin_name(AdaWave) is ada_wave, but its entry point says adawave.
    install("acme-one", clip("AdaWave"), adawave="AdaWave")
    install("acme-two", clip("Two", before=("adawave",)), two="Two")
    install("acme-three", clip("Three", after=("ada_wave", "two")), three="Three")
    composed = compose(listed("three", "adawave", "two", "parts"))
    assert [name for name in order(composed.plugins) if name != "parts"] == [
        "two",
        "adawave",
        "three",
    ]


@pytest.mark.usefixtures("parts")
def test_order_moves_nothing_that_need_not_move(install: Install) -> None:
    code = "".join(hooks(name, "on_log(self)") for name in ("A", "B", "C"))
    install("acme-many", code + clip("D", before=("b",)), a="A", b="B", c="C", d="D")
    assert order(compose(listed("c", "b", "a", "d", "parts")).plugins) == [
        "c",
        "a",
        "d",
        "b",
        "parts",
    ]


@pytest.mark.usefixtures("parts")
def test_a_circle_of_declarations_is_an_error_before_any_plugin_is_made(install: Install) -> None:
    install(
        "acme-many",
        clip("A", before=("b",)) + clip("B", before=("c",)) + clip("C", before=("a",)),
        a="A",
        b="B",
        c="C",
    )
    settings = listed("parts", "a", "b", "c")
    assert problems(settings) == ["before/after of these plugins run in a circle: a, b, c"]
    with pytest.raises(SettingsError):
        train(settings)
    assert list(Path.cwd().iterdir()) == []


# ---------------------------------------------------------------------------------------------
# What plugins need from each other

MONITOR = hooks("Stopper", "on_log(self)", body='    monitor: str | None = "val/loss"')


@pytest.mark.parametrize(
    "metric", ["val/loss", "train/loss", "optim/lr", "optim/grad_norm", "sys/gpu0"]
)
@pytest.mark.usefixtures("parts")
def test_a_monitor_may_name_what_the_core_or_a_listed_plugin_produces(
    install: Install, metric: str
) -> None:
    body = '    produces = ("optim/grad_norm", "sys/gpu*")'
    install(
        "acme-stop", MONITOR + hooks("Norm", "on_log(self)", body=body), stop="Stopper", norm="Norm"
    )
    compose(listed("parts", "stop", "norm", stop={"monitor": metric}))


@pytest.mark.usefixtures("parts")
def test_a_monitor_that_no_plugin_produces_is_reported_with_its_line(install: Install) -> None:
    install("acme-stop", MONITOR, stop="Stopper")
    path = written(
        "run.toml", "plugins = ['parts', 'stop']\nrun.length = 1\n[stop]\nmonitor = 'val/los'\n"
    )
    assert problems(path) == [
        (
            "run.toml:4: stop.monitor: nothing listed produces 'val/los' (did you mean 'val/loss'?); "
            "a plugin names the metrics that it logs in `produces`"
        )
    ]
    assert problems(path, overrides=["stop.monitor=sys/gpu"]) == [
        (
            "--set: stop.monitor: nothing listed produces 'sys/gpu' "
            "(known: optim/lr, train/loss, train/tokens, val/loss); "
            "a plugin names the metrics that it logs in `produces`"
        )
    ]


@pytest.mark.parametrize(("epochs", "mistakes"), [(True, 0), (False, 4)])
def test_periods_in_epochs_need_data_with_epochs(
    install: Install, epochs: bool, mistakes: int
) -> None:
    install("acme-parts", PARTS.format(has_epochs=epochs), parts="Parts")
    body = "    every: Period = Period(1, 'epochs')\n    others: list[Period] = field(factory=list)"
    install("acme-saver", hooks("Saver", "on_log(self)", body=body), saver="Saver")
    text = """
plugins = ["parts", "saver"]
[run]
length = "2 epochs"
log_every = 5
validate_every = "0.5 epochs"
[saver]
others = ["5 steps", "1 epoch"]
"""
    path = written("run.toml", text)
    if not mistakes:
        compose(path)
        return
    assert sorted(problems(path)) == [
        "run.toml:4: run.length: the data has no epochs",
        "run.toml:6: run.validate_every: the data has no epochs",
        "run.toml:7: saver.every: the data has no epochs",
        "run.toml:8: saver.others.1: the data has no epochs",
    ]


def test_whether_data_has_epochs_may_depend_on_its_settings(install: Install) -> None:
    code = PARTS.format(has_epochs='property(lambda self: self.mode == "epochs")')
    install(
        "acme-parts", code + '    mode: Literal["epochs", "random"] = "random"\n', parts="Parts"
    )
    settings = {"plugins": ["parts"], "run": {"length": "1 epoch"}}
    assert problems(settings) == ["settings: run.length: the data has no epochs"]
    compose(settings | {"parts": {"mode": "epochs"}})
    assert len(problems(settings | {"parts": {"mode": "x"}})) == 1, "not known while it is wrong"


# ---------------------------------------------------------------------------------------------
# All mistakes at once

TEN = """
extends = "base.toml"
plugins = ["parts", "text", "stop", "zzz", "one", "two", "typo.py", "stop"]

[run]
lenght = "2000 steps"
validate_every = "250 stpes"
seed = "1337"
device = "gpu"

[text]
path = [
    "a.txt",
]
batch_size = 0

[stop]
monitor = "val/los"

[stopp]
x = 1

[one]
groups = [{decay = 1.5}]
"""
TEN_CODE = """
@plugin
class Text:
    "Text."
    path: Path
    batch_size: int = field(default=8, validator=ge(1))
    @hookimpl
    def on_log(self): ...
"""


@pytest.fixture
def ten(install: Install) -> Path:
    install("acme-parts", PARTS.format(has_epochs=True), parts="Parts")
    install("acme-text", TEN_CODE + MONITOR, text="Text", stop="Stopper")
    install(
        "acme-one",
        hooks("One", "edit_gradients(self)", body="    groups: list[dict[str, int]] = []"),
        one="One",
    )
    install("acme-two", hooks("Two", "edit_gradients(self)", "on_lgo(self)"), two="Two")
    install("acme-noise", hooks("Noise", "on_log(self)"), noise="Noise")
    written("base.toml", "[noise]\nignored = 1\n[run]\nlog_every = 0\n")
    written("typo.py", "import fundamentalm\n")
    return written("run.toml", TEN)


@pytest.mark.usefixtures("ten")
def test_all_mistakes_of_a_file_are_reported_each_with_line_and_suggestion() -> None:
    found = problems("run.toml")
    here = Path.cwd()
    assert sorted(found) == sorted(
        [
            "run.toml:3: plugins: 'stop' is listed twice, or a name of the core's",
            "run.toml:5: run.length: is missing, and has no default",
            "run.toml:6: run.lenght: unknown setting (did you mean 'length'?)",
            "run.toml:7: run.validate_every: unknown unit 'stpes'; known: steps, epochs, tokens, seconds, minutes, hours",
            "base.toml:4: run.log_every: a period is finite and more than zero, not 0",
            'run.toml:8: run.seed: expected a whole number, got "1337"',
            "run.toml:9: run.device: unknown value \"gpu\" (did you mean 'cpu'?)",
            "run.toml:3: plugins: no installed plugin is named 'zzz'",
            f"run.toml:3: plugins: typo ({here}/typo.py) cannot be loaded: {here}/typo.py:1: ModuleNotFoundError: No module named 'fundamentalm'",
            'run.toml:12: text.path: expected a path, got ["a.txt"]',
            "run.toml:15: text.batch_size: must be >= 1: 0",
            (
                "run.toml:18: stop.monitor: nothing listed produces 'val/los' (did you mean 'val/loss'?); "
                "a plugin names the metrics that it logs in `produces`"
            ),
            "run.toml:20: stopp: unknown table (did you mean 'stop'?)",
            "run.toml:24: one.groups.0.decay: expected a whole number, got 1.5",
            (
                "run.toml:3: plugins: edit_gradients: one (acme-one 1.0) and two (acme-two 1.0) edit the same thing; "
                "one class must declare before or after"
            ),
            "run.toml:3: plugins: two (acme-two 1.0): there is no hook 'on_lgo' (did you mean 'on_log'?)",
        ]
    )


def test_an_observer_cannot_vote_for_a_factor():
    @plugin
    class Slows:
        """Watches, and has a say."""

        role = "observer"

        @hookimpl
        def lr_factor(self):
            return 0.5

    with pytest.raises(
        SettingsError, match="lr_factor: a plugin whose role is 'observer' must not answer it"
    ):
        compose({"plugins": [], "run": {"length": 1}}, plugins=[Slows()])


@pytest.mark.usefixtures("ten")
@pytest.mark.parametrize("command", ["train", "show", "hooks"])
def test_on_mistakes_nothing_is_made_and_torch_is_not_imported(command: str) -> None:
    before = sorted(Path.cwd().rglob("*"))
    code = (
        "import sys; from fundamentallm.cli import main\n"
        f"sys.argv = ['fundamentallm', '{command}', 'run.toml']\n"
        "try: main()\n"
        "finally: print('heavy:', *{'torch', 'numpy', 'mlflow'} & set(sys.modules))"
    )
    core = str(Path(sys.modules["fundamentallm"].__file__ or "").parent.parent)
    paths = os.pathsep.join([*sys.path, core])
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == "heavy:\n"
    errors = done.stderr.splitlines()
    assert errors[0].startswith("error: ")
    assert (
        len([line for line in errors if "run.toml:" in line or "base.toml:" in line])
        == len(errors)
        >= 10
    )
    assert "Traceback" not in done.stderr
    assert sorted(Path.cwd().rglob("*")) == before


def test_of_a_plugin_with_wrong_settings_the_hooks_are_checked_all_the_same(
    install: Install,
) -> None:
    install("acme-parts", PARTS.format(has_epochs=True) + "    size: int = 1\n", parts="Parts")
    install(
        "acme-two", hooks("Two", "build_model(self)", body="    produces = ('a/b',)"), two="Two"
    )
    install("acme-stop", MONITOR, stop="Stopper")
    settings = listed(
        "parts", "two", "stop", parts={"size": "x"}, two={"y": 1}, stop={"monitor": "a/b"}
    )
    assert [text.split(": ", 2)[1] for text in problems(settings)] == [
        "parts.size",
        "two.y",
        "plugins",
    ]


def test_composed_says_what_it_holds(install: Install) -> None:
    install("acme-parts", PARTS.format(has_epochs=True), parts="Parts")
    composed = compose(listed("parts"))
    assert isinstance(composed, Composed)
    assert composed.tables["plugins"] == ["parts"]
    assert composed.tables["parts"] == {}


def test_every_first_party_plugin_declares_its_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # what is installed here is what this looks at
    ours = [
        found
        for offers in find_plugins().values()
        for found in offers
        if found.distribution.startswith("fundamentallm-")
    ]
    assert len(ours) >= 30
    for found in ours:
        cls = found.load()
        assert vars(cls).get("role") == role_of(cls), found.name


@pytest.mark.parametrize("role", ["control", "saver", "observer"])
@pytest.mark.parametrize("hook", ["build_model", "forward", "judge_step", "lr_factor"])
def test_a_plugin_that_changes_data_or_weights_cannot_have_a_harmless_role(
    role: str, hook: str
) -> None:
    space = {"role": role, hook: hookimpl(lambda self: None)}
    with pytest.raises(SettingsError, match=f"{hook}: a plugin whose role is '{role}' must not"):
        compose({"plugins": [], "run": RUN}, plugins=[plugin(type("Mine", (), space))()])
