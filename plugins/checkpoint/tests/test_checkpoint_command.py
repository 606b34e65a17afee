"""``fundamentallm checkpoints``: what it lists, what it finds damaged, and how light it is."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from fundamentallm import SettingsError, StorageError, train
from fundamentallm_checkpoint.cli import checkpoints

if TYPE_CHECKING:
    from collections.abc import Iterable

PARTS = """
from fundamentallm import plugin
from fundamentallm.testing import TinyParts

@plugin
class Parts(TinyParts):
    pass
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two instances, of which one keeps its checkpoints elsewhere."""
    place = tmp_path_factory.mktemp("it")
    (place / "parts.py").write_text(PARTS)
    (place / "it.toml").write_text(
        'plugins = ["parts.py", "checkpoint", "archive"]\n'
        "run = {length = 6, validate_every = 2, device = 'cpu'}\n"
        "checkpoint = {every = 2, keep_every = 4}\n"
        f"archive = {{plugin = 'checkpoint', every = 3, contents = 'model', folder = '{place}/far',"
        " mode = 'max'}\n"
    )
    return train(place / "it.toml", run_dir=place / "run").folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def listed(*words: object) -> list[str]:
    done = CliRunner().invoke(checkpoints, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output.splitlines()


def cells(lines: Iterable[str]) -> list[list[str]]:
    return [re.split(r"  +", line) for line in lines]


def test_lists_the_checkpoints_of_all_instances(trained: Path) -> None:
    found = cells(listed(trained))
    assert found[0] == ["checkpoint", "saved", "size", "holds", "tags", "metric", "state"]
    assert [row[0] for row in found[1:]] == [
        "step-00000002",
        "step-00000004",
        "step-00000006",
        "archive/step-00000003",
        "archive/step-00000006",
    ]
    assert {row[-1] for row in found[1:]} == {"sound"}
    assert [row[3] for row in found[1:]] == ["all"] * 3 + ["model"] * 2
    path = trained / "checkpoints" / "step-00000006" / "manifest.json"
    loss = json.loads(path.read_text())["metrics"]["val/loss"]
    assert found[3][4:6] == ["final, best", f"val/loss {loss:.6g}"]
    assert found[2][4] == "milestone"
    assert "best" in found[5][4], "of the greatest losses at checkpoints of its own"


def test_a_missing_file_is_found_without_reading_and_ends_with_exit_code_5(run: Path) -> None:
    (run / "checkpoints" / "step-00000004" / "state.json").unlink()
    with pytest.raises(StorageError, match="1 of 3 checkpoints are damaged") as caught:
        listed_alone(run)
    assert caught.value.exit_code == 5
    done = CliRunner().invoke(checkpoints, [str(run)])
    assert "step-00000004  damaged: state.json cannot be read" in re.sub(
        r" {2,}", "  ", done.output
    )


def listed_alone(run: Path, *words: str) -> list[str]:
    """List a copied run: its archive stays with the original."""
    (run / "settings.toml").unlink()
    (run / "checkpoint-folders").unlink()
    return listed(run, *words)


def test_a_changed_byte_is_found_by_reading_all(run: Path) -> None:
    path = run / "checkpoints" / "step-00000002" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (run / "settings.toml").unlink()
    assert "damaged" not in "".join(listed(run))
    with pytest.raises(StorageError):
        listed(run, "--verify")
    done = CliRunner().invoke(checkpoints, [str(run), "--verify"])
    (bad,) = [line for line in done.output.splitlines() if "damaged" in line]
    assert bad.startswith("step-00000002")
    assert bad.endswith(
        "damaged: model.safetensors was changed after it was written (its sha256 differs)"
    )


def test_checkpoints_of_another_run_are_marked_in_the_list(run: Path) -> None:
    (run / "run-id").write_text("0123456789ab")
    assert all("of another run" in line for line in listed_alone(run)[1:])


def test_checkpoints_are_listed_although_a_plugin_is_not_installed(run: Path) -> None:
    (run / "settings.toml").write_text('plugins = ["no_such_plugin"]\n[run]\nlength = 5\n')
    assert len(listed(run)) == 6


def test_a_folder_that_is_no_run_folder_and_a_run_without_checkpoints_are_reported(
    tmp_path: Path,
) -> None:
    with pytest.raises(SettingsError, match="is not a run folder"):
        listed(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert listed(tmp_path) == [f"no checkpoints in {tmp_path}"]


def test_needs_no_torch(trained: Path) -> None:
    code = (
        "import sys\n"
        "from fundamentallm_checkpoint.cli import checkpoints\n"
        f"checkpoints(['{trained}', '--verify'], standalone_mode=False)\n"
        "print(*sys.modules)"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "archive/step-00000003" in done.stdout
    assert not {"torch", "numpy", "safetensors"} & set(done.stdout.split())


def test_a_checkpoint_of_a_newer_version_is_not_called_damaged(run: Path) -> None:
    path = run / "checkpoints" / "step-00000004" / "manifest.json"
    head = path.read_text().rpartition(',\n "seal"')[0].replace('"format": 1', '"format": 2')
    seal = hashlib.sha256(head.encode()).hexdigest()
    path.write_text(f'{head},\n "seal": "{seal}"\n}}\n')
    (line,) = [line for line in listed(run, "--verify") if line.startswith("step-00000004")]
    assert "  needs a newer version: it has format 2" in line
    assert "damaged" not in line


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text("")
    with pytest.raises(SettingsError, match=r"b\.toml: is not a run folder"):
        listed(tmp_path / "b.toml")
