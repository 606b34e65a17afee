"""The commands that look at plugins from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fundamentallm import HOOKS
from fundamentallm_authoring.inspection import hooks, plugins

LOCAL = """
from fundamentallm import hookimpl, plugin

@plugin
class Parts:
    "All that a run needs."

    @hookimpl
    def build_data(self): ...
    @hookimpl
    def build_model(self): ...
    @hookimpl
    def build_optimizer(self): ...
    @hookimpl(wrapper=True)
    def forward(self):
        return (yield)
"""


def test_plugins_are_listed_with_what_brings_them_and_what_they_do():
    rows = json.loads(CliRunner().invoke(plugins, ["--json"]).output)
    found = {row["name"]: row for row in rows}
    assert found["accumulate"]["distribution"] == "fundamentallm-accumulate"
    assert found["accumulate"]["about"].endswith(".")
    shown = CliRunner().invoke(plugins).output
    assert "fundamentallm-accumulate" in shown


def test_hooks_are_printed_in_the_order_of_a_run_with_the_plugins_that_answer(tmp_path: Path):
    (tmp_path / "parts.py").write_text(LOCAL)
    (tmp_path / "run.toml").write_text('plugins = ["./parts.py"]\nrun.length = 1\n')
    shown = CliRunner().invoke(hooks, [str(tmp_path / "run.toml")]).output.splitlines()
    assert [line.split()[0] for line in shown] == list(HOOKS)
    answers = {line.split()[0]: line.split(maxsplit=4)[4:] for line in shown}
    assert answers["build_data"] == ["parts"]
    assert answers["forward"] == ["parts (wraps)"]
    assert answers["validate"] == []


def test_the_hooks_of_a_plugin_are_printed_with_what_it_does_in_each():
    lines = CliRunner().invoke(hooks, ["--docs", "gc"]).output.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["on_train_start", "event"],
        ["on_safe_point", "event"],
        ["on_train_end", "event"],
    ]
    assert lines[1].endswith("  Collect garbage if `every` is due.")
    done = CliRunner().invoke(hooks, ["--docs", "emma"])
    assert str(done.exception) == "emma: is no installed plugin (did you mean 'ema'?)"


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment with an installed plugin, of a long name, whose module cannot be imported."""
    facts = tmp_path / "site" / "acme_broken-0.1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-broken\nVersion: 0.1.0\n")
    name = "a_plugin_with_a_very_long_name"
    (facts / "entry_points.txt").write_text(f"[fundamentallm]\n{name} = acme_missing:Broken\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site")}


@pytest.mark.parametrize("command", ["schema", "plugins"])
def test_a_broken_installed_plugin_is_named_and_hides_no_other(command, broken):
    words = [sys.executable, "-m", "fundamentallm", command]
    done = subprocess.run(words, capture_output=True, text=True, env=broken)
    assert done.returncode == 0, done.stderr
    assert "cannot be loaded: ModuleNotFoundError" in done.stdout + done.stderr
    assert "early_stopping" in done.stdout
    if command == "plugins":
        assert re.search(
            r"^a_plugin_with_a_very_long_name +acme-broken 0\.1\.0$", done.stdout, re.MULTILINE
        )
        assert re.search(
            r"^activation_checkpointing +fundamentallm-activation-checkpointing 0\.1\.0$",
            done.stdout,
            re.MULTILINE,
        )
