"""The command launch: exit codes, restarts, signals, and the nodes of a job."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import forked
import pytest
import torch

from fundamentallm import SettingsError
from fundamentallm_distributed.attempt import Attempt, Requests
from fundamentallm_distributed.cli import launch as command
from fundamentallm_distributed.launcher import automatic_processes

LIMIT = 60  # seconds after which a test fails as hanging
LAUNCH = """
import sys
from fundamentallm_distributed.launcher import Job, launch

sys.exit(launch(Job((sys.executable, "-S", "-c", {code!r}, *{words!r}), **{options!r})))
"""
# What the processes of these tests begin with. Each notes its start and has 40 seconds to live.
START = """
import os, signal, sys, time
from pathlib import Path

signal.alarm(40)
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def note(what, text=""):
    part = Path(f"{what}-{attempt}-{rank}.part")
    part.write_text(str(text))
    part.rename(part.with_suffix(""))

def wait_for(*names):
    while not all(Path(name).exists() for name in names):
        time.sleep(0.01)

def save_and_end(number, _):
    with open(f"signals-{rank}", "a") as file:
        print(signal.Signals(number).name, file=file)
    if not Path(f"saved-{attempt}-{rank}").exists():
        time.sleep(0.5)
        note("saved")
        sys.exit(128 + number)

note("started", os.getpid())
"""
SAVES = """
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, save_and_end)
note("ready")
time.sleep(40)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder, and end the processes that a failed test leaves there."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for pid in pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start(code, *words, **options):
    """Start a launcher of ``code``, by default in two processes."""
    text = LAUNCH.format(code=START + code, words=words, options={"processes": 2, **options})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return forked.Popen([sys.executable, "-c", text], text=True, start_new_session=True, **pipes)


def launch(code, *words, **options):
    """Run a launcher to its end; return its exit code and what was printed on standard error."""
    with start(code, *words, **options) as process:
        out, err = process.communicate(LIMIT)
        assert out == ""
        return process.wait(), err


def pids():
    return [int(path.read_text()) for path in Path().glob("started-*[0-9]")]


def living():
    """Return the processes of the launchers that are left, without those that only await reaping."""
    found = []
    for pid in pids():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def none_is_left():
    """Wait for the end of all processes, which SIGKILL does not end at once."""
    until = time.monotonic() + LIMIT
    while living():
        assert time.monotonic() < until, living()
        time.sleep(0.02)
    return True


def wait_for(*names):
    """Wait for files."""
    until = time.monotonic() + LIMIT
    while not all(Path(name).exists() for name in names):
        assert time.monotonic() < until, f"missing: {names}"
        time.sleep(0.02)


def children(pid):
    """Return the child processes that any thread of a process has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for task in tasks for child in task.read_text().split()]


def descendants(pid):
    """Return the child processes of a process, and theirs."""
    found = children(pid)
    return found + [one for child in found for one in children(child)]


def first_line(process):
    """Return the first line that a launcher prints."""
    return process.stderr.readline()


def attempts():
    return len(list(Path().glob("started-*-0")))


def test_all_processes_finish_with_the_environment_of_torchrun():
    code, err = launch(
        """
names = ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS"]
note("environment", " ".join(os.environ[name] for name in names))
assert int(os.environ["MASTER_PORT"]) > 0 and "FUNDAMENTALLM_LAUNCH" not in os.environ
"""
    )
    threads = max(1, torch.get_num_threads() // 2)
    assert (code, err) == (0, "")
    for rank in (0, 1):
        text = Path(f"environment-0-{rank}").read_text()
        assert text == f"2 {rank} 2 127.0.0.1 {os.environ.get('OMP_NUM_THREADS', threads)}"


def test_words_and_output_pass_through_unchanged():
    words = ["--set", "a=$local_rank", "${local_rank}", "$$", "ü ß"]
    with start("print(sys.argv[1:]); print('oh', file=sys.stderr)", *words, processes=1) as process:
        out, err = process.communicate(LIMIT)
    assert (out, err, process.wait()) == (f"{words}\n", "oh\n", 0)


def test_there_is_a_process_for_each_cuda_device_or_one():
    assert automatic_processes() == (torch.cuda.device_count() or 1)


@pytest.mark.parametrize("own", [1, 4])
def test_the_exit_code_of_a_cause_counts_even_if_the_loss_of_the_peer_is_reported_first(own):
    code, err = launch(
        f"""
if rank == 0:
    note("left")
    sys.exit(8)
wait_for("left-0-0")
time.sleep(0.3)
sys.exit({own})
"""
    )
    words = " (data)" if own == 4 else ""
    assert (code, err) == (own, f"launch: process 1 ended with exit code {own}{words}\n")


def test_of_two_causes_the_first_counts():
    code, _ = launch(
        """
if rank == 0:
    wait_for("started-0-1")
    other = Path("/proc", Path("started-0-1").read_text())
    while other.exists():
        time.sleep(0.01)
    time.sleep(0.05)  # less than the agent's period of 0.1 seconds
    sys.exit(7)
sys.exit(6)
"""
    )
    assert code == 6


def test_no_restart_follows_an_end_that_a_restart_cannot_change(folder):
    names = {2: "settings", 3: "not finite", 4: "data", 5: "storage", 143: "SIGTERM"}
    running = {}
    for status in names:
        (folder / str(status)).mkdir()
        os.chdir(folder / str(status))
        running[status] = start(f"sys.exit({status})", restarts=3)
    for status, process in running.items():
        os.chdir(folder / str(status))
        _, err = process.communicate(LIMIT)
        asked, same = "a signal asked for the end", "a new attempt would meet the same cause"
        why = f"({names[status]}); not restarted: {asked if status == 143 else same}\n"
        assert (process.wait(), attempts()) == (status, 1)
        assert f"ended with exit code {status} {why}" in err


def test_a_restart_follows_a_killed_process_and_the_attempts_are_counted():
    code, err = launch(
        """
if attempt < 2:
    wait_for(f"started-{attempt}-{1 - rank}")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(8)
""",
        restarts=3,
    )
    text = "launch: process 1 ended with exit code 137 (killed by signal 9); restarting, "
    assert (code, attempts()) == (0, 3)
    assert err == f"{text}2 of 3 restarts left\n{text}1 of 3 restarts left\n"


def test_without_restarts_left_the_exit_code_is_that_of_the_last_attempt():
    code, err = launch("sys.exit(6 if attempt else 7)", restarts=1, processes=1)
    assert (code, attempts()) == (6, 2)
    assert err == (
        "launch: process 0 ended with exit code 7 (a plugin failed); restarting, "
        "0 of 1 restarts left\nlaunch: process 0 ended with exit code 6 (memory)\n"
    )


def test_a_process_that_does_not_notice_the_failure_of_another_is_asked_to_end():
    """What it ends with then is not the cause."""
    code, err = launch(f"if rank:\n    wait_for('ready-0-0')\n    sys.exit(8)\n{SAVES}")
    assert (code, err) == (8, "launch: process 1 ended with exit code 8 (a peer was lost)\n")
    assert Path("signals-0").read_text() == "SIGTERM\n"
    assert Path("saved-0-0").exists()


@pytest.mark.parametrize("group", [False, True], ids=["launcher", "group"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_processes_receive_a_signal_once_and_save_and_the_exit_code_is_theirs(name, group):
    number = signal.Signals[name]
    with start(SAVES, restarts=2) as process:
        wait_for("ready-0-0", "ready-0-1")
        (os.killpg if group else os.kill)(process.pid, number)
        time.sleep(0.2)
        process.send_signal(number)
        _, err = process.communicate(LIMIT)
        assert process.wait() == 128 + number
    assert [Path(f"signals-{rank}").read_text() for rank in (0, 1)] == [f"{name}\n"] * 2
    assert Path("saved-0-0").exists() and Path("saved-0-1").exists()
    assert attempts() == 1 and none_is_left()
    assert err.startswith(f"launch: {name}: waiting up to 300 seconds for the processes to save")


def test_a_signal_is_passed_on_once_all_processes_can_receive_it(folder, monkeypatch):
    monkeypatch.setenv("FUNDAMENTALLM_LAUNCH", "")  # begin() sets it
    requests = Requests()
    attempt = requests.attempt = Attempt(folder, ("true",), 2, 300, requests)
    attempt.begin({})
    (folder / "0.begun").touch()
    requests.receive(signal.SIGTERM, None)
    attempt.look(0)
    assert (requests.collected, attempt.passed) == ([signal.SIGTERM], 0)


def test_a_process_that_saves_longer_than_the_others_is_not_killed():
    """The agent's own limit of 30 seconds begins when it sees the first process end."""
    code = """
def save(number, _):
    if rank == 0:
        wait_for("continue")
        note("saved")
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, save)
note("ready")
time.sleep(40)
"""
    with start(code) as process:
        wait_for("ready-0-0", "ready-0-1")
        process.send_signal(signal.SIGTERM)
        while len(living()) == 2:
            time.sleep(0.02)
        time.sleep(1)
        # Neither the process that has ended nor the one that saves has been seen to end.
        assert len(children(process.pid)) == 2
        Path("continue").touch()
        process.communicate(LIMIT)
        assert process.wait() == 143
    assert Path("saved-0-0").exists()


def test_a_process_that_does_not_end_within_the_grace_is_killed():
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nnote('ready')\ntime.sleep(40)"
    with start(code, grace=1) as process:
        wait_for("ready-0-0", "ready-0-1")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(LIMIT)
        assert process.wait() == 137
    assert "launch: process 1 has not ended in time: sending SIGKILL\n" in err
    assert none_is_left()


def test_the_processes_of_a_killed_launcher_save_and_end():
    with start(SAVES) as process:
        wait_for("ready-0-0", "ready-0-1")
        process.kill()
        process.wait(LIMIT)
        wait_for("saved-0-0", "saved-0-1")
        assert none_is_left()
    assert [Path(f"signals-{rank}").read_text() for rank in (0, 1)] == ["SIGTERM\n"] * 2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_the_launchers_of_two_nodes_meet_and_end_with_the_same_code():
    """The node whose process lost its peer ends with the code of the cause, too."""
    nodes = {"nodes": (1, 2), "meet": f"127.0.0.1:{free_port()}", "address": "127.0.0.1"}
    code = """
assert os.environ["WORLD_SIZE"] == "2" and os.environ["LOCAL_RANK"] == "0"
assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
if rank == 0:
    wait_for(f"started-{attempt}-1")
    sys.exit(8)
wait_for(f"started-{attempt}-0")
time.sleep(0.3)
sys.exit(4 if attempt else 7)
"""
    options = {"processes": 1, "restarts": 2, **nodes}
    with start(code, **options) as first, start(code, **options) as second:
        for process in (first, second):
            _, err = process.communicate(LIMIT)
            assert process.wait() == 4
            assert "process 1 ended with exit code 7 (a plugin failed); restarting, 1 of 2" in err
            assert "process 1 ended with exit code 4 (data); not restarted: " in err
    assert attempts() == 2


@pytest.mark.slow
def test_a_signal_to_one_of_two_launchers_ends_the_job_of_both():
    nodes = {"nodes": (2, 2), "meet": f"127.0.0.1:{free_port()}", "address": "127.0.0.1"}
    # The process of the other node ends as one that has lost its peer.
    code = f"""
if rank == 0:
    wait_for("saved-0-1")
    sys.exit(8)
{SAVES}
"""
    options = {"processes": 1, "restarts": 2, **nodes}
    with start(code, **options) as first, start(code, **options) as second:
        wait_for("ready-0-1")
        asked = first if Path("started-0-1").read_text() in descendants(first.pid) else second
        asked.send_signal(signal.SIGUSR1)
        for process in (first, second):
            process.communicate(LIMIT)
            assert process.wait() == 138
    assert attempts() == 1


@pytest.mark.slow
def test_a_node_that_joins_later_makes_the_processes_save_and_start_again():
    """Takes half a minute: torch waits 30 seconds for a second node before it starts with the first."""
    nodes = {"nodes": (1, 2), "meet": f"127.0.0.1:{free_port()}", "address": "127.0.0.1"}
    code = f"""
if os.environ["WORLD_SIZE"] == "2":
    note("together")
    sys.exit(0)
{SAVES}
"""
    options = {"processes": 1, **nodes}
    with start(code, **options) as first:
        wait_for("ready-0-0")
        with start(code, **options) as second:
            wait_for("together-0-0", "together-0-1")
            for process in (first, second):
                _, err = process.communicate(LIMIT)
                assert process.wait() == 0
                again = "nodes have come or gone; starting again from the newest checkpoint"
                assert (again in err) == (process is first)
    assert Path("saved-0-0").exists()
    assert Path("signals-0").read_text() == "SIGTERM\n"


def test_a_signal_ends_a_launcher_that_waits_for_other_nodes():
    meet = f"127.0.0.1:{free_port()}"
    with start("", nodes=(2, 2), meet=meet, address="127.0.0.1") as process:
        assert first_line(process) == f"launch: meeting 2 nodes at {meet}\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.communicate(LIMIT)
        assert process.wait() == 143


@pytest.mark.slow
def test_after_the_loss_of_a_node_the_others_start_again_without_it():
    """Takes a minute: torch waits until it believes in the loss, and then for another node."""
    nodes = {"nodes": (1, 2), "meet": f"127.0.0.1:{free_port()}", "address": "127.0.0.1"}
    code = f"""
if os.environ["WORLD_SIZE"] == "1":
    note("alone")
    sys.exit(0)
if rank == 0:
    wait_for("saved-0-1")
    sys.exit(8)
{SAVES}
"""
    options = {"processes": 1, "restarts": 2, **nodes}
    with start(code, **options) as first:
        first_line(first)
        time.sleep(2)  # so that its store is the meeting point
        with start(code, **options) as second:
            wait_for("ready-0-1")
            second.kill()
            _, err = first.communicate(110)
            assert first.wait() == 0
    assert "exit code 8 (a peer was lost); restarting, 1 of 2 restarts left" in err
    assert Path("alone-1-0").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "expected 'train' or 'resume' after the options, got nothing"),
        ("show x.toml", "expected 'train' or 'resume' after the options, got 'show'"),
        ("--nodes 2 train S", "--nodes 2 needs a place where the machines meet: add --meet"),
        ("--meet a:1 train S", "--meet is for several machines: add --nodes"),
        ("--restarts 1 train S", "--restarts 1, each start of 'train' would begin a run in a new"),
        ("--nodes 1:2 --meet a:1 train S", "with --nodes MIN:MAX, each start of 'train' would"),
        ("--restarts 1 resume D --from best", "go back to the checkpoint of --from: leave out"),
    ],
)
def test_what_does_not_fit_together_is_an_error_with_advice(words, message):
    with pytest.raises(SettingsError, match=message):
        command.main(words.split(), standalone_mode=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--processes 0 train S", "'0' is neither 'auto' nor a number from 1"),
        ("--processes two train S", "'two' is neither 'auto' nor a number from 1"),
        ("--nodes 4:2 --meet a:1 train S", "'4:2' is no number such as 4, or 2:4"),
        ("--nodes 1:2:3 --meet a:1 train S", "'1:2:3' is no number such as 4, or 2:4"),
        ("--nodes 2 --meet a train S", "'a' is no HOST:PORT such as node0:29400"),
        ("--restart 2 train S", "No such option"),
    ],
)
def test_a_value_that_cannot_be_read_is_an_error_with_an_example(words, message):
    with pytest.raises(click.UsageError) as caught:
        command.main(words.split(), standalone_mode=False)
    assert message in caught.value.format_message()


def test_the_command_passes_the_words_to_processes_of_the_command_line():
    words = ["--processes", "2", "train", "missing.toml", "--set", "run.seed=1"]
    done = forked.run([sys.executable, "-m", "fundamentallm", "launch", *words], text=True)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "missing.toml" in line]
    assert len(lines) == 2 and "ended with exit code 2 (settings)" in done.stderr


def test_the_help_is_printed_without_torch():
    code = """
import sys
from fundamentallm_distributed.cli import launch

launch.main(["--help"], standalone_mode=False)
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (0, b"")
