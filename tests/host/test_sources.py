"""Where settings come from: files that extend each other, overrides, and the line of each value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fundamentallm.host import Key, Source, read
from fundamentallm.host.sources import statement_lines

# ---------------------------------------------------------------------------------------------
# Lines: a generated text knows where it states each key.

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
KEYS = ("a", "b", "run", "d_model", '"a.b"', '"with space"', "'ünï'")
SCALARS = st.sampled_from(
    [
        "1",
        "-0.5",
        "true",
        '"# no comment"',
        "'[table]'",
        '"a\\"]\\nb"',
        "2026-01-01",
        '"\u2028\x85"',
    ]
)


@st.composite
def statements(draw: st.DrawFn, key: str) -> list[str]:
    """One statement, in as many lines as it takes; it begins on its first line."""
    dotted = draw(st.sampled_from(["", ".x", " . x . y"]))
    scalar = draw(SCALARS)
    value = draw(
        st.sampled_from(
            [
                scalar,
                f"[{scalar}, {scalar}]",
                f"[\n    {scalar},\n\n    # a comment ]\n    {scalar},\n]",
                "[\n  [1, 2],\n  [3],\n]",
                '"""one\n[not.a.table]\na = 1\n"""',
                "'''\n\n# no comment\n'''",
                f"{{ inner = {scalar}, deep = {{ er = 1 }} }}",
                f"[\n  {{ x = {scalar} }},\n  {{ x = [\n  1] }},\n]",
            ]
        )
    )
    comment = draw(st.sampled_from(["", "  # why = 1", "  # \u2028 [x]"]))
    return f"{key}{dotted} = {value}{comment}".split("\n")


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, dict[Key, int]]:
    """A sound TOML text with the line of every statement and header in it."""
    lines: list[str] = []
    known: dict[Key, int] = {}

    def state(prefix: Key) -> None:
        for key in draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=3)):
            filler()
            part = draw(statements(key))
            known.update(
                dict.fromkeys(leaves(prefix, tomli.loads("\n".join(part))), len(lines) + 1)
            )
            lines.extend(part)

    def filler() -> None:
        lines.extend(
            draw(st.lists(st.sampled_from(["", "   ", "# c = [", "  # \x85'''"]), max_size=2))
        )

    state(())
    arrays: dict[str, int] = {}
    for number in range(draw(st.integers(0, 4))):
        filler()
        if draw(st.booleans()):
            header, prefix = f"[ t{number} . 'sub' ]", (f"t{number}", "sub")
        else:
            name = draw(st.sampled_from(["rows", "more"]))
            arrays[name] = arrays.get(name, -1) + 1
            header, prefix = f"[[{name}]]", (name, str(arrays[name]))
        lines.append(header)
        known[prefix] = len(lines)
        state(prefix)
    ending = draw(st.sampled_from(["\n", "\r\n"]))
    return ending.join(lines) + draw(st.sampled_from(["", ending])), known


def leaves(prefix: Key, values: Any) -> list[Key]:
    if not isinstance(values, dict):
        return [prefix]
    return [key for name, value in values.items() for key in leaves((*prefix, name), value)]


@unhurried
@given(texts())
def test_every_key_has_the_line_that_its_statement_begins_on(
    generated: tuple[str, dict[Key, int]],
) -> None:
    text, known = generated
    tomli.loads(text)  # the text is sound
    found = statement_lines(text)
    assert {key: found.get(key) for key in known} == known


def test_a_table_that_only_its_parts_state_has_the_line_of_the_first_part() -> None:
    text = "a.b = 1\na.c = 2\n[x.y]\nz = 1\n[x.w]\n[p.q]\n[p]\n[[r.s]]\n[[r.s]]\n"
    lines = statement_lines(text)
    assert lines["a",] == 1
    assert lines["x",] == 3
    assert lines["p",] == 7, "its own header is better than that of a part"
    assert lines["r",] == lines["r", "s"] == lines["r", "s", "0"] == 8
    assert lines["r", "s", "1"] == 9


# ---------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a file below the current folder, which is a fresh one."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str | bytes) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def place(source: Source, *key: str) -> str:
    return source.origin(key).place


def test_a_file_gives_each_value_its_place_and_folder(write: Any, tmp_path: Path) -> None:
    source = read(write("sub/run.toml", "plugins = []\n\n[run]\nlength = 5\n"))
    assert source.mistakes == []
    assert source.values == {"plugins": [], "run": {"length": 5}}
    assert place(source, "run", "length") == "sub/run.toml:4"
    assert source.origin(("run", "length")).folder == (tmp_path / "sub").resolve()


def test_a_missing_key_has_the_place_of_its_table(write: Any) -> None:
    source = read(write("run.toml", "\n[adamw]\ngroups.a = 1\n"))
    assert place(source, "adamw", "lr") == "run.toml:2"
    assert place(source, "adamw", "groups", "b") == "run.toml:3"
    assert place(source, "gpt", "width") == "run.toml"


def test_tables_merge_along_a_chain_and_arrays_and_scalars_replace(write: Any) -> None:
    write(
        "far/base.toml",
        "plugins = ['a', 'b']\n[run]\nlength = 1\nseed = 1\n[x]\ny.a = 1\ny.b = 2\n",
    )
    write("far/mid.toml", "extends = 'base.toml'\n[run]\nlength = 2\n[x]\ny.b = 3\nlist = [1, 2]\n")
    source = read(write("run.toml", "extends = 'far/mid.toml'\nplugins = ['c']\n[x]\nlist = [3]\n"))
    assert source.mistakes == []
    assert source.values == {
        "plugins": ["c"],
        "run": {"length": 2, "seed": 1},
        "x": {"y": {"a": 1, "b": 3}, "list": [3]},
    }
    assert place(source, "plugins") == "run.toml:2"
    assert place(source, "run", "seed") == "far/base.toml:4"
    assert place(source, "x", "y", "b") == "far/mid.toml:5"
    assert [source.origin((name,)).extended for name in ("plugins", "run", "x")] == [
        False,
        True,
        False,
    ]


@unhurried
@given(
    layers=st.lists(
        st.dictionaries(
            st.sampled_from("abc"), st.dictionaries(st.sampled_from("xyz"), st.integers())
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_nearest_file_that_states_a_value_wins(
    layers: list[dict[str, dict[str, int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    expected: dict[str, dict[str, int]] = {}
    stated: dict[Key, str] = {}
    for number, layer in enumerate(layers):
        text = f"extends = '{number - 1}.toml'\n" if number else ""
        for table, values in layer.items():
            text += f"[{table}]\n"
            expected.setdefault(table, {}).update(values)
            for name, value in values.items():
                text += f"{name} = {value}\n"
                stated[table, name] = f"{folder / f'{number}.toml'}:{text.count(chr(10))}"
        (folder / f"{number}.toml").write_text(text)
    source = read(folder / f"{len(layers) - 1}.toml")
    assert source.values == expected
    assert {key: source.origin(key).place for key in stated} == stated


def test_a_table_may_replace_a_value_and_a_value_a_table(write: Any) -> None:
    write("base.toml", "a = 1\n[b]\nx = 1\n")
    source = read(write("run.toml", "extends = 'base.toml'\nb = 2\n[a]\nx = 2\n"))
    assert source.values == {"a": {"x": 2}, "b": 2}


def problems(settings: Path, *overrides: str) -> list[str]:
    return list(map(str, read(settings, overrides).mistakes))


def test_extending_in_a_circle_is_reported_with_the_file_and_line_that_closes_it(
    write: Any,
) -> None:
    write("b.toml", "extends = 'sub/../c.toml'\n")
    write("sub/x", "")
    write("c.toml", "\nextends = 'a.toml'\n")
    path = write("a.toml", "extends = 'b.toml'\n")
    (problem,) = problems(path)
    assert problem == "sub/../c.toml:2: extends: a circle: a.toml extends this file too"


def test_a_file_cannot_extend_itself(write: Any) -> None:
    assert problems(write("a.toml", "extends = './a.toml'\n")) == [
        "a.toml:1: extends: a circle: ./a.toml extends this file too"
    ]


def test_two_files_may_extend_the_same_one(write: Any) -> None:
    write("base.toml", "[run]\nseed = 1\n")
    write("one.toml", "extends = 'base.toml'\n")
    assert read(write("two.toml", "extends = 'one.toml'\n")).values == {"run": {"seed": 1}}


def test_a_missing_file_is_reported_with_the_file_that_extends_it(write: Any) -> None:
    assert problems(Path("run.toml")) == ["run.toml: No such file or directory"]
    assert problems(write("sub/a.toml", "\nextends = 'b.toml'\n")) == [
        "sub/a.toml:2: extends: sub/b.toml: No such file or directory"
    ]


def test_a_folder_is_no_settings_file(write: Any) -> None:
    write("sub/a.toml", "")
    assert problems(Path("sub")) == ["sub: Is a directory"]
    assert problems(write("b.toml", "extends = 'sub'")) == [
        "b.toml:1: extends: sub: Is a directory"
    ]


@pytest.mark.parametrize("stated", ["5", "['a.toml', 'b.toml']", "{ path = 'a.toml' }", "true"])
def test_extends_is_one_path(write: Any, stated: str) -> None:
    assert problems(write("a.toml", f"extends = {stated}\n")) == [
        "a.toml:1: extends: expected a path"
    ]


def test_a_file_that_is_not_utf8_is_reported_with_line_and_column(write: Any) -> None:
    assert problems(write("a.toml", b"a = 1\n# caf\xe9\n")) == [
        "a.toml:2:6: is not UTF-8 (byte 0xe9): save the file as UTF-8"
    ]


VALUE = "expected a number, true, false, a text in quotes, a [list] or a {table} as the value"


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("a = 1\nb = \n", "2:5", VALUE),
        ("a = 1\n\n[run\nlength = 5\n", "3:5", "Expected ']' at the end of a table declaration"),
        (
            "[run]\nlength = 2000 steps\n",
            "2:15",
            "expected the end of the line after the value; a text needs quotes",
        ),
        ('[run]\nname = "x\n', "2:10", "expected a quote before the end of the line"),
        ("[run]\n\n\nx = 1\nx = 2\n", "5:6", "this key has a value already, above"),
        ("[run]\nx = 1\n[run]\n", "3:5", "Cannot declare ('run',) twice"),
        ("plugins = [\n'a'\n'b'\n]\n", "3:1", "expected a comma, or the ] that ends the list"),
        ("x = \\u00e9\n", "1:5", VALUE),
        ("a = True\n", "1:5", VALUE),
        ("???\n", "1:1", "expected a line such as key = value, or [table]"),
    ],
)
def test_a_syntax_error_has_line_column_and_a_plain_reason(
    write: Any, text: str, place: str, reason: str
) -> None:
    assert problems(write("a.toml", text)) == [f"a.toml:{place}: {reason}"]


def test_a_syntax_error_in_an_extended_file_has_that_files_place(write: Any) -> None:
    write("base.toml", "ok = 1\n???\n")
    (problem,) = problems(write("a.toml", "extends = 'base.toml'\n"))
    assert problem.startswith("base.toml:2:1: ")


def test_mistakes_of_several_files_and_overrides_come_together(write: Any) -> None:
    write("base.toml", "???\n")
    found = problems(write("a.toml", "extends = 'base.toml'\n"), "no-sign", "=5")
    assert [text.partition(":")[0] for text in found] == ["base.toml", "--set no-sign", "--set =5"]


# ---------------------------------------------------------------------------------------------
# A mapping, and overrides


def test_a_mapping_is_taken_as_it_is_relative_to_here(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"run": {"length": 5}}
    source = read(given, ["run.length=6"])
    assert source.values == {"run": {"length": 6}}
    assert given == {"run": {"length": 5}}, "what the caller holds stays as it was"
    assert place(read(given), "run", "length") == "settings"
    assert read(given).origin(("run", "length")).folder == tmp_path


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("a.b=1", {"a": {"b": 1}}),
        ("a.b = 1.5", {"a": {"b": 1.5}}),
        ("a.b=true", {"a": {"b": True}}),
        ("a.b='1'", {"a": {"b": "1"}}),
        ('a.b="x = y"', {"a": {"b": "x = y"}}),
        ("a.b=[1, 2]", {"a": {"b": [1, 2]}}),
        ("a={b = 1, c = 2}", {"a": {"b": 1, "c": 2}}),
        ('a."b.c".d=1', {"a": {"b.c": {"d": 1}}}),
        ("a.b=word", {"a": {"b": "word"}}),
        ("a.b=2000 steps", {"a": {"b": "2000 steps"}}),
        ("a.b=../data/x.txt", {"a": {"b": "../data/x.txt"}}),
        ("a.b=x=y", {"a": {"b": "x=y"}}),
        ("a.b=", {"a": {"b": ""}}),
        ("a.b=True", {"a": {"b": "True"}}),
        ("a.b=größe/😀.txt", {"a": {"b": "größe/😀.txt"}}),
        ("a.b=C:\\new", {"a": {"b": "C:\\new"}}),
        ("top=1", {"top": 1}),
    ],
)
def test_an_override_is_a_toml_statement_or_a_bare_word(override: str, values: object) -> None:
    source = read({}, [override])
    assert source.mistakes == []
    assert source.values == values
    assert {origin.place for origin in source.origins.values()} == {"--set"}


@unhurried
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_a_bare_word_is_taken_letter_by_letter_if_it_is_no_toml(word: str) -> None:
    try:
        expected = tomli.loads(f"a={word}")
    except tomli.TOMLDecodeError:
        expected = {"a": word}
    assert read({}, [f"a={word}"]).values == expected


@unhurried
@given(st.integers() | st.booleans() | st.text(st.characters(exclude_categories=["Cs"])))
def test_a_value_written_as_toml_arrives_as_it_is(value: Any) -> None:
    written = (
        json.dumps(value).replace("\x7f", "\\u007f") if not isinstance(value, str) else toml(value)
    )
    assert read({}, [f"a.b={written}"]).values == {"a": {"b": value}}


def toml(text: str) -> str:
    return '"' + "".join(f"\\U{ord(letter):08x}" for letter in text) + '"'


@pytest.mark.parametrize("override", ["run.length", "", "=1", "a..b=1", "a b=1", "[a]"])
def test_a_wrong_override_is_reported_with_the_right_form(override: str) -> None:
    assert list(map(str, read({}, [override]).mistakes)) == [
        f"--set {override}: expected table.key=value, with a TOML value"
    ]


def test_the_last_override_wins_and_all_win_over_files(write: Any, tmp_path: Path) -> None:
    path = write("sub/run.toml", "[a]\nb = 1\nc = 1\n")
    source = read(path, ["a.b=2", "a.b=3"])
    assert source.values == {"a": {"b": 3, "c": 1}}
    assert place(source, "a", "b") == "--set"
    assert source.origin(("a", "b")).folder == tmp_path, (
        "an override's paths begin where it is typed"
    )
    assert place(source, "a", "c") == "sub/run.toml:3"


def test_a_mistake_is_noted_with_place_and_key(write: Any) -> None:
    source = read(write("run.toml", "[a]\nb = 1\n"))
    source.blame(("a", "b"), "is wrong")
    assert list(map(str, source.mistakes)) == ["run.toml:2: a.b: is wrong"]
