"""A checkpoint made to do harm is refused: nothing of it runs, leads elsewhere or takes memory."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil

import pytest
import tiny
from test_damaged import NEWEST, OLDER, killed, reseal  # noqa: F401 - killed is a fixture

LIMIT = 40
"""MB that a refusal may take more than resuming does without one."""
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def put(folder, name, data, size=None):
    """Put data in place of a file, with a manifest that agrees."""
    path = folder / name
    path.write_bytes(data)
    if size:
        os.truncate(path, size)  # holes, which take no space on the disk
    sha256 = hashlib.sha256(data).hexdigest() if not size else "0" * 64
    facts = {"size": path.stat().st_size, "sha256": sha256}
    reseal(folder / "manifest.json", lambda table: table["files"].update({name: facts}))


def tensors(header, body=b"12345678"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def hollow(path, size):
    """Put a file of holes in place of another, as large as its header and the manifest tell."""
    head = tensors({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, b"")
    put(path.parent, path.name, head, len(head) + size)


def list_file(name):
    def change(folder):
        (folder / "x").mkdir()
        seal = {"size": 8, "sha256": hashlib.sha256(b"12345678").hexdigest()}
        (folder.parent / "outside").write_bytes(b"12345678")
        reseal(folder / "manifest.json", lambda table: table["files"].update({name: seal}))

    return change


def poison(key):
    def change(folder):
        path = folder / "manifest.json"
        reseal(path, lambda table: table.update({key: float("nan")}))

    return change


def entry(**facts):
    """Change what a manifest says about the weights."""
    return lambda folder: reseal(
        folder / "manifest.json", lambda table: table["files"]["model.safetensors"].update(facts)
    )


def seal(folder, text):
    """Put text before the content of a manifest."""
    path = folder / "manifest.json"
    head = b"{" + text + path.read_bytes().rpartition(b',\n "seal": "')[0].removeprefix(b"{")
    path.write_bytes(
        head + b',\n "seal": "' + hashlib.sha256(head).hexdigest().encode() + b'"\n}\n'
    )


def link_out(folder):
    path = folder / "model.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def link_of_the_same_size(folder):
    """Lead out by a link as long as its target, so that the size does not reveal it."""
    target, size = folder.parent / "elsewhere", 1000
    target.write_bytes(b"x" * size)
    way = f"{target.parent}/".ljust(size - len(target.name), "/") + target.name
    (folder / "more").symlink_to(way)
    facts = {"size": size, "sha256": hashlib.sha256(b"x" * size).hexdigest()}
    reseal(folder / "manifest.json", lambda table: table["files"].update(more=facts))


def state(text):
    return lambda folder: put(folder, "state.json", text)


EVIL = {
    "a pickle for weights": lambda f: put(
        f, "model.safetensors", pickle.dumps(Touch(f.parent / "run!"))
    ),
    "a pickle for state": lambda f: put(f, "state.json", pickle.dumps(Touch(f.parent / "run!"))),
    "a pickle for a manifest": lambda f: (f / "manifest.json").write_bytes(
        pickle.dumps(Touch(f.parent / "run!"))
    ),
    "a path that climbs": list_file("../outside"),
    "an absolute path": list_file("/etc/hostname"),
    "a path below": list_file("x/../../outside"),
    "a link that leads out": link_out,
    "a link of the same size": link_of_the_same_size,
    "a terabyte of weights": lambda f: put(f, "model.safetensors", b"\xff" * 8, 2**40),
    "terabytes of holes for a tensor": lambda f: hollow(f / "model.safetensors", 2**43),
    "a terabyte of state": lambda f: put(f, "state.json", b"{", 2**40),
    "a header of exabytes": lambda f: put(
        f, "optimizer.safetensors", (2**62).to_bytes(8, "little")
    ),
    "a tensor of exabytes": lambda f: put(
        f, "model.safetensors", tensors({"w": F32 | {"shape": [2**60]}})
    ),
    "an empty tensor of exabytes": lambda f: put(
        f,
        "model.safetensors",
        tensors({"w": F32 | {"shape": [0, 2**60, 2**60], "data_offsets": [0, 0]}}, b""),
    ),
    "a name twice": lambda f: put(
        f, "model.safetensors", tensors(b'{"w": %b, "w": %b}' % ((json.dumps(F32).encode(),) * 2))
    ),
    "one place for two": lambda f: put(f, "model.safetensors", tensors({"w": F32, "v": F32})),
    "deep state": state(b"[" * 10**6),
    "a deep header": lambda f: put(f, "model.safetensors", tensors(b'{"w":' * 10**5)),
    "a deep manifest": lambda f: (f / "manifest.json").write_bytes(b'{"a":' * 10**5),
    "a number of a million digits": state(
        b'{"model": {}, "optimizer": {}, "x": ' + b"9" * 10**6 + b"}"
    ),
    "an import in the state": state(b'{"model": {}, "optimizer": {}, "x": {"$import": "os"}}'),
    "a NaN for the time": poison("created"),
    "a NaN for the step": poison("step"),
    "a NaN for the format": poison("format"),
    "a NaN for a size": entry(size=float("nan")),
    "a size below zero": entry(size=-1),
    "a size of a part": entry(size=0.5),
    "a size that no file has": entry(size=2**80),
    "a time that no float can hold": lambda f: seal(f, b'"created": 1e999, '),
    "a step of a million digits": lambda f: seal(f, b'"step": ' + b"9" * 10**6 + b", "),
    "a metric of a thousand digits": lambda f: reseal(
        f / "manifest.json", lambda t: t.update(metrics={"val/loss": 10**1000})
    ),
    "a list for files": lambda f: reseal(f / "manifest.json", lambda t: t.update(files=[1])),
    "a NaN for a metric": lambda f: reseal(
        f / "manifest.json", lambda t: t.update(metrics={"val/loss": float("-inf")})
    ),
}


@pytest.fixture(scope="session")
def ordinary(killed, tmp_path_factory):  # noqa: F811
    """The memory that resuming takes."""
    folder = tmp_path_factory.mktemp("ordinary") / "run"
    shutil.copytree(killed, folder)
    started = tiny.resume(folder)
    tiny.end(started)
    return started.peak


def refuse(evil, run, folder):
    shutil.copytree(run, folder)
    newest = tiny.checkpoint(folder, NEWEST)
    EVIL[evil](newest)
    started = tiny.resume(folder)
    said = tiny.end(started)
    assert f"checkpoint {newest}: " in said
    assert f"loaded {tiny.checkpoint(folder, OLDER)}" in said
    assert "Traceback" not in said
    assert not list(folder.rglob("run!"))
    return started.peak


QUICK = (
    "a pickle for weights",
    "a path that climbs",
    "a link of the same size",
    "a terabyte of state",
    "a name twice",
    "a deep header",
    "a NaN for the time",
)


@pytest.mark.parametrize(
    "evil", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in EVIL]
)
def test_a_malicious_checkpoint_is_refused_and_the_run_goes_on_from_a_sound_one(
    evil,
    killed,  # noqa: F811 - the fixture imported above
    ordinary,
    uninterrupted,
    tmp_path,
):
    folder = tmp_path / "run"
    assert refuse(evil, killed, folder) <= ordinary + LIMIT
    assert tiny.digest(folder) == uninterrupted.digest


def test_the_pickle_that_is_refused_would_do_its_harm(tmp_path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "run!")))
    assert (tmp_path / "run!").exists()
