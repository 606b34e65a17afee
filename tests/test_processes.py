"""What several processes agree on, and how they notice that one of them does something else."""

import json
import time

import pytest
import ranks
import torch

from fundamentallm import (
    DataError,
    PeerError,
    Period,
    SettingsError,
    field,
    hookimpl,
    plugin,
    state,
)
from fundamentallm.testing import TinyData, TinySamples, in_processes


@pytest.fixture
def settings(tmp_path):
    def write(*more, length=6, **tables):
        (tmp_path / "parts.py").write_text(
            "from fundamentallm import plugin\n"
            "from fundamentallm.testing import TinyParts\n\n"
            "@plugin\nclass Parts(TinyParts):\n    pass\n"
        )
        lines = [f"plugins = {json.dumps(['./parts.py', *more])}", "[run]", f"length = {length}"]
        lines += ["log_every = 2", 'device = "cpu"']
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(v)}" for key, v in table.items())]
        (tmp_path / "tiny.toml").write_text("\n".join(lines) + "\n")
        return tmp_path

    return write


def test_two_processes_are_one_run_with_one_folder_and_one_file_of_rows(settings):
    observers = "jsonl", "console", "progress", "throughput"
    folder = settings(*observers, "checkpoint", "ddp", ddp={"timeout": 20})
    first, second = ranks.run(["train", "tiny.toml"], folder)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert [path.name for path in (folder / "runs").iterdir()] == ["tiny"]
    rows = (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [2, 4, 6]
    assert "finished after 6 steps" in first.output
    # gloo itself prints lines, with torch 2.9.
    lines = [line for line in second.output.splitlines() if not line.startswith("[Gloo]")]
    assert (lines, second.errors) == ([], "")


def test_several_processes_without_a_plugin_that_joins_them_are_an_error(settings):
    folder = settings("jsonl")
    for ended in ranks.run(["train", "tiny.toml"], folder):
        assert ended.code == 2
        assert "this is one of several processes (WORLD_SIZE is 2)" in ended.errors
        assert "List 'ddp'" in ended.errors
    assert not (folder / "runs").exists()


def test_a_run_that_another_one_trains_is_refused_by_all_processes_and_printed_once(settings):
    folder = settings("ddp", ddp={"timeout": 20})
    (folder / "held").mkdir()
    import fcntl

    with (folder / "held" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = ranks.run(["train", "tiny.toml", "--run-dir", "held"], folder)
    assert [one.code for one in ended] == [5, 5]
    assert ["is training this run" in one.errors for one in ended] == [True, False]


# --- in the loop


@plugin
class Rejects:
    """Rejects one step in one process."""

    rank: int = 1
    step: int = 2

    @hookimpl
    def judge_step(self, run):
        from fundamentallm import Rejection

        if run.rank == self.rank and run.progress.step == self.step:
            return Rejection("other", "as this process says")
        return None


@plugin
class Notes:
    """Notes what each step was like."""

    steps: list = state(factory=list)

    @hookimpl
    def on_step_end(self, run):
        self.steps.append([run.progress.applied, [r.text for r in run.rejected]])


def test_a_step_that_one_process_rejects_is_rejected_by_all(two_processes):
    for trained in two_processes(Rejects(), Notes(), length=4):
        assert trained.states["notes"]["steps"] == [
            [1, []],
            [2, []],
            [2, ["as this process says"]],
            [3, []],
        ]


@plugin
class StopsOne:
    """Asks for the end in one process."""

    rank: int = 1

    @hookimpl
    def on_step_end(self, run):
        if run.rank == self.rank and run.progress.step == 3:
            run.stop("enough for this process")


def test_all_stop_at_the_step_at_which_one_asks_for_it(two_processes):
    for trained in two_processes(StopsOne(), length=9):
        assert (trained.outcome, trained.step) == ("stopped", 3)


@plugin
class LogsOne:
    """Logs a metric in one process only, and another with other values and weights in each."""

    @hookimpl
    def on_step_end(self, run):
        if run.rank:
            run.log("own/second", 5.0)
        run.log("own/both", torch.tensor(1.0 + run.rank), weight=1.0 + 2.0 * run.rank)


def test_logged_values_are_weighed_means_over_all_processes(two_processes):
    first, second = two_processes(LogsOne(), length=2)
    assert first.history == second.history
    assert first.history[-1]["own/second"] == 5.0
    assert first.history[-1]["own/both"] == (1.0 + 2.0 * 3.0) / 4.0


@plugin
class CollectsIndices:
    """Collects the inputs of the held-out samples."""

    @hookimpl(wrapper=True)
    def forward(self, run, batch):
        run.collect("inputs", batch.data[0])
        return (yield)

    @hookimpl
    def measure_split(self, split, collected):
        inputs = collected["inputs"]
        return {f"{split}/rows": len(inputs), f"{split}/first": float((inputs[:, 0]).sum())}


def test_collected_tensors_of_all_processes_come_in_the_order_of_the_samples(
    two_processes, tiny_run, tmp_path
):
    alone = tiny_run(CollectsIndices(), length=2, run_dir=tmp_path / "alone").history[-1]
    for trained in two_processes(CollectsIndices(), length=2):
        for name in ("val/rows", "val/first"):
            assert trained.history[-1][name] == alone[name]


@plugin
class SlowSecond:
    """Has a clock of its own in one process."""

    stops: list = state(factory=list)

    @hookimpl
    def on_step_end(self, run):
        if run.rank:
            time.sleep(0.02)
        self.stops.append(run.progress.seconds)


def test_the_time_of_the_first_process_is_that_of_all(two_processes):
    first, second = two_processes(SlowSecond(), length=5)
    assert first.states["slow_second"] == second.states["slow_second"]
    assert first.states["slow_second"]["stops"][0] == 0.0


# --- processes that do not do the same


@plugin
class AsksAlone:
    """Calls ``agree`` in one process only."""

    @hookimpl
    def on_step_end(self, run):
        if run.rank:
            run.hook.agree(run=run, topic="mine", mine=1)


def test_a_process_that_agrees_alone_is_an_error_that_names_both_places(two_processes):
    for trained in two_processes(AsksAlone(), length=4):
        assert isinstance(trained.error, PeerError)
        text = "process 0 is at: stop, after step 1; process 1 is at: mine, in step 1"
        assert text.replace("in step 1", "after step 1") in str(trained.error)


@plugin
class Deaf(TinyData):
    """Gives every process the same samples."""

    @hookimpl
    def build_data(self, run):
        return TinySamples(self.batch_size, run.device)


def test_a_source_that_gives_all_processes_the_same_samples_is_an_error(two_processes):
    first, second = two_processes(Deaf())
    for trained in (first, second):
        assert isinstance(trained.error, SettingsError)
        assert "gives the same sample, 0, to several of the 2 processes" in str(trained.error)
    assert (first.error.printed_elsewhere, second.error.printed_elsewhere) == (False, True)


@plugin
class Weightless(TinyData):
    """Has no target, in one process or in all of them."""

    ranks: int = 2

    @hookimpl
    def build_data(self, run):
        ranks = self.ranks

        class Samples(TinySamples):
            def batch(self, indices):
                batch = super().batch(indices)
                batch.total = None
                if self.part[0] < ranks:
                    batch.weight = 0.0
                return batch

        return Samples(self.batch_size, run.device, (run.data_rank, run.data_size))


@plugin
class Miscounted(TinyData):
    """States the weight of this process as that of all."""

    @hookimpl
    def build_data(self, run):
        class Samples(TinySamples):
            def batch(self, indices):
                batch = super().batch(indices)
                batch.total = batch.weight
                return batch

        return Samples(self.batch_size, run.device, (run.data_rank, run.data_size))


def test_a_source_that_states_a_wrong_total_is_an_error(two_processes):
    for trained in two_processes(Miscounted()):
        assert isinstance(trained.error, SettingsError)
        text = "the `Batch.total` of the first window is 2, as the data source states it, but the"
        assert f"{text} weights in all processes add up to 4" in str(trained.error)


@pytest.mark.parametrize(
    ("variable", "value", "starts"),
    [("WORLD_SIZE", "", True), ("WORLD_SIZE", "1", True), ("SLURM_STEP_NUM_TASKS", "4", False)],
)
def test_variables_of_a_launcher_of_one_process_are_no_error(
    tiny_run, monkeypatch, variable, value, starts
):
    monkeypatch.setenv(variable, value)
    if starts:
        assert tiny_run().outcome == "finished"
    else:
        with pytest.raises(SettingsError, match="SLURM_STEP_NUM_TASKS is 4"):
            tiny_run()


def test_a_window_without_a_target_in_any_process_is_an_error_in_all(two_processes):
    for trained in two_processes(Weightless()):
        assert isinstance(trained.error, DataError)
        assert "step 1: no micro-batch of the window has a target, in any process" in str(
            trained.error
        )
    for trained in two_processes(Weightless(ranks=1), length=2):
        assert trained.outcome == "finished"


def test_an_error_of_the_first_process_is_raised_in_all():
    from fundamentallm_distributed import Ddp

    def work(rank):
        from fundamentallm.launch import prepare
        from fundamentallm.testing import compose_tiny

        run, _ = prepare(compose_tiny(Ddp(timeout=20)), "/nowhere")
        with run.hook.join_processes(run=run):
            found = [run.from_first(lambda: {"rank": run.rank})]
            try:
                run.from_first(lambda: [1].pop(5))
            except (IndexError, PeerError) as error:
                found.append(f"{type(error).__name__}: {error}")
        return found

    assert in_processes(2, work) == [
        [{"rank": 0}, "IndexError: pop index out of range"],
        [{"rank": 0}, "PeerError: process 0 failed: IndexError: pop index out of range"],
    ]


# --- the hooks gather and spread


@plugin
class Twin:
    """Pretends that another process does exactly the same."""

    spread_tensors: list = field(init=False, factory=list)

    @hookimpl
    def join_processes(self, run):
        from contextlib import nullcontext

        run.world_size = run.data_size = 2
        return nullcontext()

    @hookimpl
    def agree(self, topic, mine):
        second = mine if topic != "first window" else [mine[0], mine[1] + 1, mine[2]]
        return json.loads(json.dumps([mine, second]))

    @hookimpl
    def gather(self, tree):
        weights = {name: tensor + 1 for name, tensor in tree["model"].items()}
        return tree | {"model": weights}

    @hookimpl
    def spread(self, tensor, like):
        assert tensor.shape in (like.shape, ())
        self.spread_tensors.append(tensor)
        return tensor - 1 if tensor.shape == like.shape else tensor


def test_a_snapshot_holds_what_gather_returns_and_restoring_loads_what_spread_returns(tiny_run):
    twin = Twin()
    run = tiny_run(twin, length=2)
    trained = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    snapshot = run.snapshot()
    assert all(snapshot["model"][name].equal(tensor + 1) for name, tensor in trained.items())
    snapshot["optimizer"] = {}
    run.restore(snapshot)
    assert all(
        (run.model.state_dict()[name] - tensor).abs().max() < 1e-6
        for name, tensor in trained.items()
    )
    assert len(twin.spread_tensors) == 4


@plugin
class SavesInSeconds:
    """Notes at which steps a period in seconds is due, with a slow clock in the second process."""

    every: Period = Period(0.05, "seconds")
    steps: list = state(factory=list)

    @hookimpl
    def on_step_end(self, run):
        time.sleep(0.03 * run.rank)
        if self.every.due(run.progress):
            self.steps.append(run.progress.step)


def test_a_period_in_seconds_is_due_at_the_same_step_in_all_processes(two_processes):
    first, second = two_processes(SavesInSeconds(), "checkpoint", length=12)
    assert first.outcome == second.outcome == "finished"
    assert first.states["saves_in_seconds"] == second.states["saves_in_seconds"]
