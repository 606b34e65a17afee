"""Metrics of whole splits, names that the core keeps, and evaluations that leave no trace."""

from __future__ import annotations

import random
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from fundamentallm import DataError, PluginError, Run, field, hookimpl, plugin
from fundamentallm.testing import TinyData, TinySamples, assert_same_weights


class TwoBatches(TinySamples):
    """Held-out batches of different sizes."""

    def validation(self):
        return {"val": [self.batch(range(1000, 1005)), self.batch(range(1005, 1008))]}


@plugin
class Uneven:
    @hookimpl
    def build_data(self, run: Run):
        return TwoBatches(4, run.device)


@plugin
class Largest:
    """Collects targets, and measures their largest value and number over the whole split."""

    seen: list[Any] = field(init=False, factory=list)

    @hookimpl
    def forward(self, run: Run, batch):
        run.collect("targets", batch.data[1])
        return run.module(*batch.data)

    @hookimpl
    def measure_split(self, split: str, collected: dict[str, Any]) -> dict[str, float]:
        self.seen.append(collected["targets"])
        return {f"{split}/largest": collected["targets"].max(), f"{split}/count": 8}


def test_a_metric_of_a_whole_split_is_measured_once_over_all_that_was_collected(tiny_run):
    largest = Largest()
    run = tiny_run(Uneven(), largest, length=4, validate_every=2)
    (held_out,) = [torch.cat([b.data[1] for b in run.data.validation()["val"]])]
    assert [targets.equal(held_out) for targets in largest.seen] == [True, True]
    assert run.history[-1]["val/largest"] == held_out.max().item()
    assert run.history[-1]["val/count"] == 8.0


def test_values_collected_in_training_are_discarded(tiny_run):
    run = tiny_run(Largest(), length=3, validate_every=3)
    assert run.take_collected() == {}


def test_pieces_that_do_not_fit_together_are_an_error_that_names_them(tiny_run):
    @plugin
    class Ragged:
        @hookimpl
        def forward(self, run, batch):
            run.collect("parts", torch.zeros(2, len(batch.data[0])))
            return run.module(*batch.data)

    with pytest.raises(
        PluginError, match=r"run.collect\('parts'\): expected .* \[2, 3\], \[2, 5\]"
    ):
        tiny_run(Uneven(), Ragged(), length=1)


def test_a_metric_that_is_there_already_is_an_error(tiny_run):
    @plugin
    class Twice:
        @hookimpl
        def measure_split(self, split):
            return {f"{split}/loss": 0.0}

    with pytest.raises(PluginError, match="measure_split: val/loss is there already"):
        tiny_run(Twice(), length=1)


@pytest.mark.parametrize("name", ["train/loss", "val/loss", "train/tokens", "optim/lr"])
@pytest.mark.parametrize("hook", ["on_step_end", "on_train_start", "on_safe_point"])
@pytest.mark.parametrize("role", ["training", "control", "saver", "observer"])
def test_a_plugin_that_logs_under_a_name_of_the_core_is_refused_by_name(tiny_run, name, hook, role):
    def log(self, run):
        run.log(name, 1.0)

    intruder = plugin(type("Intruder", (), {"role": role, "log": hookimpl(log, specname=hook)}))()
    with pytest.raises(PluginError, match=rf"(?s)'intruder'.*{hook}.*core logs {name}"):
        tiny_run(intruder, length=3)


def test_a_loss_of_a_plugins_own_split_or_part_may_be_logged(tiny_run):
    @plugin
    class Parts:
        @hookimpl
        def on_step_end(self, run):
            run.log("generator/loss", 1.0)
            run.log("train/loss_d", 2.0)

    assert tiny_run(Parts(), length=2).history[-1]["train/loss_d"] == 2.0


@pytest.mark.parametrize("value", [torch.zeros(2), None, "1"])
def test_logging_a_value_that_is_not_a_number_is_an_error(tiny_run, value):
    @plugin
    class Careless:
        @hookimpl
        def on_step_end(self, run):
            run.log("some/thing", value)

    with pytest.raises(PluginError, match=r"'careless'.*expected a number or a 0-d tensor"):
        tiny_run(Careless(), length=3)


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


@plugin
class Evaluates:
    """Evaluates in a step, draws, logs, and changes modes; or does not."""

    really: bool = True
    drawn: list[Any] = field(init=False, factory=list)

    @hookimpl
    def judge_step(self, run: Run) -> None:
        if not self.really:
            return
        with pytest.raises(KeyError), run.evaluating("val"):
            assert run.phase == "val"
            assert not torch.is_grad_enabled()
            assert not any(module.training for module in run.model.modules())
            run.log("own/value", 1.0)
            self.drawn.append(drawn())
            assert run.take_logged() == {"own/value": 1.0}
            run.log("own/lost", 1.0)
            run.model.train()
            raise KeyError
        assert run.phase == "train"
        assert all(module.training for module in run.model.modules())

    @hookimpl
    def edit_gradients(self, run: Run) -> None:
        self.noise = drawn()


def test_an_evaluation_leaves_no_trace_also_after_an_error(tiny_run, tmp_path):
    often, never = Evaluates(), Evaluates(really=False)
    runs = [tiny_run(one, length=4, run_dir=tmp_path / str(one.really)) for one in (often, never)]
    assert_same_weights(*runs)
    assert runs[0].history == runs[1].history
    assert often.noise == never.noise


def test_every_evaluation_of_a_split_draws_the_same_random_numbers(tiny_run):
    evaluates = Evaluates()
    tiny_run(evaluates, length=3)
    assert len(evaluates.drawn) == 3
    assert evaluates.drawn[0] == evaluates.drawn[1] == evaluates.drawn[2]


def test_a_split_without_a_batch_that_has_a_target_is_an_error_that_names_it(tiny_run):
    class Empty(TinySamples):
        def validation(self):
            batches = super().validation()
            return batches | {"late": [attrs.evolve(one, weight=0) for one in batches["val"]]}

    @plugin
    class Source:
        @hookimpl
        def build_data(self, run):
            return Empty(4, run.device)

    with pytest.raises(DataError, match=r"validation\(\)\['late'\]: no batch has a target"):
        tiny_run(Source(), length=1)


def test_the_name_of_an_object_that_is_not_listed_is_an_error_that_names_its_class(tiny_run):
    run = tiny_run(Uneven(), length=1)
    with pytest.raises(ValueError, match=r"run.name_of\(\): no listed plugin is this Uneven"):
        run.name_of(Uneven())


class Closing:
    """A stream that says when it is closed, and what was in its workers' place."""

    def __init__(self, within, log):
        self.within, self.log = within, log

    def batches(self, progress):
        try:
            yield from self.within.batches(progress)
        finally:
            self.log.append("closed")

    def __getattr__(self, name):
        return getattr(self.within, name)


@pytest.mark.parametrize("how", ["finished", "stopped", "interrupted", "failed"])
def test_the_stream_is_closed_before_the_end_of_a_run_is_announced(tiny_run, how):
    log: list[str] = []

    @plugin
    class Source:
        @hookimpl
        def build_data(self, run):
            return Closing(TinyData().build_data(run), log)

        @hookimpl
        def on_step_end(self, run):
            if how == "stopped":
                run.stop("enough")
            if how == "interrupted":
                run.signal = 15
            if how == "failed":
                raise KeyError

        @hookimpl
        def on_train_end(self, outcome):
            log.append(outcome)

    if how == "failed":
        with pytest.raises(PluginError):
            tiny_run(Source(), length=3)
    else:
        tiny_run(Source(), length=3)
    assert log == ["closed", how]
