"""The tables in READMEs and docs."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from fundamentallm import HOOKS, FundamentalError, RunSettings, SettingsError, setting_fields
from fundamentallm_authoring.cli import reference
from fundamentallm_authoring.reference import filled, hooks_table, settings_table

README = """# X
<!-- settings -->
old
<!-- /settings -->
between
<!-- hooks -->
<!-- /hooks -->
"""


def test_a_readme_gets_its_tables_between_its_markers(everything: type) -> None:
    text = filled(README, {"everything": everything}, "README.md")
    assert "old" not in text
    assert "\nbetween\n" in text
    assert "| `count` | int ≥ 1, ≤ 9 | **required** | How many. |" in text
    assert "| `sizes` | list of int each > 0 | `[]` | How large. |" in text
    assert "| `part.width` | int ≥ 1 | **required** | How wide. |" in text
    assert '| `code` | str matches [ab]+ | `"ab"` | As and bs \\| nothing else. |' in text


def test_filling_twice_changes_nothing(everything: type) -> None:
    once = filled(README, {"everything": everything}, "README.md")
    assert filled(once, {"everything": everything}, "README.md") == once


def test_the_hooks_say_what_the_plugin_does_there_and_where_it_wraps(everything: type) -> None:
    start, wraps = sorted(hooks_table(everything).splitlines()[2:])[::-1]
    assert start == "| `on_train_start` | event | Note the start. |"
    assert wraps.startswith("| `forward` (wraps) | exclusive | Return ")


def test_hooks_are_listed_in_the_order_of_a_run(everything: type) -> None:
    rows = hooks_table(everything).splitlines()[2:]
    named = [row.split("`")[1] for row in rows]
    assert named == sorted(named, key=HOOKS.index)


def test_a_readme_of_several_plugins_names_the_one_it_means(everything: type) -> None:
    several = {"everything": everything, "run": RunSettings}
    named = "<!-- settings: run -->\n<!-- /settings -->\n"
    assert "| `length` | period |" in filled(named, several, "README.md")
    with pytest.raises(SettingsError, match="say which plugin"):
        filled(README, several, "README.md")
    with pytest.raises(SettingsError, match="no plugin 'walk'"):
        filled(named.replace("run", "walk"), several, "README.md")


@pytest.mark.parametrize(
    "text",
    [
        "<!-- settings -->\n",
        "<!-- settings -->\n<!-- /hooks -->\n",
        "<!-- settings -->\n<!-- hooks -->\n<!-- /hooks -->\n<!-- /settings -->\n",
    ],
)
def test_a_marker_that_is_not_closed_is_an_error(text: str, everything: type) -> None:
    with pytest.raises(SettingsError, match=r"R\.md: a marker is not closed"):
        filled(text, {"everything": everything}, "R.md")


def test_every_setting_of_the_run_is_in_its_table() -> None:
    table = settings_table(RunSettings)
    assert all(f"| `{name}` |" in table for name in setting_fields(RunSettings))


def test_the_pages_have_every_hook_and_check_fails_when_they_are_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--settings", "settings.md", "--hooks", "hooks.md"]
    run = CliRunner()
    missing = run.invoke(reference, [*words, "--check"])
    assert isinstance(missing.exception, FundamentalError)
    assert not list(tmp_path.iterdir())
    assert run.invoke(reference, words).exit_code == 0
    page = Path("hooks.md").read_text()
    assert all(f"\n## `{hook}`\n" in page for hook in HOOKS)
    assert "\n*edit* · since 0.1 · provisional\n\nTurn `run.model`" in page
    assert "\n## `[run]`\n" in Path("settings.md").read_text()
    assert run.invoke(reference, [*words, "--check"]).exit_code == 0
    Path("hooks.md").write_text(page + "\n")
    stale = run.invoke(reference, [*words, "--check"])
    assert "not up to date: hooks.md" in str(stale.exception)


def test_a_readme_next_to_a_pyproject_gets_the_plugins_of_its_distribution(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- settings -->\n<!-- /settings -->\n")
    lonely = CliRunner().invoke(reference, ["--readme", str(readme)])
    assert "pyproject.toml cannot be read" in str(lonely.exception)
    (tmp_path / "pyproject.toml").write_text(
        '[project.entry-points.fundamentallm]\nno_such = "no:Such"\n'
    )
    unknown = CliRunner().invoke(reference, ["--readme", str(readme)])
    assert "no installed plugin is named 'no_such'" in str(unknown.exception)
