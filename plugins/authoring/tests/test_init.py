"""The settings file that ``init`` writes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fundamentallm import SettingsError, compose, find_plugins, setting_fields
from fundamentallm_authoring.cli import init
from fundamentallm_authoring.sheet import sheet, toml


def composed(text: str, everything: type, samples: Path, folder: Path) -> dict[str, object]:
    """Compose a sheet for ``Everything``, with a tiny model and the plugin's file in its folder."""
    names = f'"{samples}/tiny.py", "{samples}/everything.py"'
    (folder / "my.toml").write_text(text.replace('"everything",', names))
    made = compose(folder / "my.toml").plugins["everything"]
    return {name: getattr(made, name) for name in setting_fields(everything)}


def test_a_file_as_written_has_every_default(
    everything: type, samples: Path, tmp_path: Path
) -> None:
    written = composed(sheet({"everything": everything}, "x.toml"), everything, samples, tmp_path)
    default = everything(count=1)
    assert written == {name: getattr(default, name) for name in setting_fields(everything)}


def test_every_line_that_is_commented_out_may_be_uncommented(
    everything: type, samples: Path, tmp_path: Path
) -> None:
    text = sheet({"everything": everything}, "x.toml")
    keys = re.findall(r"^#(\w+) = ", text, re.MULTILINE)
    assert set(setting_fields(everything)) - {"count"} <= set(keys)
    for key in keys:
        uncommented = re.sub(rf"^#({key} = )", r"\1", text, flags=re.MULTILINE)
        if key not in ("name", "code"):  # an example that fits a pattern cannot be made up
            composed(uncommented, everything, samples, tmp_path)


def test_the_settings_file_has_the_meaning_of_every_setting(everything: type) -> None:
    text = sheet({"everything": everything}, "x.toml")
    assert "# How many. (int, ≥ 1, ≤ 9, required; this is an example)\ncount = 1\n" in text
    assert "# How much. (float, > 0, < 1)\n#share = 0.5\n" in text
    assert "# - width: How wide. (int, ≥ 1, required; this is an example)\n" in text
    assert '# How often. (period, unset by default)\n#every = "100 steps"\n' in text


def test_the_settings_file_of_every_installed_plugin_lacks_only_other_plugins(
    tmp_path: Path,
) -> None:
    for name in find_plugins():
        file = tmp_path / f"{name}.toml"
        done = CliRunner().invoke(init, [str(file), "--plugins", name])
        assert done.exit_code == 0, (name, done.exception)
        said = done.output.partition("Before you can train with it, correct:")[2].split("\n")
        others = [
            line
            for line in said
            if line
            and not re.search("plugins: no (data|model|optimizer): list one of", line)
            # Of which settings of which plugins cannot be made up.
            and "schedules.of: is empty" not in line
        ]
        assert not others, (name, others)


def test_settings_that_the_constructor_of_a_plugin_requires_are_in_the_file(
    tmp_path: Path, samples: Path
) -> None:
    (tmp_path / "asks.py").write_text(
        "from fundamentallm import hookimpl, plugin\n"
        "@plugin\nclass Asks:\n"
        "    '''Asks.'''\n"
        "    one: int | None = None\n    other: int | None = None\n"
        "    def __attrs_post_init__(self):\n"
        "        if self.one is None and self.other is None:\n"
        "            raise ValueError('one: is missing; state one or other')\n"
        "    @hookimpl\n    def on_train_start(self): ...\n"
    )
    listed = {"plugins": [str(tmp_path / "asks.py"), str(samples / "tiny.py")]}
    cls = type(compose(listed | {"run": {"length": 1}, "asks": {"one": 1}}).plugins["asks"])
    assert "\none = 1\n" in sheet({"asks": cls}, "x.toml")
    assert "\n#other = 1\n" in sheet({"asks": cls}, "x.toml")


def test_an_existing_file_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("mine")
    done = CliRunner().invoke(init, [str(file)])
    assert isinstance(done.exception, SettingsError)
    assert "exists already" in str(done.exception)
    assert file.read_text() == "mine"


def test_an_unknown_plugin_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    done = CliRunner().invoke(init, [str(file), "--plugins", "no_such_plugin"])
    assert "no installed plugin is named 'no_such_plugin'" in str(done.exception)
    assert not file.exists()


TEXT = st.text(max_size=4)
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(VALUES)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_is_the_same_after_toml_and_back(value: object) -> None:
    assert tomllib.loads(f"x = {toml(value)}") == {"x": value}
