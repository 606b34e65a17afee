"""The schema says what the core says."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from fundamentallm import SettingsError, compose, find_plugins, setting_fields
from fundamentallm_authoring.cli import schema
from fundamentallm_authoring.schema import settings_schema

GOOD: dict[str, list[Any]] = {
    "count": [1, 9],
    "share": [0.5],
    "on": [True],
    "word": ["x"],
    "code": ["abba"],
    "place": ["some/where"],
    "mode": ["max", 3],
    "size": [4],
    "every": [5, "2 epochs", "1e9 tokens", "10 minutes", "0.5 hours", "1 step"],
    "either": [2, "b"],
    "limit": [0, 1.5],
    "names": [[], ["a", "b"]],
    "sizes": [[1, 2]],
    "rates": [{}, {"a": 1, "b": 0.5}],
    "part": [{"width": 1}, {"width": 2, "label": "b"}],
    "parts": [[], [{"width": 1}]],
}
# Neither 1.0 for an int nor "1.5 steps": only the core finds these mistakes.
ANY = st.one_of(
    st.booleans(),
    st.integers(-2, 12),
    st.sampled_from([-0.5, 0.25, 1.5]),
    st.sampled_from(["", "a", "ab ", "abc", "min", "3", "0 steps", "5 stepps", "-1 steps", "5"]),
    st.sampled_from([[], ["a", 1], [0], [1.5], [{}], [{"width": 0}], [{"width": 1, "x": 1}]]),
    st.sampled_from([{}, {"a": "b"}, {"width": "1"}, {"label": "x"}, {"width": 1, "x": 1}]),
)
PAIRS = [
    st.tuples(st.just(name), st.one_of(st.sampled_from(good), ANY)) for name, good in GOOD.items()
]
# One or two settings at a time: among many, something would nearly always be wrong.
TABLES = st.lists(st.one_of(PAIRS), max_size=2).map(lambda pairs: {"count": 1, **dict(pairs)})


def core_accepts(values: dict[str, Any], samples: Path) -> bool:
    plugins = [str(samples / name) for name in ("everything.py", "tiny.py")]
    try:
        compose({"plugins": plugins, "run": {"length": 1}, "everything": values})
    except SettingsError:
        return False
    return True


@given(TABLES)
@example({})
@example({"count": 1, "no_such_setting": 1})
@example({"count": 1, "share": 1})
@example({"count": True})
@example({"count": 1, "on": 1})
@example({"count": 1, "mode": True})
@example({"count": 1, "part": {"label": "x"}})
@example({"count": 1, "parts": [{"label": "x"}]})
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_the_schema_accepts_exactly_the_tables_that_the_core_accepts(
    everything: type, samples: Path, values: dict[str, Any]
) -> None:
    made = settings_schema({"everything": everything}, closed=True)
    file = {"run": {"length": 1}, "everything": values}
    assert Draft7Validator(made).is_valid(file) == core_accepts(values, samples)


@pytest.mark.parametrize("name", GOOD)
def test_schema_and_core_both_accept_every_valid_value_of_a_setting(
    name: str, everything: type, samples: Path
) -> None:
    made = Draft7Validator(settings_schema({"everything": everything}, closed=True))
    for value in GOOD[name]:
        values = {"count": 1, name: value}
        made.validate({"run": {"length": 1}, "everything": values})
        assert core_accepts(values, samples)


def test_every_setting_has_its_default_and_what_it_means(everything: type) -> None:
    table = settings_schema({"everything": everything}, closed=True)["properties"]["everything"]
    assert table["description"] == "One setting of ``every`` kind."
    assert set(table["properties"]) == {"plugin", *setting_fields(everything)}
    assert table["properties"]["share"] == {
        "type": "number",
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 1,
        "description": "How much.",
        "default": 0.5,
    }
    assert table["properties"]["place"]["default"] == "here"
    assert "default" not in table["properties"]["every"]


def test_the_schema_of_all_installed_plugins_is_a_sound_schema() -> None:
    made = json.loads(CliRunner().invoke(schema, []).output)
    Draft7Validator.check_schema(made)
    assert set(find_plugins()) <= set(made["properties"])


def test_without_a_file_other_tables_are_checked_as_second_instances_of_their_plugin(
    everything: type,
) -> None:
    made = Draft7Validator(settings_schema({"everything": everything}, closed=False))
    run = {"length": 1}
    assert made.is_valid({"run": run, "other": {"plugin": "everything", "count": 1}})
    assert not made.is_valid({"run": run, "other": {"plugin": "everything", "count": 0}})
    assert made.is_valid({"run": run, "local": {"whatever": 1}})
    assert made.is_valid({"run": run})
    assert not made.is_valid({"run": run, "other": 3})


def test_a_file_that_extends_another_need_not_hold_what_is_required(everything: type) -> None:
    made = Draft7Validator(settings_schema({"everything": everything}, closed=True))
    assert made.is_valid({"extends": "base.toml", "everything": {"part": {"label": "x"}}})
    assert not made.is_valid({"everything": {"part": {"label": "x"}}})
    assert not made.is_valid({"extends": "base.toml", "everything": {"count": 0}})


def test_of_a_file_it_knows_exactly_its_instances(samples: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "my.toml", tmp_path / "my.schema.json"
    file.write_text(
        f"#:schema ./my.schema.json\nplugins = ['{samples}/tiny.py', '{samples}/everything.py']\n"
        "[run]\nlength = 1\n[everything]\ncount = 2\n"
    )
    done = CliRunner().invoke(schema, [str(file), "-o", str(output)])
    assert (done.exit_code, done.output) == (0, "")
    made = Draft7Validator(json.loads(output.read_text()))
    values = tomllib.loads(file.read_text())
    assert made.is_valid(values)
    assert not made.is_valid(values | {"gpt": {}})
    assert not made.is_valid({key: value for key, value in values.items() if key != "everything"})


def test_the_mistakes_of_a_file_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("plugins = []\n[rum]\n")
    done = CliRunner().invoke(schema, [str(file)])
    assert isinstance(done.exception, SettingsError)
    assert "rum" in str(done.exception)


def test_a_file_that_cannot_be_written_is_an_error_of_storage(tmp_path: Path) -> None:
    done = CliRunner().invoke(schema, ["-o", str(tmp_path / "no" / "x.json")])
    assert "cannot be written: No such file or directory" in str(done.exception)
