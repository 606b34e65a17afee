"""Settings: strict, every mistake at once with its place, and back to TOML without a change."""

from __future__ import annotations

from enum import Enum
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import tomli
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fundamentallm import (
    Period,
    Run,
    RunSettings,
    SettingsError,
    compose,
    deep_iterable,
    field,
    flatten,
    ge,
    hookimpl,
    in_,
    le,
    optional,
    plugin,
    setting_fields,
    state,
    table,
)
from fundamentallm.host import Source, build, plain, read

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@table
class Group:
    """A table inside the plugin's."""

    pattern: str
    """A name pattern."""
    decay: float = field(default=0.0, validator=ge(0))
    """Weight decay."""
    file: Path | None = None
    """A file."""
    kept: Path = Path("kept")
    """A file with a default."""


@plugin
class Everything:
    """One setting of every type there is."""

    flag: bool = False
    """A bool."""
    count: int = field(default=1, validator=ge(1))
    """A whole number."""
    rate: float = field(default=0.5, validator=[ge(0), le(1)])
    """A number."""
    text: str = ""
    """A string."""
    path: Path = Path("default/path")
    """A path."""
    maybe_path: Path | None = None
    """A path or none."""
    mode: Literal["min", "max", 3] = "min"
    """One of some."""
    every: Period = Period(500)
    """A period."""
    maybe: int | None = None
    """A number or none."""
    either: int | str | list[int] = 0
    """One of several types."""
    amount: Literal["auto"] | Period | float = "auto"
    """A word, a period or a number."""
    numbers: list[float] = field(factory=list, validator=deep_iterable(ge(0)))
    """Numbers."""
    files: list[Path] = field(factory=list)
    """Paths."""
    nested: list[list[int]] = field(factory=list)
    """Lists of numbers."""
    named: dict[str, int] = field(factory=dict)
    """Numbers by name."""
    places: dict[str, Path] = field(factory=dict)
    """Paths by name."""
    group: Group | None = None
    """A table."""
    groups: list[Group] = field(factory=list)
    """Tables."""
    by_name: dict[str, Group] = field(factory=dict)
    """Tables by name."""
    low: int = 0
    """The lower end."""
    high: int = 10
    """The upper end."""

    seen: int = state(0)

    def __attrs_post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low: is above high, which is {self.high}")
        if self.low == self.high == 7:
            raise ValueError("seven is not a range")

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.seen += 1


def built(values: dict[str, Any], cls: type = Everything) -> Any:
    """Build a plugin of its table; raise ``SettingsError`` with every mistake."""
    source = read({"it": values})
    instance = build(cls, source.values["it"], source, ("it",))
    if source.mistakes:
        raise SettingsError(source.mistakes)
    return instance


def complaints(values: dict[str, Any], cls: type = Everything) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        built(values, cls)
    return [
        text.removeprefix("settings: it.").removeprefix("settings: ")
        for text in caught.value.problems
    ]


# ---------------------------------------------------------------------------------------------
# Types

ACCEPTED = [
    ("flag", True, True),
    ("count", 3, 3),
    ("rate", 0.25, 0.25),
    ("rate", 1, 1.0),
    ("text", "", ""),
    ("text", "1", "1"),
    ("mode", "max", "max"),
    ("mode", 3, 3),
    ("every", 5, Period(5)),
    ("every", "2 epochs", Period(2, "epochs")),
    ("maybe", 3, 3),
    ("either", 3, 3),
    ("either", "3", "3"),
    ("either", [3], [3]),
    ("amount", "auto", "auto"),
    ("amount", "5 tokens", Period(5, "tokens")),
    ("amount", 0.5, 0.5),
    ("numbers", [], []),
    ("numbers", [1, 0.5], [1.0, 0.5]),
    ("nested", [[1], [], [2, 3]], [[1], [], [2, 3]]),
    ("named", {"a": 1, "b c": 2}, {"a": 1, "b c": 2}),
]


@pytest.mark.parametrize(("name", "given", "expected"), ACCEPTED)
def test_a_value_of_the_right_type_is_taken_as_it_is(name: str, given: Any, expected: Any) -> None:
    value = getattr(built({name: given}), name)
    assert value == expected
    assert type(value) is type(expected)


REJECTED = [
    ("flag", 0, "expected true or false, got 0"),
    ("flag", 1, "expected true or false, got 1"),
    ("flag", "false", 'expected true or false, got "false"'),
    ("flag", "", 'expected true or false, got ""'),
    ("count", True, "expected a whole number, got true"),
    ("count", 1.0, "expected a whole number, got 1.0"),
    ("count", 1.5, "expected a whole number, got 1.5"),
    ("count", "1", 'expected a whole number, got "1"'),
    ("count", [1], "expected a whole number, got [1]"),
    ("rate", True, "expected a number, got true"),
    ("rate", "0.5", 'expected a number, got "0.5"'),
    ("rate", 10**400, "int too large to convert to float"),
    ("text", 1, "expected a string, got 1"),
    ("text", True, "expected a string, got true"),
    ("text", ["a"], 'expected a string, got ["a"]'),
    ("path", 1, "expected a path, got 1"),
    ("path", ["a"], 'expected a path, got ["a"]'),
    ("mode", "mni", "unknown value \"mni\" (did you mean 'min'?)"),
    ("mode", "x", 'unknown value "x" (known: 3, max, min)'),
    ("mode", 3.0, "unknown value 3.0 (known: 3, max, min)"),
    ("every", 1.5, "expected a period such as 500 or '10 minutes', got 1.5"),
    ("every", True, "expected a period such as 500 or '10 minutes', got true"),
    ("every", 0, "a period is finite and more than zero, not 0"),
    (
        "every",
        "5 parsecs",
        "unknown unit 'parsecs'; known: steps, epochs, tokens, seconds, minutes, hours",
    ),
    ("maybe", "1", 'expected a whole number, got "1"'),
    ("maybe", False, "expected a whole number, got false"),
    ("either", 1.5, "expected a whole number or a string or a list, got 1.5"),
    ("either", {}, "expected a whole number or a string or a list, got {}"),
    (
        "amount",
        True,
        "expected \"auto\" or a period such as 500 or '10 minutes' or a number, got true",
    ),
    (
        "amount",
        "5 parsecs",
        "unknown unit 'parsecs'; known: steps, epochs, tokens, seconds, minutes, hours",
    ),
    ("numbers", 1, "expected a list, got 1"),
    ("numbers", "1", 'expected a list, got "1"'),
    ("numbers", {"a": 1}, 'expected a list, got {"a" = 1}'),
    ("named", [1], "expected a table, got [1]"),
    ("group", "x", 'expected a table, got "x"'),
    ("groups", {"pattern": "x"}, 'expected a list, got {"pattern" = "x"}'),
    ("text", None, "expected a string, got null"),
    ("count", None, "expected a whole number, got null"),
]


@pytest.mark.parametrize(("name", "given", "complaint"), REJECTED)
def test_nothing_is_converted_to_fit(name: str, given: Any, complaint: str) -> None:
    assert complaints({name: given}) == [f"{name}: {complaint}"]


SCALARS = {
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(),
    list: st.lists(st.integers(), max_size=3),
    dict: st.dictionaries(st.text(), st.integers(), max_size=3),
}
TYPES = {bool: (bool,), int: (int,), float: (float, int), str: (str,)}


@plugin
class Plain:
    """The four plain types."""

    bool_: bool = False
    int_: int = 0
    float_: float = 0.0
    str_: str = ""


@unhurried
@given(
    st.sampled_from(sorted(TYPES, key=str)), st.sampled_from(sorted(SCALARS, key=str)), st.data()
)
def test_a_plain_type_takes_its_own_values_unchanged_and_no_others(
    wanted: type, offered: type, data: st.DataObject
) -> None:
    value = data.draw(SCALARS[offered])
    name = f"{wanted.__name__}_"
    if offered in TYPES[wanted]:
        kept = getattr(built({name: value}, Plain), name)
        assert kept == wanted(value)
        assert type(kept) is wanted
    else:
        (complaint,) = complaints({name: value}, Plain)
        assert complaint.startswith(f"{name}: expected ")


@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_a_number_that_toml_can_state_is_a_number_unless_a_validator_minds(value: float) -> None:
    assert str(built({"float_": value}, Plain).float_) == str(value)
    (complaint,) = complaints({"rate": value})
    assert complaint.startswith("rate: must be ")


def test_a_type_that_settings_do_not_know_ends_in_no_traceback() -> None:
    @plugin
    class Odd:
        """Settings of types outside the list."""

        pair: tuple[float, float] = (0.9, 0.99)
        color: Enum | None = None

    assert built({"pair": [1, 0.5]}, Odd).pair == (1.0, 0.5)
    assert complaints({"pair": [1, "a"]}, Odd) == ['pair: expected a number, got "a"']
    assert len(complaints({"pair": [1]}, Odd)) == 1


# ---------------------------------------------------------------------------------------------
# Tables


def test_an_unknown_setting_is_reported_with_the_one_that_was_meant() -> None:
    assert complaints({"cuont": 1}) == ["cuont: unknown setting (did you mean 'count'?)"]


def test_an_unknown_setting_unlike_any_other_is_reported_with_all_known_ones() -> None:
    assert complaints({"zzz": 1}, Plain) == [
        "zzz: unknown setting (known: bool_, float_, int_, str_)"
    ]


def test_state_is_no_setting() -> None:
    (complaint,) = complaints({"seen": 3})
    assert complaint.startswith("seen: unknown setting")
    assert "seen" not in setting_fields(Everything)


def test_a_missing_required_setting_is_reported_at_the_place_of_its_table(
    tmp_path: Path,
) -> None:
    source = read(written(tmp_path / "run.toml", "\n[run]\nseed = 1\n"))
    build(RunSettings, source.values["run"], source, ("run",))
    assert list(map(str, source.mistakes)) == [
        f"{tmp_path}/run.toml:2: run.length: is missing, and has no default"
    ]


@pytest.mark.parametrize("value", [5, "length", [1], True])
def test_a_table_is_a_table(value: Any) -> None:
    source = read({"run": value})
    build(RunSettings, source.values["run"], source, ("run",))
    (problem,) = map(str, source.mistakes)
    assert problem.startswith("settings: run: expected a table, got ")


def test_tables_inside_tables_are_checked_as_strictly() -> None:
    assert complaints(
        {
            "group": {"patern": "x", "decay": "0"},
            "groups": [{"pattern": "a"}, {"pattern": 1, "decay": -1}, 5],
            "by_name": {"one": {}, "two": {"pattern": "x"}},
        }
    ) == [
        "group.patern: unknown setting (did you mean 'pattern'?)",
        "group.pattern: is missing, and has no default",
        'group.decay: expected a number, got "0"',
        "groups.1.pattern: expected a string, got 1",
        "groups.1.decay: must be >= 0: -1.0",
        "groups.2: expected a table, got 5",
        "by_name.one.pattern: is missing, and has no default",
    ]


def test_every_item_of_a_list_or_table_is_checked() -> None:
    assert complaints(
        {
            "numbers": [1, "2", True],
            "nested": [[1], [1.5, "x"], 3],
            "named": {"a": 1, "b": "2"},
        }
    ) == [
        'numbers.1: expected a number, got "2"',
        "numbers.2: expected a number, got true",
        "nested.1.0: expected a whole number, got 1.5",
        'nested.1.1: expected a whole number, got "x"',
        "nested.2: expected a list, got 3",
        'named.b: expected a whole number, got "2"',
    ]


def test_the_error_of_a_union_is_that_of_the_member_that_was_meant() -> None:
    assert complaints({"either": [1, "x"]}) == ['either.1: expected a whole number, got "x"']


def test_tables_are_built_into_objects() -> None:
    it = built({"groups": [{"pattern": "a", "decay": 1}], "by_name": {"x": {"pattern": "b"}}})
    assert it.groups == [Group(pattern="a", decay=1.0)]
    assert it.by_name == {"x": Group(pattern="b")}


def test_all_mistakes_of_a_table_come_at_once() -> None:
    assert complaints({"flag": 1, "count": 0, "rate": 2, "text": 5, "nope": 1}) == [
        "nope: unknown setting",
        "flag: expected true or false, got 1",
        "count: must be >= 1: 0",
        "rate: must be <= 1: 2.0",
        "text: expected a string, got 5",
    ]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"count": 0}, "count: must be >= 1: 0"),
        ({"rate": -0.5}, "rate: must be >= 0: -0.5"),
        ({"numbers": [1, -2]}, "numbers: must be >= 0: -2.0"),
        ({"low": 11}, "low: is above high, which is 10"),
        ({"high": -1}, "low: is above high, which is -1"),
        ({"low": 7, "high": 7}, "seven is not a range"),
    ],
)
def test_the_message_of_a_validator_is_reported_once_and_with_the_setting(
    values: dict[str, Any], complaint: str
) -> None:
    (found,) = complaints(values)
    assert found.removeprefix("it: ") == complaint


def test_errors_of_validators_of_any_kind_are_reported() -> None:
    def even(instance: object, attribute: object, value: int) -> None:
        if value % 2:
            raise ValueError

    @plugin
    class Picky:
        """Validators of several makes."""

        size: int = field(default=1, validator=in_([1, 2, 4]))
        maybe: int | None = field(default=None, validator=optional(ge(1)))
        pair: int = field(default=0, validator=even)

    assert built({"size": 4, "maybe": 2, "pair": 2}, Picky).size == 4
    size, maybe, pair = complaints({"size": 3, "maybe": 0, "pair": 1}, Picky)
    assert size.startswith("size: must be in [1, 2, 4]")
    assert maybe == "maybe: must be >= 1: 0"
    assert pair == "pair: its validator refuses the value"


def test_a_mistake_in_one_setting_is_not_followed_by_guesses_about_others() -> None:
    # Whether low is above high cannot be known while high is no number.
    assert complaints({"low": 50, "high": "60"}) == ['high: expected a whole number, got "60"']


# ---------------------------------------------------------------------------------------------
# Paths


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def build_from(path: Path, *overrides: str) -> Any:
    source = read(path, overrides)
    instance = build(Everything, source.values["it"], source, ("it",))
    assert source.mistakes == []
    return instance


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_path_is_relative_to_the_file_that_states_it(folder: Path) -> None:
    written(
        folder / "far/base.toml", "[it]\npath = 'a'\nmaybe_path = '../b'\nfiles = ['c', '/d']\n"
    )
    it = build_from(
        written(folder / "near/run.toml", "extends = '../far/base.toml'\n[it]\npath = 'e'\n")
    )
    assert it.path == folder / "near/e"
    assert it.maybe_path == folder / "far/../b"
    assert it.files == [folder / "far/c", Path("/d")]


def test_each_path_of_a_table_that_two_files_fill_is_relative_to_its_own_file(folder: Path) -> None:
    written(
        folder / "far/base.toml",
        "[it.places]\na = 'x'\nb = 'x'\n[it.group]\npattern = ''\nfile = 'f'\n",
    )
    path = written(
        folder / "near/run.toml",
        "extends = '../far/base.toml'\n[it.places]\nb = 'y'\n[it.group]\ndecay = 1\n",
    )
    it = build_from(path, "it.places.c=z")
    assert it.places == {"a": folder / "far/x", "b": folder / "near/y", "c": folder / "z"}
    assert it.group.file == folder / "far/f"


def test_a_path_in_tables_of_an_array_is_relative_to_its_file(folder: Path) -> None:
    text = (
        "[[it.groups]]\npattern = ''\nfile = 'f'\n[it.by_name]\nx = {pattern = '', file = '~/g'}\n"
    )
    it = build_from(written(folder / "sub/run.toml", text))
    assert it.groups[0].file == folder / "sub/f"
    assert it.by_name["x"].file == Path.home() / "g"


def test_a_path_of_the_command_line_or_of_a_mapping_is_relative_to_here(folder: Path) -> None:
    path = written(folder / "sub/run.toml", "[it]\n")
    assert build_from(path, "it.path=a/b").path == folder / "a/b"
    assert built({"path": "a", "files": [Path("b")]}).path == folder / "a"
    assert built({"path": "a", "files": [Path("b")]}).files == [folder / "b"]


def test_a_default_path_is_left_as_it_is(folder: Path) -> None:
    it = build_from(
        written(
            folder / "sub/run.toml",
            "[it.group]\npattern = ''\n[[it.groups]]\npattern = ''\nfile = 'x'\n",
        )
    )
    assert it.path == Path("default/path")
    assert it.group.kept == it.groups[0].kept == Path("kept")


# ---------------------------------------------------------------------------------------------
# The [run] table


def run_table(**values: Any) -> RunSettings:
    return compose(TINY | {"run": {"length": 1} | values}).run


TINY: dict[str, Any] = {"plugins": []}


@pytest.fixture(autouse=True)
def _tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
from fundamentallm import hookimpl, plugin
@plugin
class Parts:
    "What a run cannot do without."
    @hookimpl
    def build_data(self): ...
    @hookimpl
    def build_model(self): ...
    @hookimpl
    def build_optimizer(self): ...
"""
    monkeypatch.setitem(TINY, "plugins", [str(written(tmp_path / "lib/parts.py", text))])


def test_a_run_has_these_defaults() -> None:
    run = run_table()
    assert run.length == Period(1)
    assert run.validate_every is None
    assert run.log_every == Period(50)
    assert (run.seed, run.device, run.name, run.folder) == (1337, "auto", None, Path("runs"))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"length": 0}, "run.length: a period is finite and more than zero, not 0"),
        ({"length": "2000 stpes"}, "run.length: unknown unit 'stpes'; known: steps, epochs,"),
        ({"validate_every": 0}, "run.validate_every: a period is finite and more than zero, not 0"),
        ({"validate_every": False}, "run.validate_every: expected a period"),
        ({"log_every": "always"}, "run.log_every: expected a period"),
        ({"seed": -1}, "run.seed: must be >= 0: -1"),
        ({"device": "gpu"}, "run.device: unknown value \"gpu\" (did you mean 'cpu'?)"),
        ({"name": "../escape"}, "run.name: must match regex"),
        ({"name": ""}, "run.name: must match regex"),
        ({"folder": 5}, "run.folder: expected a path, got 5"),
        ({"lenght": 5}, "run.lenght: unknown setting (did you mean 'length'?)"),
        (
            {"validate_evry": 5},
            "run.validate_evry: unknown setting (did you mean 'validate_every'?)",
        ),
    ],
)
def test_a_wrong_run_table_is_an_error(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        run_table(**values)
    (problem,) = caught.value.problems
    assert problem.startswith(f"settings: {complaint}")


def test_a_run_needs_a_length() -> None:
    with pytest.raises(SettingsError, match=r"run\.length: is missing, and has no default"):
        compose(TINY)


# ---------------------------------------------------------------------------------------------
# Back to TOML


@plugin
class Given:
    """Takes an object in Python."""

    thing: Any = None
    things: list[Any] = field(factory=list)
    produces: ClassVar[tuple[str, ...]] = ()

    @hookimpl
    def on_step_end(self) -> None: ...


names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6)
numbers = st.floats(0, 1e300)
paths = st.from_regex(r"(/|~/|\.\./)?[a-zü ]{1,4}(/[a-z.]{1,4})?", fullmatch=True)
spans = st.integers(1, 10**9) | st.builds(
    lambda amount, unit: f"{amount!r} {unit}",
    st.floats(1e-9, 1e9),
    st.sampled_from(["epochs", "hours"]),
)
tables = st.fixed_dictionaries({"pattern": names}, optional={"decay": numbers, "file": paths})
EVERYTHING = st.fixed_dictionaries(
    {},
    optional={
        "flag": st.booleans(),
        "count": st.integers(1, 2**62),
        "rate": st.floats(0, 1),
        "text": names,
        "path": paths,
        "maybe_path": paths,
        "mode": st.sampled_from(["min", "max", 3]),
        "every": spans,
        "maybe": st.integers(-5, 5),
        "either": st.integers(-5, 5) | names | st.lists(st.integers(-5, 5), max_size=2),
        "amount": st.just("auto") | spans | numbers,
        "numbers": st.lists(numbers, max_size=3),
        "files": st.lists(paths, max_size=3),
        "nested": st.lists(st.lists(st.integers(-5, 5), max_size=2), max_size=2),
        "named": st.dictionaries(names, st.integers(-5, 5), max_size=2),
        "places": st.dictionaries(names, paths, max_size=2),
        "group": tables,
        "groups": st.lists(tables, max_size=2),
        "by_name": st.dictionaries(names, tables, max_size=2),
    },
)


@unhurried
@given(EVERYTHING)
def test_settings_written_as_toml_anywhere_build_the_same_again(values: dict[str, Any]) -> None:
    one = built(values)
    text = tomli_w.dumps({"it": plain(one)})
    there = Source(Path("/elsewhere/run.toml"), tomli.loads(text))
    other = build(Everything, there.values["it"], there, ("it",))
    assert there.mistakes == []
    for name in setting_fields(Everything):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert absolute(theirs) == absolute(mine), name
        assert type(theirs) is type(mine), name
    assert plain(other) == plain(one)


def absolute(value: Any) -> Any:
    """A default path means a place below the current folder, and is written as that."""
    if isinstance(value, Path):
        return value.absolute()
    if isinstance(value, Group):
        return {
            name: absolute(getattr(value, name)) for name in ("pattern", "decay", "file", "kept")
        }
    if isinstance(value, dict):
        return {name: absolute(inner) for name, inner in value.items()}
    return [absolute(inner) for inner in value] if isinstance(value, list) else value


def test_settings_that_are_none_are_left_out() -> None:
    assert {"maybe", "maybe_path", "group"}.isdisjoint(plain(built({})))
    assert "file" not in plain(built({"group": {"pattern": "x"}}))["group"]


def test_an_object_that_python_gave_is_recorded_as_what_it_says_of_itself() -> None:
    values = plain(Given(thing=SimpleNamespace(a=1), things=[object, 5]))
    assert values == {"thing": "namespace(a=1)", "things": ["<class 'object'>", 5]}
    assert tomli.loads(tomli_w.dumps(values)) == values


def test_composed_tables_compose_to_the_same(folder: Path) -> None:
    path = written(
        folder / "sub/run.toml",
        """
plugins = ["../lib/parts.py", "../lib/more.py"]
[run]
length = "3 epochs"
folder = "results"
[more]
path = "data.txt"
every = "10 minutes"
""",
    )
    written(
        folder / "lib/more.py",
        """
from pathlib import Path
from fundamentallm import Period, hookimpl, plugin, field
@plugin
class More:
    "More."
    path: Path
    other: Path = Path("other")
    every: Period = Period(5)
    maybe: int | None = None
    names: list[str] = field(factory=lambda: ["a"])
    @hookimpl
    def on_log(self): ...
""",
    )
    one = compose(path)
    written(folder / "elsewhere/settings.toml", tomli_w.dumps(one.tables))
    other = compose(folder / "elsewhere/settings.toml")
    assert other.tables == one.tables
    assert other.run.folder == one.run.folder == folder / "sub/results"
    assert list(other.plugins) == list(one.plugins) == ["parts", "more"]
    mine, theirs = one.plugins["more"], other.plugins["more"]
    assert (theirs.path, theirs.every, theirs.maybe, theirs.names) == (
        mine.path,
        mine.every,
        None,
        ["a"],
    )
    assert theirs.other == mine.other.absolute() == folder / "other"


def test_flatten_names_the_values_of_tables_in_tables() -> None:
    group = Group(pattern="*.bias", file=Path("a"))
    tables = {"run": {"length": Period(5)}, "adamw": {"groups": group, "lists": [1, {"a": 2}]}}
    assert flatten({**tables, "empty": {}, "seed": 1}) == {
        "run.length": Period(5),
        "adamw.groups.pattern": "*.bias",
        "adamw.groups.decay": 0.0,
        "adamw.groups.file": Path("a"),
        "adamw.groups.kept": Path("kept"),
        "adamw.lists": [1, {"a": 2}],
        "seed": 1,
    }
