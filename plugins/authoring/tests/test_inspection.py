"""The commands that look at plugins from outside."""

from __future__ import annotations

import json
from pathlib import Path

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


def test_hooks_are_told_in_the_order_of_a_run_with_who_answers(tmp_path: Path):
    (tmp_path / "parts.py").write_text(LOCAL)
    (tmp_path / "run.toml").write_text('plugins = ["./parts.py"]\nrun.length = 1\n')
    shown = CliRunner().invoke(hooks, [str(tmp_path / "run.toml")]).output.splitlines()
    assert [line.split()[0] for line in shown] == list(HOOKS)
    told = {line.split()[0]: line.split(maxsplit=4)[4:] for line in shown}
    assert told["build_data"] == ["parts"]
    assert told["forward"] == ["parts (wraps)"]
    assert told["validate"] == []
