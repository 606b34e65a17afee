"""Real W&B runs without a network: what the offline file holds is what the run logged."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from fundamentallm import NotFiniteError, hookimpl, plugin
from fundamentallm.testing import LoggerContract, Memory, TinyRun
from fundamentallm_wandb import Wandb

if TYPE_CHECKING:
    from fundamentallm import Run


@pytest.fixture(autouse=True, scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keep logins and settings of this machine out, and the network."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB")]:
            patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        patch.setenv("WANDB_CONFIG_DIR", str(home / "config"))
        patch.setenv("WANDB_CACHE_DIR", str(home / "cache"))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # no server is there
        yield


def records(path: Path) -> list[Record]:
    """Read an offline file: messages in a log of blocks of 32 KiB, each behind a head of 7 bytes
    (crc32, length, and whether it is whole (1), begins (2), goes on (3) or ends (4))."""
    data, place, parts, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + length > len(data):
            break
        parts = (b"" if kind in (1, 2) else parts) + data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(parts))
    return found


def sessions(folder: Path) -> list[list[Record]]:
    """The records of each start of a run, in their order, once W&B's process has written them."""
    files = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    found = [ended(path) for path in files]
    return sorted(
        found, key=lambda session: first(session, "environment").started_at.ToNanoseconds()
    )


def ended(path: Path) -> list[Record]:
    """The records of a W&B run; the last one is written a moment after its end."""
    late = time.monotonic() + 30
    while True:
        found = records(path)
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < late, f"{path}: has no end"
        time.sleep(0.05)


def rows(session: list[Record]) -> list[dict[str, float]]:
    """What was logged, as the run itself has it."""
    found = []
    for record in session:
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = items.pop("_step", record.history.step.num)
            found.append({"step": step, **{k: v for k, v in items.items() if k[0] != "_"}})
    return found


def first(session: list[Record], kind: str) -> Any:
    return next(getattr(r, kind) for r in session if r.WhichOneof("record_type") == kind)


class TestContract(LoggerContract):
    plugin = Wandb
    target = "wandb"
    at_once = False

    def rows(self, folder: Path) -> list[dict[str, float]]:
        found: list[dict[str, float]] = []
        for session in sessions(folder):
            start = first(session, "run")
            # W&B continues a run from its branch point; without one, the session is another run.
            last = start.branch_point.value if start.HasField("branch_point") else -1
            found = [row for row in found if row["step"] <= last] + rows(session)
        return found

    def unwritable(self, folder: Path) -> Wandb:
        return Wandb(mode="online", start_seconds=5)  # nothing answers


def test_the_run_has_the_settings_as_its_config_and_its_tags_group_and_name(
    tiny_run: TinyRun,
) -> None:
    own = Wandb(project="letters", entity="us", group="first", tags=["a", "b"])
    run = tiny_run(own, length=2, name="tiny-one")
    (session,) = sessions(run.folder)
    start = first(session, "run")
    assert (start.project, start.entity, start.run_group) == ("letters", "us", "first")
    assert (start.display_name, [*start.tags], start.run_id) == ("tiny-one", ["a", "b"], own.id)
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert {name: config[name] for name in run.tables} == run.tables


@pytest.mark.parametrize("closed", [True, False])
def test_a_resumed_run_continues_after_the_step_of_its_checkpoint(
    closed: bool, tiny_run: TinyRun
) -> None:
    memory = Memory(step=4)
    before = tiny_run(Wandb(), memory, length=8, log_every=1)
    assert memory.kept is not None
    memory.kept["progress"]["closed"] = closed  # not, if a signal fell into the validation
    after = tiny_run(Wandb(), memory, length=9, log_every=1)
    one, other = sessions(before.folder)
    assert rows(one) == before.history
    assert rows(other) == after.history
    start = first(other, "run")
    assert start.run_id == first(one, "run").run_id
    settled = 4 if closed else 3
    assert (start.branch_point.run, start.branch_point.value) == (start.run_id, settled)
    assert [row["step"] for row in rows(other)] == list(range(settled + 1, 10))


def test_a_rewind_removes_the_later_steps(tiny_run: TinyRun) -> None:
    run = tiny_run(Memory(step=3, later=6), Wandb(), length=7, log_every=1)
    one, other = sessions(run.folder)
    assert [row["step"] for row in rows(one)] == [1, 2, 3, 4, 5]
    assert rows(one)[:3] + rows(other) == run.history
    start = first(other, "run")
    assert (start.branch_point.run, start.branch_point.value) == (first(one, "run").run_id, 3)


def test_a_run_from_step_0_in_the_same_folder_is_another_run(tiny_run: TinyRun) -> None:
    for _ in range(2):
        run = tiny_run(Wandb(), length=2, log_every=1)
    one, other = sessions(run.folder)
    assert first(one, "run").run_id != first(other, "run").run_id
    assert rows(one) == rows(other) == run.history


def test_the_summary_has_the_outcome_and_the_reason(tiny_run: TinyRun, tmp_path: Path) -> None:
    @plugin
    class Ends:
        how: str

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if self.how == "stopped":
                run.stop("seen enough")
            elif self.how == "interrupted":
                run.signal = 15
            elif self.how == "failed":
                raise NotFiniteError("the loss is gone")

    codes = {"finished": 0, "stopped": 0, "interrupted": 143, "failed": 1}
    for how, code in codes.items():
        folder = tmp_path / how
        try:
            tiny_run(Wandb(), Ends(how=how), run_dir=folder)
        except NotFiniteError:
            assert how == "failed"
        (session,) = sessions(folder)
        assert first(session, "exit").exit_code == code
        summary = {
            item.key: json.loads(item.value_json)
            for record in session
            if record.WhichOneof("record_type") == "summary"
            for item in record.summary.update
        }
        reasons = {"stopped": "seen enough", "failed": "the loss is gone"}
        assert summary["outcome"] == how
        assert summary.get("reason") == reasons.get(how)


def test_with_mode_disabled_wandb_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fundamentallm import train\n"
        "from fundamentallm.testing import compose_tiny\n"
        "from fundamentallm_wandb import Wandb\n"
        f"train(compose_tiny(Wandb(mode='disabled')), run_dir={str(tmp_path)!r})\n"
        "assert 'wandb' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("names", [("wandb", "grad_stats"), ("grad_stats", "wandb")])
def test_histograms_of_other_plugins_are_in_the_rows_of_their_steps(
    names: tuple[str, str], tiny_run: TinyRun
) -> None:
    stats = {"every": 3, "histograms": True}
    run = tiny_run(*names, settings={"grad_stats": stats}, length=8, log_every=3)
    (session,) = sessions(run.folder)
    text = (run.folder / "grad_stats.jsonl").read_text()
    counts = {line["step"]: line["counts"] for line in map(json.loads, text.splitlines())}
    expected = []
    for row in run.history:
        found: dict[str, Any] = dict(row)
        for group, values in counts.get(int(row["step"]), {}).items():
            parts = {"_type": "histogram", "values": values, "bins": list(range(-13, 6))}
            found |= {f"grad_stats/{group}/{part}": value for part, value in parts.items()}
        expected.append(found)
    assert rows(session) == expected
    assert [row["step"] for row in expected if "grad_stats/out/values" in row] == [3, 6]


def test_a_histogram_without_an_open_run_is_ignored() -> None:
    Wandb(mode="disabled").on_histogram("some/name", 1, [0.0, 1.0], [3])


def test_without_a_login_the_run_continues_and_the_warning_gives_advice(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(Wandb(mode="online", start_seconds=5), length=4)
    assert run.outcome == "finished"
    assert "wandb failed and is muted" in caplog.text
    assert 'run "wandb login", or set wandb.mode = "offline"' in caplog.text


def test_a_server_that_never_answers_is_abandoned_after_a_limit(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        run = tiny_run(Wandb(mode="online", start_seconds=1, end_seconds=1), length=4)
    assert run.outcome == "finished"
    assert "wandb failed and is muted" in caplog.text


def test_two_wandb_plugins_are_two_runs(tiny_run: TinyRun) -> None:
    tables = {"wandb": {"project": "one"}, "second": {"plugin": "wandb", "project": "two"}}
    run = tiny_run("wandb", "second", settings=tables, length=4)
    found = sessions(run.folder)
    assert {first(session, "run").project for session in found} == {"one", "two"}
    assert [rows(session) for session in found] == [run.history, run.history]
