"""A message that advises a command prints it as this process was called."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).with_name("fundamentallm")
FILES = {  # files are read on other machines, so these name the plain command
    "plugins/authoring/fundamentallm_authoring/reference.py",
    "plugins/authoring/fundamentallm_authoring/sheet.py",
}


def product() -> Iterator[Path]:
    yield from (ROOT / "fundamentallm").rglob("*.py")
    yield from ROOT.glob("plugins/*/fundamentallm_*/**/*.py")


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the string constants of a module, docstrings aside, with their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
    docstrings = {id(node.value) for node in statements}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.lineno, node.value


def test_no_message_has_a_command_with_the_bare_name_of_the_program() -> None:
    entries = metadata.entry_points(group="fundamentallm.commands")
    commands = {entry.name for entry in entries} | {"train", "resume", "show"}
    bare = re.compile(rf"\bfundamentallm ({'|'.join(map(re.escape, sorted(commands)))})\b")
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip()}"
        for path in product()
        if str(path.relative_to(ROOT)) not in FILES
        for line, text in texts(path)
        if bare.search(text)
    ]
    assert found == []


@pytest.mark.parametrize(
    "words", [[sys.executable, "-m", "fundamentallm"], [str(SCRIPT)]], ids=["module", "path"]
)
def test_the_command_that_a_plugin_advises_can_be_typed(tmp_path: Path, words: list[str]) -> None:
    done = subprocess.run(
        [*words, "init", "first.toml", "--plugins", "gpt,adamw,text"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": "/nowhere"},
    )
    assert done.returncode == 0, done.stderr
    assert f"{' '.join(words)} train first.toml" in done.stdout
