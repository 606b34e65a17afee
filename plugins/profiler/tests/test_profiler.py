"""What was asked for is recorded, in files that are whole; the run does not notice."""

from __future__ import annotations

import gc
import gzip
import json
import logging
from pathlib import Path

import pytest
import torch
from python_calls import CallsBetween

from fundamentallm import Run, SettingsError, hookimpl, plugin
from fundamentallm.testing import PluginContract, TinyRun, TwoProcesses, assert_same_weights
from fundamentallm_profiler import Gc, Profiler


class TestProfilerContract(PluginContract):
    plugin = Profiler
    needs = {"start": 2, "steps": 1}


class TestGcContract(PluginContract):
    plugin = Gc


def events(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]


def names(run: Run, folder: str = "profile") -> list[str]:
    return sorted(path.name for path in (run.folder / folder).iterdir())


@plugin
class Marker:
    """Leaves the number of each step in the trace."""

    @hookimpl
    def on_step_start(self, run: Run):
        with torch.profiler.record_function(f"step {run.progress.step + 1}"):
            torch.ones(2).sum()


def steps(path: Path) -> list[int]:
    return sorted({int(name.split()[1]) for name in events(path) if name.startswith("step ")})


def test_records_the_chosen_steps_and_no_others(tiny_run: TinyRun):
    run = tiny_run(Marker(), Profiler(start=4, steps=2, warmup=2), length=8)
    assert names(run) == ["table-00000004.txt", "trace-00000004.json.gz"]
    assert steps(run.folder / "profile" / "trace-00000004.json.gz") == [4, 5]


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_first_step_can_be_recorded_without_any_before_it(tiny_run: TinyRun, warmup: int):
    run = tiny_run(Marker(), Profiler(start=1, steps=2, warmup=warmup), length=4)
    assert steps(run.folder / "profile" / "trace-00000001.json.gz") == [1, 2]


def test_makes_several_traces_at_the_set_distance(tiny_run: TinyRun):
    run = tiny_run(Marker(), Profiler(start=2, steps=1, warmup=2, traces=3, every=3), length=20)
    assert [steps(run.folder / "profile" / f"trace-{n:08d}.json.gz") for n in (2, 5, 8)] == [
        [2],
        [5],
        [8],
    ]
    assert len(names(run)) == 6


def test_the_trace_labels_every_call_with_its_plugin(tiny_run: TinyRun):
    @plugin
    class Busy:
        """Listens, and surrounds an action."""

        @hookimpl
        def on_step_end(self, run: Run):
            pass

        @hookimpl(wrapper=True)
        def forward(self, run: Run):
            return (yield)

    run = tiny_run(Busy(), Profiler(start=2, steps=2, warmup=1), length=6)
    found = events(run.folder / "profile" / "trace-00000002.json.gz")
    assert [found.count(n) for n in ("busy.on_step_end", "forward", "core.backward")] == [2, 2, 2]


def test_the_table_has_the_most_expensive_operations_and_no_more_lines_than_asked(
    tiny_run, tmp_path
):
    few = tiny_run(Profiler(start=2, steps=1, rows=3), length=3, run_dir=tmp_path / "few")
    many = tiny_run(
        Profiler(start=2, steps=1, rows=100, record_shapes=True, with_flops=True),
        length=3,
        run_dir=tmp_path / "many",
    )
    few_lines, many_lines = (
        (run.folder / "profile" / "table-00000002.txt").read_text().splitlines()
        for run in (few, many)
    )
    assert "aten::addmm" in "".join(many_lines)
    assert "[[16], [4, 8], [8, 16]" in "".join(many_lines)
    assert "FLOPs" in many_lines[1]
    assert len([line for line in few_lines if line.strip()]) == 3 + 3 + 2


def test_a_run_that_ends_early_writes_what_there_is(tiny_run: TinyRun, caplog):
    caplog.set_level(logging.INFO)
    run = tiny_run(Marker(), Profiler(start=3, steps=50, warmup=1), length=5)
    assert steps(run.folder / "profile" / "trace-00000003.json.gz") == [3, 4, 5]
    assert "profiled steps 3 to 5" in caplog.text


def test_a_run_that_ends_before_the_first_recorded_step_writes_nothing(tiny_run: TinyRun):
    run = tiny_run(Profiler(start=10, steps=2, warmup=8), length=5)
    assert not (run.folder / "profile").exists()


def test_a_run_that_fails_writes_what_there_is(tiny_run: TinyRun, tmp_path: Path):
    @plugin
    class Bomb:
        """Fails in a step."""

        @hookimpl
        def on_step_end(self, run: Run):
            if run.progress.step == 4:
                raise ValueError("on purpose")

    with pytest.raises(Exception, match="on purpose"):
        tiny_run(Marker(), Bomb(), Profiler(start=3, steps=50), length=9)
    assert steps(tmp_path / "run" / "profile" / "trace-00000003.json.gz") == [3, 4]


def test_a_continued_run_records_what_is_still_to_come(tiny_run: TinyRun, tmp_path: Path):
    listed = {"start": 2, "steps": 3, "warmup": 0, "traces": 2, "every": 4}
    settings = {"checkpoint": {"every": 3}, "profiler": listed}
    tiny_run("checkpoint", "profiler", Marker(), length=3, settings=settings)
    run = tiny_run("checkpoint", "profiler", Marker(), length=9, settings=settings)
    folder = run.folder / "profile"
    assert steps(folder / "trace-00000002.json.gz") == [2, 3]
    assert steps(folder / "trace-00000006.json.gz") == [6, 7, 8]


def test_of_two_that_overlap_the_second_leaves_its_trace_out(tiny_run: TinyRun, caplog):
    settings = {
        "profiler": {"start": 3, "steps": 2, "warmup": 1},
        "more": {"plugin": "profiler", "start": 4, "steps": 2, "traces": 2, "every": 5},
    }
    run = tiny_run("profiler", "more", Marker(), length=12, settings=settings)
    assert "no trace of step 4: PyTorch records one at a time" in caplog.text
    assert names(run) == ["more", "table-00000003.txt", "trace-00000003.json.gz"]
    assert steps(run.folder / "profile" / "trace-00000003.json.gz") == [3, 4]
    assert names(run, "profile/more") == ["table-00000009.txt", "trace-00000009.json.gz"]
    assert steps(run.folder / "profile" / "more" / "trace-00000009.json.gz") == [9, 10]


def test_a_disk_that_takes_nothing_is_a_warning_and_the_run_goes_on(
    tiny_run: TinyRun, tmp_path: Path, caplog
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    run = tiny_run(Profiler(start=2, steps=1), length=6)
    assert run.outcome == "finished"
    assert "profiler failed and is muted from now on" in caplog.text
    # PyTorch's profiler is free again for the next user.
    again = tiny_run(Marker(), Profiler(start=2, steps=1), length=3, run_dir=tmp_path / "again")
    assert steps(again.folder / "profile" / "trace-00000002.json.gz") == [2]


def test_the_hooks_are_put_back_when_the_trace_is_made(tiny_run: TinyRun):
    @plugin
    class Keeper:
        """Remembers the hooks of each step."""

        def __attrs_post_init__(self):
            self.hooks = []

        @hookimpl
        def on_step_start(self, run: Run):
            self.hooks.append(run.hook)

    keeper = Keeper()
    tiny_run(keeper, Profiler(start=3, steps=1, warmup=1), length=6)
    first, second, third, *rest = keeper.hooks
    assert second is third is not first
    assert all(hook is first for hook in rest)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_profiler_and_throughput_work_in_the_same_run(
    tiny_run: TinyRun, tmp_path: Path, place: str
):
    throughput = pytest.importorskip("fundamentallm_throughput").Throughput
    listed = [Profiler(start=3, steps=2, warmup=1), throughput(sample_every=2)]
    run = tiny_run(*(listed if place == "before" else reversed(listed)), length=12)
    found = events(run.folder / "profile" / "trace-00000003.json.gz")
    assert found.count("core.backward") == 2
    assert json.loads((run.folder / "throughput.json").read_text())["timed_steps"] >= 2
    assert run.outcome == "finished"
    assert_same_weights(run, tiny_run(length=12, run_dir=tmp_path / "bare"))


def test_a_recorded_run_ends_in_the_same_bits(tiny_run: TinyRun, tmp_path: Path):
    recorder = Profiler(start=2, steps=3, record_shapes=True, profile_memory=True, with_stack=True)
    runs = [
        tiny_run(*listed, length=8, validate_every=2, run_dir=tmp_path / str(n))
        for n, listed in enumerate(([], [recorder, Gc(every=2)]))
    ]
    assert_same_weights(*runs)
    assert runs[0].history == runs[1].history


@pytest.mark.parametrize(
    ("make", "calls"), [(lambda: Profiler(start=1000), 2), (lambda: Gc(every=1000), 1)]
)
def test_a_step_that_is_not_concerned_costs_next_to_nothing(tiny_run, tmp_path, make, calls):
    counts = []
    for number, listed in enumerate(([], [make()])):
        between = CallsBetween(first=3, last=6)
        tiny_run(between, *listed, length=7, log_every=100, run_dir=tmp_path / str(number))
        counts.append(between.found)
    assert counts[1] - counts[0] == 3 * calls


# --- gc


@plugin
class Witness:
    """Keeps what the collector says in each step, and when it collected."""

    def __attrs_post_init__(self):
        self.collected: list[tuple[int, int]] = []
        self.enabled: list[bool] = []
        self.frozen: list[int] = []
        self.step = 0

    def note_collection(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start" and self.step:
            self.collected.append((self.step, info["generation"]))

    @hookimpl
    def on_step_start(self, run: Run):
        self.step = run.progress.step + 1
        self.enabled.append(gc.isenabled())
        self.frozen.append(frozen())

    @hookimpl
    def on_train_start(self):
        gc.callbacks.append(self.note_collection)

    @hookimpl
    def on_train_end(self):
        gc.callbacks.remove(self.note_collection)


gc.unfreeze()
gc.collect()
OWN = gc.get_freeze_count()  # in a full collection, Python 3.12 freezes its immortal objects


def frozen() -> int:
    """Return the number of frozen objects, without Python's own."""
    return max(0, gc.get_freeze_count() - OWN)


@pytest.fixture
def thawed():
    """Begin and end with nothing frozen and the collector on."""
    gc.unfreeze()
    gc.enable()
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("generation", [0, 1, 2])
def test_collects_at_the_steps_that_are_due_and_at_no_other(
    tiny_run: TinyRun, thawed, generation: int
):
    witness = Witness()
    tiny_run(witness, Gc(every=3, generation=generation), length=10)
    assert witness.collected == [(3, generation), (6, generation), (9, generation)]


def test_is_off_while_training_and_on_again_afterwards(tiny_run: TinyRun, thawed):
    witness = Witness()
    tiny_run(witness, Gc())
    assert not any(witness.enabled)
    assert all(witness.frozen)
    assert gc.isenabled()
    assert frozen() == 0


def test_is_on_again_after_an_error(tiny_run: TinyRun, thawed):
    @plugin
    class Bomb:
        """Fails in a step."""

        @hookimpl
        def on_step_end(self, run: Run):
            raise ValueError("on purpose")

    with pytest.raises(Exception, match="on purpose"):
        tiny_run(Bomb(), Gc())
    assert gc.isenabled()
    assert frozen() == 0


def test_collections_disabled_and_objects_frozen_by_other_code_stay_disabled_and_frozen(
    tiny_run: TinyRun, thawed
):
    gc.disable()
    gc.freeze()
    before = frozen()
    tiny_run(Gc())
    assert not gc.isenabled()
    assert frozen() >= before - 100  # what is freed by its last owner is frozen no more


def test_two_gc_plugins_restore_the_garbage_collector(tiny_run: TinyRun, thawed):
    tiny_run(
        "gc",
        "deep",
        settings={"gc": {"every": 2}, "deep": {"plugin": "gc", "every": 3, "generation": 2}},
    )
    assert gc.isenabled()
    assert frozen() == 0


def test_freezes_nothing_if_it_shall_not(tiny_run: TinyRun, thawed):
    witness = Witness()
    tiny_run(witness, Gc(freeze=False))
    assert witness.frozen == [0] * 4


@pytest.mark.parametrize(
    ("name", "table", "complaint"),
    [
        ("profiler", {"start": 0}, "profiler.start: must be >= 1"),
        (
            "profiler",
            {"traces": 2, "every": 4},
            "profiler.every: 4 steps are fewer than 3 recorded and 2 before",
        ),
        ("gc", {"every": 0}, "gc.every: must be >= 1"),
        ("gc", {"generation": 3}, "gc.generation: must be in (0, 1, 2)"),
    ],
)
def test_wrong_settings_are_an_error_before_the_run_starts(tiny_run, name, table, complaint):
    with pytest.raises(SettingsError) as caught:
        tiny_run(name, settings={name: table})
    assert any(complaint in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize("all_ranks", [True, False])
def test_of_two_processes_one_or_both_are_recorded(
    two_processes: TwoProcesses, all_ranks: bool
) -> None:
    profiler = Profiler(start=2, steps=1, warmup=0, all_ranks=all_ranks)
    for one in two_processes(profiler, length=4):
        assert one.outcome == "finished", one.error
    ends = ["-rank0", "-rank1"] if all_ranks else [""]
    found = sorted(path.name for path in (one.folder / "profile").glob("trace-*"))
    assert found == [f"trace-00000002{end}.json.gz" for end in ends]
