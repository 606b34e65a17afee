"""Which checkpoint is taken, and which is none: poisoned, of the model only, malicious, or old."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import resource
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fundamentallm import (
    NotFiniteError,
    Period,
    StorageError,
    hookimpl,
    load_run,
    plugin,
    state,
    train,
)
from fundamentallm.testing import TinyRun, compose_tiny
from fundamentallm_checkpoint import Checkpoint, resume
from fundamentallm_checkpoint.resume import LoadRequest
from fundamentallm_checkpoint.storage import json_tree, manifest, safetensors, strict_json
from fundamentallm_checkpoint.storage import snapshot as snapshots
from fundamentallm_checkpoint.storage.manifest import MODEL, NewerFormatError, UnsoundError
from fundamentallm_checkpoint.storage.retention import Rules
from fundamentallm_checkpoint.storage.safetensors import Memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from fundamentallm import Run

TWO = Period(2)
RULES = Rules(keep_last=3)


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def facts(folder: Path, step: int) -> dict[str, Any]:
    path = folder / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    return json.loads(path.read_text())  # type: ignore[no-any-return]


@plugin
class Poison:
    """Puts a number that is none into a weight at a step, or into a buffer."""

    free = ("at", "asks_for")

    at: int = 3
    name: str = "hidden.weight"
    value: float = float("nan")
    asks_for: str | None = None
    begins: int = state(-1)

    @hookimpl
    def adapt_model(self, run: Run) -> None:
        run.model.register_buffer("mask", torch.zeros(3))
        run.wanted_checkpoint = run.wanted_checkpoint or self.asks_for

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self.begins = run.progress.step

    @hookimpl
    def settle_step(self, run: Run) -> None:
        if run.progress.step == self.at:
            run.model.state_dict()[self.name].view(-1)[1] = self.value


@pytest.fixture
def poisoned(tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    """A run that has diverged, with checkpoints of four steps of which the last two hold a NaN."""
    with pytest.raises(Exception, match="diverged"):
        tiny_run(Checkpoint(every=Period(1), keep_last=9), Poison(), length=5, log_every=99)
    assert [facts(tmp_path / "run", step)["finite"] for step in (1, 2, 3, 4)] == [
        True,
        True,
        False,
        False,
    ]
    caplog.clear()
    return tmp_path / "run"


@pytest.mark.parametrize("wish", [None, "latest"])
def test_checkpoints_with_nan_are_skipped_with_a_warning_that_names_them(
    wish: str | None, poisoned: Path, tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    cured = Poison(at=0, asks_for=wish)
    run = tiny_run(Checkpoint(every=Period(1), keep_last=9), cured, length=5, log_every=99)
    assert (cured.begins, run.outcome) == (2, "finished")
    reported = [r.getMessage() for r in caplog.records if "NaN or infinity" in r.getMessage()]
    assert ["step-00000004: it holds" in reported[0], "step-00000003: it holds" in reported[1]] == [
        True,
        True,
    ]
    assert "to load it all the same, name step-00000004" in reported[0]


def test_a_checkpoint_with_nan_is_loaded_if_it_is_named(poisoned: Path, tiny_run: TinyRun) -> None:
    cured = Poison(at=0, asks_for="step-4")
    with pytest.raises(Exception, match="diverged"):
        tiny_run(Checkpoint(every=Period(1)), cured, length=5, log_every=99)
    assert cured.begins == 4


def test_if_all_checkpoints_hold_nan_the_run_does_not_start_again(
    poisoned: Path, tiny_run: TinyRun
) -> None:
    for step in (1, 2):
        shutil.rmtree(poisoned / "checkpoints" / f"step-{step:08d}")
    with pytest.raises(
        StorageError, match=r"no sound checkpoint(?s:.*)step-00000003: it holds NaN"
    ):
        tiny_run(Checkpoint(every=Period(1)), Poison(at=0), length=5, log_every=99)


@pytest.mark.parametrize(
    ("name", "value", "finite"),
    [("mask", "-inf", True), ("mask", "nan", False), ("hidden.bias", "inf", False)],
)
def test_an_infinity_in_a_mask_is_accepted(
    name: str, value: str, finite: bool, tiny_run: TinyRun, tmp_path: Path
) -> None:
    poison = Poison(at=2, name=name, value=float(value))
    with contextlib.suppress(NotFiniteError):
        tiny_run(Checkpoint(every=Period(1)), poison, length=3, log_every=99)
    assert facts(tmp_path / "run", 2)["finite"] is finite


PARTS = """
from fundamentallm import plugin
from fundamentallm.testing import TinyParts

@plugin
class Parts(TinyParts):
    pass
"""


def start(tmp_path: Path, listed: str, tables: str, *overrides: str) -> Run:
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "it.toml").write_text(
        f'plugins = ["{tmp_path}/parts.py", {listed}]\n'
        f"run = {{length = 6, validate_every = 1, device = 'cpu'}}\n{tables}"
    )
    return train(tmp_path / "it.toml", run_dir=tmp_path / "run", overrides=overrides)


SMALL = "checkpoint = {every = 2, keep_last = 9, contents = 'model'}\n"


def test_a_checkpoint_of_the_model_only_has_no_optimizer_state_and_logs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(tmp_path, '"checkpoint"', SMALL)
    newest = run.folder / "checkpoints" / "step-00000006"
    assert sorted(path.name for path in newest.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "state.json",
    ]
    assert facts(run.folder, 6)["contents"] == MODEL
    assert "all checkpoints will hold the model only: the run cannot be resumed" in caplog.text


def test_a_checkpoint_of_the_model_only_can_be_loaded_and_not_resumed_from(tmp_path: Path) -> None:
    run = start(tmp_path, '"checkpoint"', SMALL)
    loaded = load_run(run.folder, at="step-4").model.state_dict()
    kept = safetensors.read(run.folder / "checkpoints" / "step-00000004" / "model.safetensors")
    assert all(loaded[name].equal(tensor) for name, tensor in kept.items())
    before = saved(run.folder / "checkpoints")
    with pytest.raises(StorageError) as caught:
        start(tmp_path, '"checkpoint"', SMALL, "run.length=8")
    assert "step-00000006: it holds the model only, so no run can continue from it" in str(
        caught.value
    )
    assert saved(run.folder / "checkpoints") == before


def test_a_loaded_run_knows_its_checkpoint(tmp_path: Path) -> None:
    tables = "checkpoint = {every = 2}\n"
    run = start(tmp_path, '"checkpoint"', tables)
    earlier, latest = load_run(run.folder, at="step-2"), load_run(run.folder)
    assert earlier.loaded is not None
    assert latest.loaded is not None
    assert earlier.loaded.folder == run.folder / "checkpoints" / "step-00000002"
    assert (earlier.loaded.step, earlier.progress.step) == (2, 2)
    assert latest.loaded.step == run.progress.step == latest.progress.step
    assert latest.loaded.metrics["train/loss"] == run.history[-1]["train/loss"]
    assert len({earlier.loaded.digest, latest.loaded.digest}) == 2
    again = load_run(run.folder).loaded
    assert again is not None
    assert again.digest == latest.loaded.digest


def test_a_run_resumes_from_the_newest_complete_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = (
        "checkpoint = {every = 4, save_final = false}\n"
        "weights = {plugin = 'checkpoint', every = 1, contents = 'model', keep_last = 9}\n"
    )
    start(tmp_path, '"weights", "checkpoint"', tables)
    caplog.set_level(logging.INFO)
    caplog.clear()
    run = start(tmp_path, '"weights", "checkpoint"', tables, "run.length=8")
    assert f"loaded {run.folder}/checkpoints/step-00000004" in caplog.text
    assert "model only" not in caplog.text
    assert saved(run.folder / "checkpoints" / "weights") == [1, 2, 3, 4, 5, 6, 7, 8]


# Files that an attacker made.


def sealed(folder: Path, name: str, data: bytes) -> None:
    """Put data in the place of a file, and correct its size and hash in the manifest."""
    (folder / name).write_bytes(data)
    reseal(folder, name, len(data), hashlib.sha256(data).hexdigest())


def reseal(folder: Path, name: str, size: int, sha256: str) -> None:
    """Change a file's size and hash in the manifest, with a valid seal."""
    path = folder / "manifest.json"
    table = json.loads(path.read_text())
    del table["seal"]
    table["files"][name] = {"size": size, "sha256": sha256}
    head = json.dumps(table, indent=1).removesuffix("\n}").encode()
    path.write_bytes(head + f',\n "seal": "{hashlib.sha256(head).hexdigest()}"\n}}\n'.encode())


@pytest.fixture
def one_saved(tmp_path: Path) -> Path:
    train(compose_tiny(Checkpoint(every=TWO), length=2), run_dir=tmp_path / "it")
    return tmp_path / "it" / "checkpoints" / "step-00000002"


def refusal(folder: Path) -> str:
    with pytest.raises(StorageError) as caught:
        resume.load([folder.parent], LoadRequest(rules=RULES))
    return str(caught.value)


def file_of(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(**changed: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed


W = b"12345678"
TENSORS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ends too early"),
    "a pickle": (b"\x80\x04\x95" + bytes(100), "larger than|ends too early"),
    "a header of exabytes": ((2**62).to_bytes(8, "little") + W, "its header is larger"),
    "a header longer than the file": ((2**20).to_bytes(8, "little") + W, "ends too early"),
    "a deep header": (file_of(b"[" * 10**5), "nested too deeply"),
    "a header that is no table": (file_of([]), "not a table"),
    "a name twice": (
        file_of(b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2), W),
        "a key twice",
    ),
    "a shape of exabytes": (file_of({"w": entry(shape=[2**60])}, W), "does not fit"),
    "a shape of nothing and exabytes": (
        file_of({"w": entry(shape=[0, 2**50, 2**50], data_offsets=[0, 0])}),
        "that cannot be",
    ),
    "a negative shape": (file_of({"w": entry(shape=[-2])}, W), "has no valid dtype and shape"),
    "a shape of booleans": (
        file_of({"w": entry(shape=[True, 2])}, W),
        "has no valid dtype and shape",
    ),
    "an unknown kind": (file_of({"w": entry(dtype="PICKLE")}, W), "has no valid dtype and shape"),
    "a kind that is no word": (
        file_of({"w": entry(dtype=["F32"])}, W),
        "has no valid dtype and shape",
    ),
    "no place": (file_of({"w": {"dtype": "F32", "shape": [2]}}, W), "has no valid offsets"),
    "no entry": (file_of({"w": 3}, W), "has no valid offsets"),
    "a place outside": (file_of({"w": entry(data_offsets=[8, 16])}, W), "that cannot be"),
    "a place before": (file_of({"w": entry(data_offsets=[-8, 0])}, W), "has no valid offsets"),
    "one place for two": (file_of({"w": entry(), "v": entry()}, W), "that cannot be"),
    "more bytes than tensors": (file_of({"w": entry()}, W + W), "do not fill the file"),
    "fewer bytes than tensors": (file_of({"w": entry()}, W[:4]), "ends too early|do not fill"),
    "an alias of nothing": (
        file_of({"__metadata__": {"aliases": '{"v": "x"}'}, "w": entry()}, W),
        "names no tensor",
    ),
    "an alias of another's name": (
        file_of({"__metadata__": {"aliases": '{"w": "w"}'}, "w": entry()}, W),
        "names no tensor",
    ),
    "aliases that are no table": (
        file_of({"__metadata__": {"aliases": "[]"}, "w": entry()}, W),
        "aliases are not a table",
    ),
    "metadata that is no table": (file_of({"__metadata__": 1, "w": entry()}, W), "not a table"),
}


@pytest.mark.parametrize(("data", "said"), TENSORS.values(), ids=TENSORS)
def test_an_invalid_file_of_tensors_is_refused(data: bytes, said: str, one_saved: Path) -> None:
    sealed(one_saved, "model.safetensors", data)
    reported = refusal(one_saved)
    assert "model.safetensors is not a sound safetensors file" in reported
    assert any(text in reported for text in said.split("|")), reported


def test_a_safetensors_file_of_another_program_can_be_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    given = {
        "b": torch.randn(3, 4),
        "a": torch.arange(5),
        "e": torch.empty(0, 2),
        "s": torch.ones(()),
    }
    save_file(given, tmp_path / "it", metadata={"by": "another"})
    found = safetensors.read(tmp_path / "it")
    assert found.keys() == given.keys()
    assert all(found[name].equal(tensor) for name, tensor in given.items())


STATES: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"\x80\x04\x95cos\nsystem\n", "state.json "),
    "a list": (b"[]", "no tables 'model' and 'optimizer'"),
    "no tables": (b'{"model": [], "optimizer": {}}', "no tables 'model' and 'optimizer'"),
    "a deep tree": (b'{"model": ' + b"[" * 10**5, "nested too deeply"),
    "a tree of many marks": (
        b'{"model": {}, "optimizer": {}, "x": ' + b'{"$tuple": [' * 400 + b"]}" * 400 + b"}",
        "state",
    ),
    "a mark that means nothing": (
        b'{"model": {}, "optimizer": {}, "x": {"$import": "os"}}',
        "is unknown or its content is wrong",
    ),
    "a tensor that is not there": (
        b'{"model": {}, "optimizer": {}, "x": {"$tensor": "../model"}}',
        "is unknown or its content is wrong",
    ),
    "a number that is none": (b'{"model": {}, "optimizer": {}, "x": NaN}', "holds NaN"),
    "a number of many digits": (b'{"model": {}, "x": ' + b"9" * 10**5 + b"}", "limit"),
}


@pytest.mark.parametrize(("data", "said"), STATES.values(), ids=STATES)
def test_an_invalid_state_is_refused(data: bytes, said: str, one_saved: Path) -> None:
    sealed(one_saved, "state.json", data)
    assert said in refusal(one_saved)


def test_a_fifo_or_a_link_is_not_opened(one_saved: Path) -> None:
    path = one_saved / "manifest.json"
    path.symlink_to(path.rename(one_saved.parent / "elsewhere.json"))
    assert "manifest.json cannot be read" in refusal(one_saved)
    path.unlink()
    os.mkfifo(path)
    assert "manifest.json cannot be read: is not a regular file" in refusal(one_saved)


def peak() -> int:
    """Return the most memory that the process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def test_files_of_absurd_size_are_refused_with_little_memory(
    one_saved: Path, tmp_path: Path
) -> None:
    names = ["manifest.json", "state.json", "model.safetensors"]
    for name in names:
        folder = Path(shutil.copytree(one_saved.parent, tmp_path / name)) / one_saved.name
        os.truncate(folder / name, 2**40)  # a terabyte of holes takes no space on the disk
        with (folder / name).open("rb+") as file:
            file.write((2**39).to_bytes(8, "little"))
        if name != names[0]:
            reseal(folder, name, 2**40, "0" * 64)
        child = os.fork()  # whose peak is its own
        if child == 0:
            before = peak()
            reported = refusal(folder)
            fine = name in reported and "larger than" in reported and peak() - before < 32
            os._exit(0 if fine else 1)
        assert os.waitpid(child, 0)[1] == 0, name


def holds_in_a_child(check: Callable[[], bool]) -> bool:
    """Return what ``check`` says in a process of its own, whose memory is its own."""
    child = os.fork()
    if child == 0:
        said = False
        try:
            said = check()
        finally:
            os._exit(0 if said else 1)
    return os.waitpid(child, 0)[1] == 0


def hollow(folder: Path, size: int) -> None:
    """Make the weights a sparse file, as large as its header and the manifest say."""
    head = file_of({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    (folder / "model.safetensors").write_bytes(head)
    os.truncate(folder / "model.safetensors", len(head) + size)
    reseal(folder, "model.safetensors", len(head) + size, "0" * 64)


def test_a_sparse_file_larger_than_the_memory_is_refused_and_the_older_checkpoint_loaded(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    home = tiny_run(Checkpoint(every=TWO), length=4).folder / "checkpoints"
    hollow(home / "step-00000004", 2**43)
    said = (
        f"model.safetensors is not a sound safetensors file: its tensors would take {2**43:,} bytes"
    )

    def takes_the_other() -> bool:
        before = peak()
        loaded = resume.load([home], LoadRequest(rules=RULES))
        fine = loaded is not None and loaded.manifest.step == 2 and said in caplog.text
        return fine and peak() - before < 32

    assert holds_in_a_child(takes_the_other)


def test_a_checkpoint_that_does_not_fit_into_the_free_memory_is_an_error_and_not_skipped(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tiny_run(Checkpoint(every=TWO), length=4).folder / "checkpoints"
    monkeypatch.setattr(safetensors, "memory", lambda: Memory(total=2**50, free=100))
    reported = refusal(home / "step-00000004")
    assert re.search(r"step-00000004: model.safetensors holds \S+ bytes .* 100 bytes", reported)
    assert "step-00000002" not in reported, "which would lose two steps"
    monkeypatch.setattr(safetensors, "memory", lambda: None)  # a system that does not report it
    loaded = resume.load([home], LoadRequest(rules=RULES))
    assert loaded is not None
    assert loaded.manifest.step == 4


def test_a_file_larger_than_the_limit_of_the_process_is_named(one_saved: Path) -> None:
    hollow(one_saved, 2**30)

    def is_reported() -> bool:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, taken + 2**28))
        said = f"model.safetensors holds a tensor of {2**30:,} bytes, too many"
        return said in refusal(one_saved)

    assert holds_in_a_child(is_reported)


def test_memory_is_that_of_the_machine_or_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(safetensors, "_MEMINFO", facts)
    monkeypatch.setattr(safetensors, "_MEMORY_LIMITS", (limit, tmp_path / "none"))
    assert safetensors.memory() is None
    facts.write_text("MemTotal: 8 kB\nMemFree: 1 kB\nMemAvailable: 5 kB\n")
    assert safetensors.memory() is None
    facts.write_text(facts.read_text() + "SwapTotal: 2 kB\nSwapFree: 1 kB\nHugePages_Free: 0\n")
    assert safetensors.memory() == Memory(total=10 * 1024, free=6 * 1024)
    limit.write_text("max\n")
    assert safetensors.memory() == Memory(total=10 * 1024, free=6 * 1024)
    limit.write_text("7000\n")
    assert safetensors.memory() == Memory(total=7000, free=6 * 1024)


def test_a_tree_that_is_too_deep_to_be_read_back_is_refused_when_it_is_saved(
    tmp_path: Path,
) -> None:
    tree: Any = 1
    for _ in range(strict_json.DEPTH - 1):
        tree = (tree,)
    whole = {"model": {}, "optimizer": {}, "x": tree}
    assert json_tree.join(json.loads(snapshots.pack(whole).state), {}) == whole
    with pytest.raises(StorageError, match=r"x/1/0/0/.*at most 100 levels"):
        snapshots.pack(whole | {"x": (tree, (tree,))})


def test_a_header_that_is_too_large_to_be_read_back_is_refused_when_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"w": torch.ones(2)}
    size = len(safetensors._header(given, {})) - 8
    monkeypatch.setattr(safetensors, "LIMIT", size)
    safetensors.write(tmp_path / "it", given)
    assert safetensors.read(tmp_path / "it")["w"].tolist() == [1, 1]
    monkeypatch.setattr(safetensors, "LIMIT", size - 1)
    with pytest.raises(StorageError, match="the header of a safetensors file would have"):
        safetensors.write(tmp_path / "other", given)


# Every byte counts.


@pytest.mark.parametrize(
    "change",
    [lambda byte: byte ^ 1, lambda byte: 0x30 if byte != 0x30 else 0x20],
    ids=["the lowest bit", "a zero or a blank"],
)
def test_no_byte_of_a_manifest_can_change_unnoticed(
    change: Callable[[int], int], one_saved: Path
) -> None:
    path = one_saved / "manifest.json"
    whole = path.read_bytes()
    assert manifest.read(one_saved).step == 2
    for place, byte in enumerate(whole):
        changed = bytearray(whole)
        changed[place] = change(byte)
        if changed != whole:
            path.write_bytes(changed)
            with pytest.raises(UnsoundError) as caught:
                manifest.read(one_saved)
            assert not isinstance(caught.value, NewerFormatError)
