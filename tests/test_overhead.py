"""The cost of a step without the model, compared with a handwritten loop that does the same work."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fundamentallm import Run, hookimpl, plugin, train
from fundamentallm.testing import HostReads

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))  # scripts, not a package
import calls
import handwritten
import noop

BOUND = 1.05


@plugin
class Watch:
    """Counts host reads between the safe points of two steps."""

    first: int
    last: int
    reads: Any = None

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if run.progress.step == self.first:
            self.reads.start()
        if run.progress.step == self.last:
            self.reads.stop()


def test_a_run_does_what_the_handwritten_loop_does_bit_by_bit():
    run = noop.by_run({})
    model, history = noop.by_hand({})
    for name, tensor in model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], tensor), name
    assert run.history == history
    assert len(history) == noop.STEPS // handwritten.LOG_EVERY + 1


@pytest.mark.parametrize("interval", [noop.PERIOD, noop.BETWEEN], ids=["log_period", "between"])
def test_a_step_with_eleven_plugins_makes_at_most_5_percent_more_python_calls(interval):
    by_run = calls.per_step(noop.by_run, interval)
    by_hand = calls.per_step(noop.by_hand, interval)
    assert by_run <= BOUND * by_hand, f"{by_run:.2f} calls per step, by hand {by_hand:.2f}"


@pytest.mark.parametrize("interval", [noop.PERIOD, noop.BETWEEN], ids=["log_period", "between"])
def test_the_plugins_of_a_careful_user_cost_few_calls_more_than_handwritten_code(interval):
    by_run = calls.per_step(noop.fully_by_run, interval)
    by_hand = calls.per_step(noop.fully_by_hand, interval)
    assert by_run <= 1.17 * by_hand, f"{by_run:.2f} calls per step, by hand {by_hand:.2f}"


def test_norms_of_layers_are_those_that_the_handwritten_loop_takes():
    run, rows = noop.fully_by_run({}), noop.fully_by_hand({})
    by_run, by_hand = (
        [[row.get(name) for name in handwritten.SIZES] for row in found]
        for found in (run.history, rows)
    )
    assert by_run == by_hand
    assert None not in by_run[0]


def test_of_all_that_a_careful_user_lists_the_guard_alone_reads_a_device_value_once_a_step():
    first, last = noop.BETWEEN
    without = {name: table for name, table in noop.CARE.items() if name != "guard"}
    lists = {"plugins": [*noop.PLUGINS, *noop.EIGHT, *without], **without}
    for more, expected in ((lists, 0), (noop.FULLY, last - first)):
        reads = HostReads()
        noop.by_run({first: reads.start, last: reads.stop}, more)
        assert reads.found.total() == expected


def test_mlflow_and_jsonl_read_no_device_value_in_a_step_nor_for_a_log_row():
    first, last = noop.PERIOD
    found = []
    for loggers in ([], ["jsonl", "mlflow"]):
        plugins = [name for name in noop.SETTINGS["plugins"] if name != "jsonl"]
        # Without a store, whose place the journal takes: the process that ships has no device.
        away = {"tracking_uri": "nonsense://x", "on_start_failure": "journal", "end_seconds": 0.01}
        reads = HostReads()
        tables = {"mlflow": away} if loggers else {}
        noop.by_run(
            {first: reads.start, last: reads.stop}, {"plugins": plugins + loggers, **tables}
        )
        found.append(reads.found)
    assert found[0].total() >= 1  # the row itself
    assert found[0] == found[1]


def test_no_step_between_two_log_rows_reads_a_device_value():
    reads = HostReads()
    first, last = noop.BETWEEN
    noop.by_run({first: reads.start, last: reads.stop})
    assert reads.found == {}


def test_no_step_of_a_gpt_on_text_reads_a_device_value_between_two_log_rows(tmp_path):
    reads = HostReads()
    settings = {
        **noop.SETTINGS,
        "plugins": ["text", "gpt", *noop.SETTINGS["plugins"]],
        "run": {"length": 20, "log_every": 10, "validate_every": 10, "device": "cpu"},
        "text": {
            "max_bytes": 100_000,
            "context_length": 16,
            "batch_size": 4,
            "validation_batches": 1,
            "cache_dir": str(tmp_path / "cache"),
        },
        "gpt": {"num_layers": 1, "num_heads": 2, "d_model": 16, "dropout": 0.1},
        "accumulate": {"microbatches": 2},
    }
    train(settings, plugins=[Watch(first=10, last=19, reads=reads)], run_dir=tmp_path / "run")
    assert reads.found == {}


@pytest.mark.parametrize(
    "read",
    [
        float,
        bool,
        int,
        str,
        "{:.2f}".format,
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        torch.Tensor.cpu,
        torch.Tensor.nonzero,
        lambda x: x > 0 or None,
        lambda x: torch.equal(x, x),
        lambda x: x[x > 0],
    ],
)
def test_a_plugin_that_reads_a_device_value_in_every_step_is_found_out(read, tiny_run):
    @plugin
    class Reader:
        """Does what no plugin should."""

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            read(run.losses[-1])

    reads = HostReads()
    tiny_run(Reader(), Watch(first=4, last=8, reads=reads), length=9, log_every=100)
    assert reads.found.total() >= 4


@pytest.fixture(scope="module")
def bare() -> Counter[str]:
    return calls.count(bare_run, noop.BETWEEN)


def test_a_hook_without_implementations_costs_no_call(bare):
    assert [name for name in bare if "dispatch.py" in name] == []


@pytest.mark.parametrize("hook", ["on_step_start", "settle_step", "on_step_end", "on_safe_point"])
def test_hearing_an_event_alone_costs_the_call_of_the_listener_and_no_more(hook, bare):
    listener = listener_to(hook)
    received = calls.count(lambda marks: bare_run(marks, listener), noop.BETWEEN)
    first, last = noop.BETWEEN
    assert received.total() - bare.total() == last - first


def bare_run(marks: Any, *listeners: object) -> Run:
    """Train the no-op model with an optimizer and nothing else."""
    settings = {"plugins": ["adamw"], "run": noop.SETTINGS["run"]}
    with noop.quiet() as folder:
        return train(settings, plugins=[noop.Noop(marks=marks), *listeners], run_dir=folder)


def listener_to(hook: str) -> object:
    if hook == "settle_step":

        @plugin
        class Settler:
            """Receives the end of a step."""

            @hookimpl
            def settle_step(self, run: Run, applied: bool) -> None: ...

        return Settler()
    receive = hookimpl(lambda self, run: None, specname=hook)
    return plugin(type("Listener", (), {"receive": receive, "__doc__": "Receives one event."}))()
