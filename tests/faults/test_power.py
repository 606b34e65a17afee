"""Power is cut at every point of a run's saves: whatever was not synced may be lost, in any part.

The disk here is a model that promises no more than POSIX: what is written is there after the fsync
of the file; what is made, renamed or deleted in a folder, after the fsync of the folder. Until
then each such change may have reached the disk or not.
"""

from __future__ import annotations

import logging
import pickle
import random
import shutil
from functools import partial
from pathlib import Path

import layer
import pytest
import tiny

from fundamentallm_checkpoint import resume, run_id
from fundamentallm_checkpoint.resume import LoadRequest
from fundamentallm_checkpoint.storage import directory
from fundamentallm_checkpoint.storage.manifest import step_of
from fundamentallm_checkpoint.storage.retention import Rules

RULES = Rules(keep_last=3, monitor="val/loss")


class File:
    """What a file holds, and what of it is on the disk."""

    def __init__(self):
        self.data, self.durable = b"", b""

    def sync(self):
        self.durable = self.data

    def put(self, path, keep):
        # What was written and not synced may be there in part: blocks that hold nothing.
        kept = self.data if keep() else self.durable
        path.write_bytes(
            kept if keep() else kept[: len(kept) // 2] if kept != self.durable else kept
        )


class Folder:
    """The names in a folder, those on the disk, and the changes since."""

    def __init__(self):
        self.names, self.durable, self.pending = {}, {}, []

    def change(self, changes):
        self.pending.append(changes)
        self.names = _changed(self.names, changes)

    def sync(self):
        self.durable, self.pending = dict(self.names), []

    def put(self, path, keep):
        path.mkdir(exist_ok=True)
        names = self.durable
        for changes in self.pending:
            names = _changed(names, changes) if keep() else names
        for name, node in names.items():
            node.put(path / name, keep)


def _changed(names, changes):
    return {name: node for name, node in (names | changes).items() if node is not None}


class Disk:
    """A disk on which the recorded system calls of a run's saves are made again."""

    def __init__(self, root):
        self.root, self.top = root, Folder()

    def find(self, path):
        node = self.top
        for part in Path(path).relative_to(self.root).parts:
            node = node.names[part]
        return node

    def above(self, path):
        return self.find(Path(path).parent), Path(path).name

    def make(self, name, path, *words):
        if not Path(path).is_relative_to(self.root):
            return  # the run folder's own name, which is there from the beginning
        if name == "mkdir":
            folder, last = self.above(path)
            folder.change({last: Folder()})
        elif name == "open" and len(words) > 1:  # with permissions: it makes a file
            folder, last = self.above(path)
            folder.change({last: File()})
        elif name == "write":
            self.find(path).data += words[0]
        elif name == "fsync":
            self.find(path).sync()
        elif name in ("unlink", "rmdir"):
            folder, last = self.above(path)
            folder.change({last: None})
        elif name == "rename":
            folder, last = self.above(path)
            target, new = self.above(words[0])
            assert folder is target, "a rename from folder to folder is two changes"
            folder.change({last: None, new: folder.names[last]})


@pytest.fixture(scope="session")
def recorded(uninterrupted, tmp_path_factory):
    """The system calls of all saves of a run, and the run's folder."""
    folder = tmp_path_factory.mktemp("recorded")
    before = partial(layer.record, folder / "calls")
    tiny.end(
        tiny.start("train", uninterrupted.settings, "--run-dir", folder / "run", before=before)
    )
    return pickle.loads((folder / "calls").read_bytes()), folder / "run"


def cuts(calls, root, every=1):
    """Yield the disk after each call but most writes, and the step that was announced last."""
    disk, announced = Disk(root), 0
    for number, (name, path, *words) in enumerate(calls):
        if name == "published":
            announced = step_of(Path(path).name)
        elif name not in ("flock", "statvfs"):
            disk.make(name, path, *words)
        if name != "write" or number % every == 0:
            yield disk, announced


def survives(disk, announced, place):
    """See that what is on the disk holds a sound checkpoint, none older than the one announced."""
    home = place / "checkpoints"
    directory.recover(home)
    run = run_id.read_id(place)
    loaded = resume.load([home], LoadRequest(rules=RULES, run=run)) if home.exists() else None
    assert (loaded.manifest.step if loaded else 0) >= announced
    assert not announced or run
    return loaded


def keeping(kind, chance):
    kinds = {"nothing": lambda: False, "all": lambda: True, "some": lambda: chance.random() < 0.5}
    return kinds[kind]


def cut_everywhere(kind, recorded, place, every, some=1):
    """Cut the power after every call, but for most writes; or after every so many of these."""
    seen = set()
    for number, (disk, announced) in enumerate(cuts(*recorded, every=every)):
        if number % some == 0:
            disk.top.put(place, keeping(kind, random.Random(number)))
            survives(disk, announced, place)
            seen.add(announced)
            shutil.rmtree(place)
    assert seen == {0, *tiny.SAVES}
    return number


@pytest.mark.parametrize("kind", ["nothing", "some"])
def test_a_power_cut_at_any_point_leaves_a_sound_checkpoint(kind, recorded, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    assert cut_everywhere(kind, recorded, tmp_path / "run", every=50, some=3) > 200


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nothing", "all"])
def test_a_power_cut_after_every_single_call_leaves_a_sound_checkpoint(
    kind, recorded, tmp_path, caplog
):
    caplog.set_level(logging.ERROR)
    assert cut_everywhere(kind, recorded, tmp_path / "run", every=1) > 600


def resumed(disk, announced, recorded, uninterrupted, place):
    disk.top.put(place, keeping("some", random.Random(str(place))))
    shutil.copy(recorded[1] / "settings.toml", place)
    shutil.copy(recorded[1] / "metrics.jsonl", place)
    tiny.end(tiny.resume(place))
    assert tiny.digest(place) == uninterrupted.digest
    assert tiny.rows(place) == uninterrupted.rows


def test_a_run_resumed_after_a_power_cut_ends_with_the_same_bits(recorded, uninterrupted, tmp_path):
    points = sum(1 for _ in cuts(*recorded, every=10**9))
    chosen = random.Random(4).sample(range(points), 3)
    for number, (disk, announced) in enumerate(cuts(*recorded, every=10**9)):
        if number in chosen:
            resumed(disk, announced, recorded, uninterrupted, tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_power_cut_that_loses_any_part_leaves_a_sound_checkpoint(
    seed, recorded, uninterrupted, tmp_path
):
    chance, points = random.Random(seed), sum(1 for _ in cuts(*recorded))
    chosen = chance.randrange(points)
    for number, (disk, announced) in enumerate(cuts(*recorded)):
        place = tmp_path / str(number)
        disk.top.put(place, keeping("some", chance))
        survives(disk, announced, place)
        shutil.rmtree(place)
        if number == chosen:
            resumed(disk, announced, recorded, uninterrupted, tmp_path / "run")
