"""Whatever is wrong with the newest checkpoint is noticed and named, and no run goes on from it."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial

import layer
import pytest
import tiny
from draws import often
from hypothesis import strategies as st
from tiny import EVERY

from fundamentallm_checkpoint.storage import manifest, snapshot

FILES = (
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "state.safetensors",
)
NEWEST, OLDER = 4 * EVERY, 3 * EVERY


def flip(path, at=0.5, bit=0):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1 << bit
    path.write_bytes(data)


def cut(path, at=0.9):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * at)])


def swap(path):
    shutil.copy(path.parent.with_name(f"step-{OLDER:08d}") / path.name, path)


def grow(path):
    path.write_bytes(path.read_bytes() + b"\n")


def reseal(path, change):
    """Edit a manifest and seal it again, as an attacker who knows the format can."""
    facts = json.loads(path.read_text())
    del facts["seal"]
    change(facts)
    head = json.dumps(facts, indent=1).removesuffix("\n}").encode()
    seal = hashlib.sha256(head).hexdigest()
    path.write_bytes(head + f',\n "seal": "{seal}"\n}}\n'.encode())


DAMAGES = {
    "flip": flip,
    "cut": cut,
    "delete": lambda path: path.unlink(),
    "swap": swap,
    "grow": grow,
}
EDITS = {
    "a step": lambda facts: facts.update(step=NEWEST + 1),
    "no files": lambda facts: facts.update(files={}),
    "another size": lambda facts: facts["files"]["model.safetensors"].update(size=10),
    "two files exchanged": lambda facts: facts["files"].update(
        {
            "model.safetensors": facts["files"]["state.safetensors"],
            "state.safetensors": facts["files"]["model.safetensors"],
        }
    ),
    "one file less": lambda facts: facts["files"].pop("state.safetensors"),
    "another file more": lambda facts: facts["files"].update(more=facts["files"]["state.json"]),
    "another sha256": lambda facts: facts["files"]["state.json"].update(sha256="0" * 64),
}


@pytest.fixture(scope="session")
def killed(uninterrupted, tmp_path_factory):
    """A run that was killed, with its checkpoints of three steps."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    # The run gets its id, four checkpoints get their names, and one loses it.
    before = partial(layer.act_at_rename, layer.kill, 7)
    tiny.end(tiny.start("train", uninterrupted.settings, "--run-dir", folder, before=before), -9)
    assert tiny.steps(folder) == [NEWEST - 2 * EVERY, OLDER, NEWEST]
    return folder


def check(folder, uninterrupted, name):
    """See that the newest is not gone on from, neither if it is asked for nor if nothing is."""
    damaged = tiny.checkpoint(folder, NEWEST)
    said = tiny.end(tiny.resume(folder, "--from", damaged.name), 5)
    assert f"{damaged}: {name}" in said
    assert "Traceback" not in said
    said = tiny.end(tiny.resume(folder))
    assert f"{damaged}: {name}" in said
    assert f"loaded {tiny.checkpoint(folder, OLDER)}" in said
    assert tiny.digest(folder) == uninterrupted.digest
    assert tiny.rows(folder) == uninterrupted.rows


def check_damage(damage, name, killed, uninterrupted, folder):
    shutil.copytree(killed, folder)
    damage(tiny.checkpoint(folder, NEWEST) / name)
    assert len(tiny.unsound(folder)) == 1
    check(folder, uninterrupted, name)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *zip(
            (
                "model.safetensors",
                "manifest.json",
                "state.json",
                "optimizer.safetensors",
                "state.safetensors",
            ),
            DAMAGES,
            strict=True,
        )
    ],
)
def test_a_damaged_file_is_named_and_the_older_checkpoint_leads_to_the_same_bits(
    name, damage, killed, uninterrupted, tmp_path
):
    check_damage(DAMAGES[damage], name, killed, uninterrupted, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_of_every_file_is_named(name, damage, killed, uninterrupted, tmp_path):
    check_damage(DAMAGES[damage], name, killed, uninterrupted, tmp_path / "run")


QUICK = ("a step", "another sha256")


@pytest.mark.parametrize(
    "edit", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in EDITS]
)
def test_an_edited_manifest_is_noticed_even_if_it_is_sealed_again(
    edit, killed, uninterrupted, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    reseal(tiny.checkpoint(folder, NEWEST) / "manifest.json", EDITS[edit])
    check(folder, uninterrupted, "")


def assert_noticed(folder, path, harm):
    sound = path.read_bytes()
    harm(path)
    assert len(tiny.unsound(folder)) == 1, (path, harm)
    with pytest.raises(manifest.UnsoundError, match=path.name.replace(".", r"\.")):
        snapshot.read(path.parent, manifest.read(path.parent))
    path.write_bytes(sound)
    return True


# All over the file: drawn as they are, most would be at its beginning.
PLACE = st.integers(0, 10**6 - 1).map(lambda number: number * 617_283 % 10**6 / 10**6)
HARMS = st.one_of(
    st.builds(partial, st.just(flip), at=PLACE, bit=st.integers(0, 7)),
    st.builds(partial, st.just(cut), at=PLACE),
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("count", [50, pytest.param(300, marks=pytest.mark.slow)])
def test_one_flipped_bit_or_a_file_cut_anywhere_is_noticed(count, name, killed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    path = tiny.checkpoint(folder, NEWEST) / name
    often(
        count,
        HARMS,
        lambda harm, _: assert_noticed(folder, path, harm),
        tmp_path,
        quick=count == 50,
    )


def test_an_older_checkpoint_under_the_name_of_the_newest_is_noticed(
    killed, uninterrupted, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    shutil.rmtree(tiny.checkpoint(folder, NEWEST))
    shutil.copytree(tiny.checkpoint(folder, OLDER), tiny.checkpoint(folder, NEWEST))
    check(folder, uninterrupted, f"manifest.json is one of step {OLDER}")


def test_if_all_checkpoints_are_damaged_the_run_ends_and_does_not_start_again(killed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    for step in tiny.steps(folder):
        flip(tiny.checkpoint(folder, step) / "model.safetensors")
    before = {path: path.read_bytes() for path in folder.rglob("step-*/*")}
    said = tiny.end(tiny.resume(folder), 5)
    assert said.count("model.safetensors was changed after it was written") >= 3
    assert before == {path: path.read_bytes() for path in folder.rglob("step-*/*")}
