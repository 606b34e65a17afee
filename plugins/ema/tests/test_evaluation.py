"""Validation, samples and files use the average; training continues with its own weights."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fundamentallm import Period, PluginError, Run, StorageError, hookimpl, load_run, plugin, train
from fundamentallm.testing import HostReads, TinyModel, TinyRun, assert_same_weights
from fundamentallm_ema import Ema, Swa

Weights = dict[str, Tensor]


def weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def average(run: Run, name: str = "ema") -> Weights:
    return run.plugins[name].get_state()["weights"]


def same(one: Weights, other: Weights) -> bool:
    assert one.keys() == other.keys()
    return all(one[name].equal(other[name]) for name in one)


@torch.no_grad()
def loss_with(run: Run, values: Weights) -> float:
    """Return the loss of the held-out batch with the given weights, in a model of its own."""
    model = copy.deepcopy(run.model).eval()
    model.load_state_dict(values, strict=False)
    (batch,) = run.data.validation()["val"]
    return float(model(*batch.data))


def test_validation_uses_the_average(tiny_run: TinyRun) -> None:
    run = tiny_run(Ema(decay=0.9), length=8, validate_every=4)
    assert run.history[-1]["val/loss"] == loss_with(run, average(run))
    assert run.history[-1]["val/loss"] != loss_with(run, weights(run.model))


def test_validation_uses_the_trained_weights_before_the_average_begins_or_without_evaluate(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    for number, ema in enumerate([Ema(start=Period(99)), Ema(evaluate=False)]):
        run = tiny_run(ema, length=8, validate_every=4, run_dir=tmp_path / str(number))
        assert run.history[-1]["val/loss"] == loss_with(run, weights(run.model))


@pytest.mark.parametrize("names", [("ema", "swa"), ("swa", "ema")])
@pytest.mark.parametrize("evaluating", ["ema", "swa", None])
def test_of_two_averages_the_one_with_evaluate_is_validated_and_neither_changes_the_other(
    tiny_run: TinyRun, tmp_path: Path, names: tuple[str, str], evaluating: str | None
) -> None:
    tables: dict[str, Any] = {"ema": {"decay": 0.9}, "swa": {"start": 0.5}}
    for name, table in tables.items():
        table |= {"evaluate": name == evaluating, "save": True}
    run = tiny_run(*names, settings=tables, length=8, validate_every=4)
    used = average(run, evaluating) if evaluating else weights(run.model)
    assert run.history[-1]["val/loss"] == loss_with(run, used)
    for name in names:
        alone = tiny_run(name, settings={name: tables[name]}, length=8, run_dir=tmp_path / name)
        assert same(average(run, name), average(alone, name))
        assert same(load_file(run.folder / f"{name}.safetensors"), average(alone, name))
    assert not same(average(run, "ema"), average(run, "swa"))


def test_two_instances_of_one_plugin_run_if_only_one_evaluates(
    tiny_run: TinyRun,
) -> None:
    tables = {"ema": {"decay": 0.5}, "slow": {"plugin": "ema", "decay": 0.99, "evaluate": False}}
    run = tiny_run("slow", "ema", settings=tables, length=8, validate_every=4)
    assert run.history[-1]["val/loss"] == loss_with(run, average(run))


def test_the_average_uses_the_memory_of_the_weights_and_is_removed_afterwards(
    tiny_run: TinyRun,
) -> None:
    run = tiny_run(Swa(start=0.5), length=8)
    before, kept, mean = dict(run.model.named_parameters()), weights(run.model), average(run, "swa")
    mean = {name: tensor.clone() for name, tensor in mean.items()}
    places = [p.data_ptr() for p in run.parameters]
    with run.hook.evaluation_weights(run=run), run.hook.evaluation_weights(run=run):
        assert same(weights(run.model), mean)
        assert [p.data_ptr() for p in run.parameters] == places
        assert all(p is before[name] for name, p in run.model.named_parameters())
        assert all(p.requires_grad for p in run.parameters)
    assert same(weights(run.model), kept)
    assert same(average(run, "swa"), mean)
    assert [p.data_ptr() for p in run.parameters] == places


@plugin
class Broken:
    """Fails in the middle of the second validation."""

    @hookimpl(wrapper=True)
    def forward(self, run: Run) -> Any:
        loss = yield
        if run.phase == "val" and run.progress.step == 4:
            raise RuntimeError("broken on purpose")
        return loss


@plugin
class Afterwards:
    """Records the run, and its weights after each step."""

    run: Any = None
    last: Any = None

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.run, self.last = run, weights(run.model)


def test_a_failing_validation_restores_the_trained_weights(tiny_run: TinyRun) -> None:
    after, ema = Afterwards(), Ema(decay=0.9)
    with pytest.raises(PluginError, match="broken on purpose"):
        tiny_run(ema, Broken(), after, length=8, validate_every=2)
    assert same(weights(after.run.model), after.last)
    assert not same(ema.get_state()["weights"], after.last)


def test_gradients_can_be_computed_with_the_averaged_weights(tiny_run: TinyRun) -> None:
    run = tiny_run(Ema(), length=4)
    (batch,) = run.data.validation()["val"]
    with run.hook.evaluation_weights(run=run):
        grads = torch.autograd.grad(run.model(*batch.data), run.parameters)
    assert all(grad.abs().sum() > 0 for grad in grads)


@plugin
class Compile:
    """Compiles the model in place."""

    @hookimpl
    def compile_model(self, model: nn.Module) -> nn.Module:
        model.compile(backend="eager")
        return model


def test_a_compiled_model_validates_with_the_average(tiny_run: TinyRun, tmp_path: Path) -> None:
    runs = [
        tiny_run(
            Ema(decay=0.9),
            TinyModel(dropout=0.0),
            *more,
            length=6,
            validate_every=2,
            run_dir=tmp_path / str(len(more)),
        )
        for more in ([], [Compile()])
    ]
    assert runs[0].history == runs[1].history
    assert_same_weights(*runs)
    assert same(average(runs[0]), average(runs[1]))


@plugin
class Tied:
    """A model with tied weights and a buffer."""

    @hookimpl
    def build_model(self) -> nn.Module:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
                self.other.weight = self.one.weight
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                self.calls += 1
                hidden = self.other(self.one(inputs).tanh())
                return nn.functional.mse_loss(hidden.sum(1, keepdim=True), targets)

        return Model()


def test_tied_weights_are_averaged_once_and_the_saved_file_loads_into_a_new_model(
    tiny_run: TinyRun,
) -> None:
    run = tiny_run(Ema(decay=0.9, save=True), Tied(), length=6, validate_every=3)
    assert set(average(run)) == {"one.weight", "one.bias", "other.bias"}
    new = Tied().build_model()
    new.load_state_dict(load_file(run.folder / "ema.safetensors"))
    assert same(weights(new), average(run))
    assert float(new.calls) == float(run.model.calls)
    assert new.one.weight is new.other.weight


def test_the_saved_file_has_the_instance_name_and_no_temporary_file_is_left(
    tiny_run: TinyRun,
) -> None:
    tables = {"slow": {"plugin": "swa", "save": True, "start": 0.0}}
    run = tiny_run("slow", settings=tables)
    assert same(load_file(run.folder / "slow.safetensors"), average(run, "slow"))
    assert not list(run.folder.glob(".slow*"))
    # Everyone who may read the other files of the folder may read this one.
    mode = (run.folder / "settings.toml").stat().st_mode
    assert (run.folder / "slow.safetensors").stat().st_mode == mode


@plugin
class Interrupt:
    """Sends a signal in the third step."""

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        if run.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupted_run_writes_no_file(tiny_run: TinyRun) -> None:
    run = tiny_run(Ema(save=True), Interrupt(), length=9)
    assert run.outcome == "interrupted"
    assert not list(run.folder.glob("*.safetensors"))


def test_an_average_that_never_began_is_a_warning_and_is_not_written(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(Swa(start=Period(9), save=True))
    assert "swa: the run ended before the average began: start is 9 steps" in caplog.messages
    assert not list(run.folder.glob("*.safetensors"))


def test_a_file_that_cannot_be_written_is_an_error_that_names_it(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    (tmp_path / "run" / "ema.safetensors").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"run/ema.safetensors: cannot be written"):
        tiny_run(Ema(save=True))


STORE = '''
import torch
from fundamentallm import hookimpl, plugin
from fundamentallm.testing import TinyParts


@plugin
class Store(TinyParts):
    """A tiny run, and its checkpoint in one file."""

    @hookimpl
    def on_safe_point(self, run):
        torch.save(run.snapshot(), run.folder / "latest.pt")

    @hookimpl
    def read_checkpoint(self, run):
        path = run.folder / "latest.pt"
        return torch.load(path, weights_only=True) if path.is_file() else None
'''


def test_a_loaded_run_evaluates_with_its_average(tmp_path: Path) -> None:
    (tmp_path / "store.py").write_text(STORE, encoding="utf-8")
    settings = {
        "plugins": [str(tmp_path / "store.py"), "ema"],
        "run": {"length": 7, "device": "cpu"},
        "ema": {"decay": 0.9},
    }
    trained = train(settings, run_dir=tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert_same_weights(loaded, trained)
    with loaded.hook.evaluation_weights(run=loaded):
        assert same(weights(loaded.model), average(trained))
    assert_same_weights(loaded, trained)


@pytest.mark.parametrize(
    ("made", "most"), [(Ema(decay=0.9), 6), (Ema(decay=0.1), 6), (Swa(start=0.0), 6)]
)
def test_a_step_reads_no_device_value_and_makes_few_python_calls(
    tiny_run: TinyRun, made: Any, most: int
) -> None:
    run = tiny_run(made, length=3)
    called: Counter[str] = Counter()

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call":
            called[frame.f_code.co_qualname] += 1

    with HostReads() as reads:
        run.hook.settle_step(run=run, applied=True)
    sys.setprofile(note)
    run.hook.settle_step(run=run, applied=True)
    sys.setprofile(None)
    assert reads.count == 0
    assert called.total() <= most, called
