"""The page of promises names the test that keeps each, and every test here is named on it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = re.findall(r"\]\(\.\./([\w/.-]+\.py)\)::`(test_\w+)`", PAGE)


def named_in(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    return {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_test_that_the_page_names_is_there():
    assert len(NAMED) > 20
    missing = [
        f"{path}::{name}"
        for path, name in NAMED
        if not (ROOT / path).is_file() or name not in named_in(ROOT / path)
    ]
    assert missing == []


def test_every_test_of_faults_keeps_a_promise_of_the_page():
    there = {
        (str(path.relative_to(ROOT)), name)
        for path in Path(__file__).parent.glob("test_*.py")
        if path != Path(__file__)
        for name in named_in(path)
    }
    assert sorted(there - set(NAMED)) == []
