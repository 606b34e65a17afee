"""The average is bit-identical to a handwritten one, also in resumed and rewound runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from fundamentallm import (
    Composed,
    Period,
    PluginError,
    Rejection,
    Run,
    SettingsError,
    Snapshot,
    StorageError,
    compose,
    field,
    hookimpl,
    plugin,
    train,
)
from fundamentallm.testing import PluginContract, TinyRun, assert_same_weights, compose_tiny
from fundamentallm_ema import Ema, Swa

Weights = dict[str, Tensor]


class TestEma(PluginContract):
    plugin = Ema
    wrong_settings = (
        ({"decay": 1.0}, "ema.decay: must be < 1"),
        ({"decay": -0.1}, "ema.decay: must be >= 0"),
        ({"start": 1.0}, "ema.start: a fraction of the run is at least 0 and less than 1, got 1"),
        ({"start": "soon"}, "ema.start: expected a period"),
        ({"every": 0}, "ema.every: a period is finite and more than zero"),
        ({"evaluate": 1}, "ema.evaluate: expected true or false"),
    )


class TestSwa(PluginContract):
    plugin = Swa


@plugin
class Witness:
    """Records the weights after every step, and whether it was applied; rejects some steps."""

    rejects: Any = ()
    seen: dict[int, Any] = field(init=False, factory=dict)

    @hookimpl
    def judge_step(self, run: Run) -> Rejection | None:
        return (
            Rejection("other", "chosen by the test")
            if run.progress.step + 1 in self.rejects
            else None
        )

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.seen[run.progress.step] = weights(run.model), not run.rejected


@plugin
class Memory:
    """Records a snapshot at every safe point; goes back from one step to another, once."""

    back: Any = None
    kept: dict[int, Snapshot] = field(init=False, factory=dict)
    restored: Snapshot | None = field(init=False, default=None)

    @hookimpl
    def read_checkpoint(self, run: Run) -> Snapshot | None:
        wanted = run.wanted_checkpoint
        return self.kept[int(wanted.removeprefix("step-"))] if wanted else self.restored

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        snapshot = copy.deepcopy(run.snapshot())
        for state in snapshot["plugins"].values():
            json.dumps({name: value for name, value in state.items() if name != "weights"})
        self.kept[run.progress.step] = snapshot

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if self.back and run.progress.step == self.back[0]:
            run.rewind(f"step-{self.back[1]}")
            self.back = None


def remembering(snapshot: Snapshot) -> Memory:
    """Return a memory that a run continues from a copy of ``snapshot`` with."""
    memory = Memory()
    memory.restored = copy.deepcopy(snapshot)
    return memory


def weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def average(run: Run, name: str = "ema") -> Weights:
    return run.plugins[name].get_state()["weights"]


def same(one: Weights, other: Weights) -> bool:
    assert one.keys() == other.keys()
    return all(one[name].equal(other[name]) for name in one)


def by_hand(seen: dict[int, Any], table: dict[str, Any], length: int) -> tuple[int, Weights]:
    """Return how many weights are in the average, and the average."""
    count, mean = 0, Weights()
    start, every = table["start"], int(table["every"].amount)
    first = start.amount if isinstance(start, Period) else start * length
    for step, (now, applied) in seen.items():
        if not applied or step % every or (not count and step < first):
            continue
        share = 1 / (count + 1)
        if "decay" in table:
            share = 1 - table["decay"]
            if table["warmup"] and (1 + count) / (10 + count) < table["decay"]:
                share = 1 / ((1 + count) / 9 + 1)
        mean = {n: mean[n].lerp(now[n], share) for n in now} if count else copy.deepcopy(now)
        count += 1
    return count, mean


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    table = {
        "start": draw(st.sampled_from([0.0, 0.3, 0.75, Period(1), Period(4)])),
        "every": Period(draw(st.integers(1, 3))),
        "evaluate": draw(st.booleans()),
    }
    if draw(st.booleans()):
        table["decay"] = draw(st.sampled_from([0.0, 0.25, 0.3, 0.9, 0.999, 0.9999]))
        table["warmup"] = draw(st.booleans())
    return table


@pytest.fixture(scope="module")
def composed() -> Composed:
    """A run like those below: to look for installed plugins takes longer than to train one."""
    return compose_tiny(Witness(), Memory(), Ema(), validate_every=3, length=8)


@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(table=tables(), rejects=st.sets(st.integers(1, 8), max_size=4), data=st.data())
def test_the_average_equals_a_handwritten_one_for_any_rule_rejected_steps_and_resumption(
    tmp_path_factory: pytest.TempPathFactory,
    composed: Composed,
    table: dict[str, Any],
    rejects: set[int],
    data: st.DataObject,
) -> None:
    def trained(memory: Memory) -> Run:
        composed.plugins.update(
            witness=Witness(rejects=rejects),
            memory=memory,
            ema=Ema(**table) if "decay" in table else Swa(**table),
        )
        return train(composed, run_dir=tmp_path_factory.mktemp("run"))

    memory = Memory()
    whole = trained(memory)
    count, mean = by_hand(whole.plugins["witness"].seen, table, 8)
    assert whole.plugins["ema"].get_state()["count"] == count
    assert same(average(whole), mean)
    step = data.draw(st.integers(1, 8), label="resumed at")
    resumed = trained(remembering(memory.kept[step]))
    assert resumed.plugins["ema"].get_state()["count"] == count
    assert same(average(resumed), mean)
    assert_same_weights(resumed, whole)
    assert [row for row in whole.history if row in resumed.history] == resumed.history


@plugin
class Twin:
    """Updates torch's ``AveragedModel`` after every step."""

    make: Any
    averaged: Any = None

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.averaged = self.averaged or self.make(run.model)
        self.averaged.update_parameters(run.model)


def test_an_ema_without_warmup_equals_torchs_bit_by_bit(tiny_run: TinyRun) -> None:
    twin = Twin(make=lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
    run = tiny_run(Ema(decay=0.9, warmup=False), twin, length=12)
    assert same(average(run), weights(twin.averaged.module))


def test_an_equal_average_equals_torchs_bit_by_bit(tiny_run: TinyRun) -> None:
    twin = Twin(make=lambda m: AveragedModel(m, multi_avg_fn=get_swa_multi_avg_fn()))
    run = tiny_run(Swa(start=0.0), twin, length=12)
    assert same(average(run, "swa"), weights(twin.averaged.module))


def test_the_decay_in_the_warmup_follows_its_formula_until_it_reaches_decay() -> None:
    rule = Ema(decay=0.99).rule()
    for count in range(1, 2000):
        blend, number = rule(count)
        mean = [torch.zeros(1, dtype=torch.float64)]
        blend(mean, [torch.ones(1, dtype=torch.float64)], number)
        decay = min(0.99, (1 + count) / (10 + count))
        assert float(mean[0]) == pytest.approx(1 - decay, rel=1e-13)


def test_training_is_bit_identical_with_and_without_an_average(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    runs = [
        tiny_run(*plugins, length=9, validate_every=2, run_dir=tmp_path / f"{len(plugins)}")
        for plugins in ([], [Ema(decay=0.5)])
    ]
    assert_same_weights(*runs)
    losses = [[row["train/loss"] for row in run.history] for run in runs]
    assert losses[0] == losses[1]
    assert runs[0].history[-1]["val/loss"] != runs[1].history[-1]["val/loss"]


def test_a_rewind_restores_the_average_of_that_step(tiny_run: TinyRun) -> None:
    witness = Witness()
    run = tiny_run(Ema(decay=0.9), witness, Memory(back=(6, 3)), length=8)
    assert run.progress.step == 8
    assert run.progress.microbatches == 11
    # For the steps 4 to 6, the witness has the weights of the second attempt.
    table = {"start": 0.0, "every": Period(1), "decay": 0.9, "warmup": True}
    assert same(average(run), by_hand(witness.seen, table, 8)[1])


def test_a_rewind_to_before_the_start_of_the_average_restarts_it(tiny_run: TinyRun) -> None:
    memory = Memory(back=(6, 2))
    run = tiny_run(Swa(start=Period(4)), memory, length=7)
    assert memory.kept[2]["plugins"]["swa"] == {"count": 0, "weights": {}}
    assert run.plugins["swa"].get_state()["count"] == 4


@plugin
class Freeze:
    """Freezes the first layer for some steps."""

    until: int

    @hookimpl
    def adapt_model(self, run: Run) -> None:
        run.model.hidden.requires_grad_(requires_grad=False)

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        if run.progress.step == self.until:
            run.model.hidden.requires_grad_(requires_grad=True)


def test_a_frozen_parameter_is_averaged_from_its_first_update_on(
    tiny_run: TinyRun,
) -> None:
    witness, memory = Witness(), Memory()
    run = tiny_run(Ema(decay=0.9, warmup=False), Freeze(until=3), witness, memory, length=6)
    assert set(memory.kept[3]["plugins"]["ema"]["weights"]) == {"out.weight", "out.bias"}
    joined = witness.seen[4][0]["hidden.weight"].clone()
    for step in (5, 6):
        joined.lerp_(witness.seen[step][0]["hidden.weight"], 1 - 0.9)
    assert joined.equal(average(run)["hidden.weight"])


@plugin
class Half:
    """A tiny model in low precision."""

    @hookimpl
    def adapt_model(self, run: Run) -> None:
        run.model.bfloat16()

    @hookimpl(wrapper=True)
    def build_data(self) -> Any:
        data = yield
        made = data.batch

        def batch(indices: range) -> Any:
            found = made(indices)
            found.data = tuple(tensor.bfloat16() for tensor in found.data)
            return found

        data.batch = batch
        return data


def test_bf16_weights_are_averaged_in_float32_and_resume_to_the_same_bits(
    tiny_run: TinyRun,
) -> None:
    def half(witness: Witness, memory: Memory) -> Run:
        return tiny_run(
            Ema(decay=0.99, warmup=False), Half(), witness, memory, length=9, validate_every=2
        )

    witness, memory = Witness(), Memory()
    run, seen = half(witness, memory), witness.seen
    mean = {name: weight.float() for name, weight in seen[1][0].items()}
    for step in range(2, 10):
        for name, weight in seen[step][0].items():
            mean[name].lerp_(weight.float(), 1 - 0.99)
    assert same(average(run), mean)
    final = weights(run.model)
    assert all(weight.dtype == torch.bfloat16 for weight in final.values())
    with run.hook.evaluation_weights(run=run):
        rounded = {name: weight.bfloat16() for name, weight in mean.items()}
        assert same(weights(run.model), rounded)
    assert same(weights(run.model), final)
    assert same(average(run), mean)
    assert same(average(half(Witness(), remembering(memory.kept[4]))), mean)


@plugin
class Replace:
    """Replaces the memory of a parameter in the middle of training."""

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        if run.progress.step == 2:
            run.model.out.bias.data = run.model.out.bias.data.clone()


def test_a_parameter_whose_memory_was_replaced_is_an_error(
    tiny_run: TinyRun,
) -> None:
    with pytest.raises(PluginError, match="out.bias can no longer be averaged"):
        tiny_run(Ema(), Replace(), length=6, validate_every=4)


def test_the_average_of_another_model_is_refused(tiny_run: TinyRun) -> None:
    memory = Memory()
    tiny_run(Ema(), memory, length=2)
    wrong = memory.kept[2]
    wrong["plugins"]["ema"]["weights"]["out.bias"] = torch.zeros(3)
    with pytest.raises(StorageError, match="average of another model: out.bias"):
        tiny_run(Ema(), remembering(wrong), length=4)


def test_two_averages_that_both_evaluate_are_an_error_that_names_both() -> None:
    for other in ({}, {"plugin": "ema"}):
        name = "slow" if other else "swa"
        with pytest.raises(SettingsError) as caught:
            compose({"plugins": ["ema", name], "run": {"length": 1}, name: other})
        said = [text for text in caught.value.problems if "evaluation_weights" in text]
        assert len(said) == 1
        assert "ema (fundamentallm-ema" in said[0]
        assert f"{name} (fundamentallm-ema" in said[0]


@pytest.mark.parametrize("made", [Ema(decay=0.9), Swa(start=0.5)])
def test_a_second_run_of_the_same_object_starts_a_new_average(
    tiny_run: TinyRun, tmp_path: Path, made: Any
) -> None:
    fresh = tiny_run(type(made)(start=made.start), length=4, run_dir=tmp_path / "fresh")
    name = fresh.name_of(next(p for p in fresh.plugins.values() if isinstance(p, type(made))))
    for folder in ("first", "second"):
        run = tiny_run(made, length=4, run_dir=tmp_path / folder)
        assert made.get_state()["count"] == fresh.plugins[name].get_state()["count"]
        assert set(average(run, name)) == set(weights(run.model))
    run.model.out.bias.data.fill_(7.0)
    made.settle_step(run, applied=True)
    assert bool((average(run, name)["out.bias"] > 0.01).all()), "it follows the second run's model"
