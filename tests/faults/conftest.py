"""What the cases compare with: one run that nothing happens to."""

from __future__ import annotations

import sys
from pathlib import Path

import attrs
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the harness is modules, not a package
import tiny


@attrs.frozen
class Whole:
    """The uninterrupted run: its settings, weights and rows."""

    settings: Path
    digest: str
    rows: list


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    settings = tiny.write_settings(folder)
    tiny.end(tiny.start("train", settings, "--run-dir", folder / "run"))
    return Whole(settings, tiny.digest(folder / "run"), tiny.rows(folder / "run"))
