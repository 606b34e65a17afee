"""Whatever fails or is changed, the newest sound checkpoint is found and nothing else is."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import torch

from fundamentallm import Period, StorageError, hookimpl, plugin, state, train
from fundamentallm.testing import TinyRun, assert_same_weights, compose_tiny
from fundamentallm_checkpoint import Checkpoint, resume
from fundamentallm_checkpoint.resume import LoadRequest
from fundamentallm_checkpoint.storage import directory, durable_files
from fundamentallm_checkpoint.storage import publish as publishing
from fundamentallm_checkpoint.storage import snapshot as snapshots
from fundamentallm_checkpoint.storage.manifest import Manifest, step_of
from fundamentallm_checkpoint.storage.retention import Rules

if TYPE_CHECKING:
    from collections.abc import Callable

    from fundamentallm import Run

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors")
RULES = Rules(keep_last=3, monitor="val/loss")


def load(home: Path, name: str | None = None) -> resume.Loaded | None:
    return resume.load([home], LoadRequest(name=name, rules=RULES))


def publish(home: Path, snapshot: dict[str, object], facts: Manifest) -> Manifest:
    return publishing.publish(home, snapshots.pack(snapshot), facts)


@plugin
class Keeps:
    """Keep a tensor, so that a checkpoint has a file for the tensors of plugins."""

    seen: Any = state(default=None)

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.seen = torch.arange(100 + run.progress.step)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    train(compose_tiny(Checkpoint(every=Period(2)), Keeps()), run_dir=folder)
    return folder


@pytest.fixture
def run_folder(two_saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_saved, tmp_path / "run"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(path: Path) -> None:
    shutil.copy(path.parent.parent / "step-00000002" / path.name, path)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent.parent / "step-00000002" / path.name)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip, "was changed after it was written|is not a sound safetensors file"),
    (cut, "bytes instead of"),
    (Path.unlink, "cannot be read: No such file"),
    (swap, "was changed after it was written|bytes instead of"),
    (link, "is not a regular file"),
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("damage", "said"), DAMAGES, ids=["flip", "cut", "delete", "swap", "link"])
def test_a_damaged_file_is_reported_and_the_older_checkpoint_loaded(
    damage: Callable[[Path], None],
    said: str,
    name: str,
    run_folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = run_folder / "checkpoints"
    damage(folder / "step-00000004" / name)
    loaded = load(folder)
    assert loaded is not None
    assert loaded.manifest.step == 2
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"step-00000004: {name}" in warning
    assert any(text in warning for text in said.split("|"))


def reseal(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change a manifest and seal it again, as an attacker who knows the format can."""
    facts = json.loads(path.read_text())
    del facts["seal"]
    change(facts)
    head = json.dumps(facts, indent=1).removesuffix("\n}").encode()
    seal = hashlib.sha256(head).hexdigest()
    path.write_bytes(head + f',\n "seal": "{seal}"\n}}\n'.encode())


def edit(key: str, value: object) -> Callable[[dict[str, object]], None]:
    return lambda facts: facts.update({key: value})


def with_file(name: str, **seal: object) -> Callable[[dict[str, object]], None]:
    return lambda facts: facts["files"].update({name: seal})  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edit("step", 3), "is one of step 3"),
        (edit("step", "4"), "has no valid step"),
        (edit("step", 4.0), "has no valid step"),
        (edit("step", -4), "has no valid step"),
        (edit("format", 0), "has no format"),
        (lambda facts: facts.update(format=True), "has no format"),
        (edit("contents", "most"), "has unknown contents 'most'"),
        (edit("metrics", {"val/loss": "small"}), "a metric that is not a number"),
        (edit("metrics", {"val/loss": True}), "a metric that is not a number"),
        (edit("metrics", {"val/loss": 10**400}), "a metric that is too large for a float"),
        (edit("metrics", {"val/loss": {"$float": "1"}}), "does not know '1'"),
        (edit("files", {}), "does not list model.safetensors"),
        (edit("metrics", None), "has no valid metrics"),
        (with_file("../../settings.toml", size=1, sha256=""), "which is not a plain file name"),
        (with_file("/etc/passwd", size=1, sha256=""), "which is not a plain file name"),
        (with_file(".hidden", size=1, sha256=""), "which is not a plain file name"),
        (
            with_file("model.safetensors", size=-1, sha256=""),
            "no valid size and sha256 of model.safetensors",
        ),
        (
            with_file("model.safetensors", size=True),
            "no valid size and sha256 of model.safetensors",
        ),
        (
            with_file("model.safetensors", size=1, sha256="0" * 63),
            "no valid size and sha256 of model.safete",
        ),
        (with_file("more.bin", size=1, sha256="0" * 64), "more.bin cannot be read: No such file"),
    ],
)
def test_an_edited_manifest_is_reported(
    change: Callable[[dict[str, object]], None],
    said: str,
    run_folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = run_folder / "checkpoints" / "step-00000004" / "manifest.json"
    reseal(path, change)
    loaded = load(run_folder / "checkpoints")
    assert loaded is not None
    assert loaded.manifest.step == 2
    assert said in caplog.text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": NaN}', "\xff", "[" * 100_000, "x" * 2**21]
)
def test_a_file_that_is_no_manifest_is_reported(
    text: str, run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run_folder / "checkpoints" / "step-00000004" / "manifest.json"
    path.write_text(text, encoding="latin-1")
    loaded = load(run_folder / "checkpoints")
    assert loaded is not None
    assert loaded.manifest.step == 2
    assert "step-00000004: manifest.json" in caplog.text


def test_a_file_that_no_manifest_lists_is_not_read(run_folder: Path) -> None:
    newest = run_folder / "checkpoints" / "step-00000004"
    (newest / "more.json").write_text("anything")
    loaded = load(run_folder / "checkpoints")
    assert loaded is not None
    assert loaded.folder == newest


def test_a_run_resumed_from_the_older_checkpoint_ends_bit_identical(
    run_folder: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    flip(run_folder / "checkpoints" / "step-00000004" / "model.safetensors")
    resumed = tiny_run(Checkpoint(every=Period(2)), length=6, run_dir=run_folder)
    assert_same_weights(resumed, tiny_run(length=6, run_dir=tmp_path / "whole"))
    loaded = load(run_folder / "checkpoints", "step-4")
    assert loaded is not None


def test_if_all_checkpoints_are_damaged_the_run_ends_and_does_not_start_again(
    run_folder: Path, tiny_run: TinyRun
) -> None:
    folder = run_folder / "checkpoints"
    flip(folder / "step-00000004" / "model.safetensors")
    cut(folder / "step-00000002" / "state.json")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(StorageError) as caught:
        tiny_run(Checkpoint(every=Period(2)), length=6, run_dir=run_folder)
    assert caught.value.exit_code == 5
    assert "step-00000004: model.safetensors was changed" in str(caught.value)
    assert "step-00000002: state.json has" in str(caught.value)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_newer_format_is_refused_and_not_skipped(run_folder: Path, tiny_run: TinyRun) -> None:
    path = run_folder / "checkpoints" / "step-00000004" / "manifest.json"
    reseal(path, edit("format", 2))
    with pytest.raises(StorageError, match=r"format 2, and this version .* reads format 1: pip "):
        tiny_run(Checkpoint(every=Period(2)), length=6, run_dir=run_folder)


def test_a_pickle_in_place_of_a_file_is_refused_even_with_a_matching_manifest(
    run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = run_folder / "checkpoints" / "step-00000004"
    torch.save({"w": torch.ones(2)}, newest / "model.safetensors")
    path = newest / "manifest.json"
    seal = durable_files.digest(newest / "model.safetensors")
    reseal(path, with_file("model.safetensors", size=seal.size, sha256=seal.sha256))
    loaded = load(run_folder / "checkpoints")
    assert loaded is not None
    assert loaded.manifest.step == 2
    assert "not a sound safetensors file" in caplog.text


# The publish protocol, operation by operation.


def draft(step: int) -> Manifest:
    return Manifest(step=step, run="it", created=0.0, settings="", data="", metrics={})


def snapshot(step: int) -> dict[str, object]:
    weights = torch.full((50, 50), float(step))
    return {"model": {"w": weights}, "optimizer": {"w": {"m": weights}}, "progress": {"step": step}}


class Faults:
    """System calls of which the ``nth`` fails, or ends the process before it is made."""

    def __init__(self, nth: int, fault: Callable[[object], None]) -> None:
        self.left, self.fault = nth, fault

    def __getattr__(self, name: str) -> Callable[..., object]:
        def tried(*words: object) -> object:
            self.left -= name != "close"  # fsync has reported its errors before
            if self.left == 0 and name != "close":
                self.fault(words[0])
            return getattr(durable_files.System, name)(*words)

        return tried

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(durable_files, "system", self)


def refuse(subject: object) -> None:
    path = None if isinstance(subject, int) else str(subject)
    raise OSError(28, "No space left on device", path)


@pytest.mark.parametrize("same_step", [False, True], ids=["a further step", "the same step"])
def test_an_operation_that_fails_leaves_the_earlier_checkpoint_and_no_trace(
    same_step: bool, tmp_path: Path
) -> None:
    step = 1 if same_step else 2
    for nth in range(1, 200):
        home = tmp_path / str(nth)
        publish(home, snapshot(1), draft(1))
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(nth, refuse)
            faults.install(patch)
            try:
                publish(home, snapshot(step), draft(step))
            except StorageError as error:
                assert f"step {step} could not be saved: {home}" in str(error)
                assert "No space left on device" in str(error)
        if faults.left > 0:
            break
        loaded = load(home)
        assert loaded is not None
        assert float(loaded.snapshot["model"]["w"][0, 0]) == loaded.manifest.step
        assert not list(home.glob(".tmp-*"))
    assert nth > 15


def test_a_process_killed_at_any_operation_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for nth in range(1, 200):
        home = tmp_path / str(nth)
        publish(home, snapshot(1), draft(1))
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                Faults(nth, lambda _: os.kill(os.getpid(), 9)).install(patch)
                publish(home, snapshot(2), draft(2))
                os._exit(0)
        killed = os.waitpid(child, 0)[1] == 9
        loaded = load(home)
        assert loaded is not None
        assert float(loaded.snapshot["model"]["w"][0, 0]) == loaded.manifest.step
        directory.prepare(home)
        assert not list(home.glob(".*"))
        if not killed:
            assert loaded.manifest.step == 2
            break
    assert nth > 15


class Notes(durable_files.System):
    """System calls that are noted: what was synced and renamed, by the names of files."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.named: dict[int, str] = {}

    def open(self, path: Path, *words: int) -> int:
        number = super().open(path, *words)
        self.named[number] = path.name
        return number

    def fsync(self, number: int) -> None:
        name = self.named[number]
        self.done.append("folder" if name.startswith(".tmp-") else name)
        super().fsync(number)

    def rename(self, path: Path, target: Path) -> None:
        self.done.append("renamed")
        super().rename(path, target)


def test_every_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "home", snapshot(1), draft(1))
    monkeypatch.setattr(durable_files, "system", notes := Notes())
    publish(tmp_path / "home", snapshot(2), draft(2))
    written = ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert notes.done == [*written, "manifest.json", "folder", "renamed", "home"]


def test_a_file_that_grows_too_large_is_named(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"optimizer\.safetensors: File too large"):
            publish(tmp_path / "home", wide(), draft(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "home").iterdir()) == []


def test_a_state_too_large_to_be_read_back_is_refused_when_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, large = tmp_path / "home", snapshot(1) | {"plugins": {"it": {"seen": "x" * 1000}}}
    publish(home, large, draft(1))
    size = (home / "step-00000001" / "state.json").stat().st_size
    monkeypatch.setattr(snapshots, "_STATE_LIMIT", size)
    publish(home, large, draft(2))
    loaded = load(home, "step-2")
    assert loaded is not None
    assert loaded.snapshot["plugins"] == large["plugins"]
    monkeypatch.setattr(snapshots, "_STATE_LIMIT", size - 1)
    with pytest.raises(StorageError, match=rf"state\.json would have {size:,} bytes, and at most"):
        publish(home, large, draft(3))
    assert sorted(path.name for path in home.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_manifest_too_large_to_be_read_back_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    metrics = {f"section/{number:040}": 1.0 for number in range(20_000)}
    with pytest.raises(StorageError, match=r"manifest\.json would have 1,\d{3},\d{3} bytes"):
        publish(tmp_path, snapshot(1), attrs.evolve(draft(1), metrics=metrics))
    assert list(tmp_path.iterdir()) == []


def wide() -> dict[str, object]:
    moments = {"w": {"m": torch.ones(1000)}}
    return {"model": {"w": torch.ones(10)}, "optimizer": moments, "progress": {}}


def test_retention_continues_where_a_checkpoint_cannot_be_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 7):
        publish(tmp_path, snapshot(step), draft(step))
    removed = durable_files.remove

    def remove(path: Path) -> None:
        if "00000002" in path.name:
            raise OSError(16, "Device or resource busy", str(path))
        removed(path)

    monkeypatch.setattr(durable_files, "remove", remove)
    directory.prune(tmp_path, directory.sound(tmp_path), RULES)
    assert [step_of(path.name) for path in directory.folders(tmp_path)] == [6, 5, 4]
    assert "could not be deleted: Device or resource busy" in caplog.text


def test_a_checkpoint_that_is_not_sound_does_not_count_as_one_of_the_last(tmp_path: Path) -> None:
    for step in range(1, 6):
        publish(tmp_path, snapshot(step), draft(step))
    known = directory.sound(tmp_path)
    cut(tmp_path / "step-00000004" / "model.safetensors")
    directory.prune(tmp_path, known, Rules(keep_last=2))
    assert [step_of(path.name) for path in directory.folders(tmp_path)] == [5, 4, 3]
