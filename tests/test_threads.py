"""Threads: their number belongs to the run, and what they do while they wait follows the load."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from fundamentallm import SettingsError, hookimpl, plugin
from fundamentallm.testing import Memory
from fundamentallm.threads import sharing_cores

CORES = len(os.sched_getaffinity(0))


@plugin
class Counts:
    """Note how many threads a step computes with."""

    seen: list[int]

    @hookimpl
    def on_step_start(self):
        self.seen.append(torch.get_num_threads())


@pytest.fixture
def seen():
    return []


def test_a_run_computes_with_the_threads_of_its_settings_and_records_them(tiny_run, seen):
    before = torch.get_num_threads()
    run = tiny_run(Counts(seen=seen), length=1, threads=before + 1)
    assert seen == [before + 1]
    assert json.loads((run.folder / "environment.json").read_text())["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_a_continued_run_keeps_its_number_of_threads_unless_the_settings_choose(tiny_run, seen):
    before, memory = torch.get_num_threads(), Memory(step=1)
    tiny_run(memory, length=1, threads=before + 2)
    tiny_run(memory, Counts(seen=seen), length=2)
    tiny_run(memory, Counts(seen=seen), length=2, threads=before + 1)
    tiny_run(memory, Counts(seen=seen), length=2)
    assert seen == [before + 2, before + 1, before + 1]


def test_a_number_of_threads_below_one_is_a_mistake_in_the_settings(tiny_run):
    with pytest.raises(SettingsError, match="run.threads"):
        tiny_run(threads=0)


STEPS = """
import logging, sys, threading, time
logging.basicConfig(format="%(message)s")
from fundamentallm.threads import sharing_cores
with sharing_cores():
    import torch
    torch.set_num_threads(int(sys.argv[1]))
    x, w, v = torch.randn(64, 256), torch.randn(256, 1024), torch.randn(1024, 256)
    until = time.perf_counter() + 4
    while time.perf_counter() < until:
        (torch.nn.functional.gelu(x @ w) @ v).sum()
    print(threading.active_count())
print(threading.active_count())
"""


@contextlib.contextmanager
def busy(processes):
    started = [subprocess.Popen([sys.executable, "-c", "while 1: 0"]) for _ in range(processes)]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


def steps(**choice):
    """Return the Python threads during and after some seconds of steps, and what was logged.

    How much faster the steps are is measured by ``tests/benchmarks/threads.py``.
    """
    known = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(CORES)],
        env=known | choice,
        capture_output=True,
        text=True,
        check=True,
    )
    during, after = map(int, done.stdout.split())
    return during, after, done.stderr


@pytest.mark.skipif(CORES < 2, reason="one core has no second thread that could spin")
def test_with_busy_processes_threads_spin_less_and_a_warning_names_the_remedy():
    with busy(CORES):
        during, after, said = steps(GOMP_SPINCOUNT="300000")  # libgomp's own number
        assert (during, after, said) == (1, 1, "")
        during, after, said = steps()
    assert (during, after) == (3, 1)  # the one that looks, and one that only has OpenMP threads
    assert said.count("fewer threads may be faster: --set run.threads=") == 1


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_a_wait_policy_set_in_the_environment_is_not_changed(name, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    before = threading.active_count()
    with sharing_cores():
        assert threading.active_count() == before + 1
    monkeypatch.setenv(name, "1")
    with sharing_cores():
        assert threading.active_count() == before
