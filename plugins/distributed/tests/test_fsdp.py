"""A run whose processes each hold a part of the model is the run of one process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ragged import Ragged, assert_same_rows, furthest
from safetensors.torch import load_file

from fundamentallm import PeerError, Run, SettingsError, hookimpl, plugin
from fundamentallm.testing import PluginContract, Trained
from fundamentallm_distributed import Fsdp

SHORT = 12


class TestContract(PluginContract):
    plugin = Fsdp
    wrong_settings = (
        ({"timeout": 0}, "fsdp.timeout: must be > 0"),
        ({"replicas": 0}, "fsdp.replicas: must be >= 1"),
        ({"params": "fp16"}, 'fsdp.params: unknown value "fp16"'),
        ({"blocks": []}, "blocks: is empty"),
    )


@pytest.fixture
def sharded(ragged: Any) -> Any:
    """Train on ragged data with the plugin ``fsdp``."""

    def train(processes: int, *plugins: Any, **more: Any) -> list[Trained]:
        trained: list[Trained] = ragged(processes, *plugins, kind="fsdp", **more)
        return trained

    return train


def fsdp(**table: Any) -> dict[str, Any]:
    return {"fsdp": {"timeout": 20, **table}}


def assert_same(trained: list[Trained], alone: Trained) -> None:
    for one in trained:
        assert one.error is None
        assert furthest(one.weights, alone.weights) <= 1e-14
        assert_same_rows(one.history, alone.history)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_any_number_of_processes_ends_with_the_weights_and_metrics_of_one(
    sharded: Any, processes: int
) -> None:
    (alone,) = sharded(1, Ragged())
    assert_same(sharded(processes, Ragged()), alone)


@pytest.mark.parametrize(("processes", "replicas"), [(4, 2), (2, 2)])
def test_groups_of_processes_that_each_hold_the_model_end_alike(
    sharded: Any, processes: int, replicas: int
) -> None:
    (alone,) = sharded(1, Ragged())
    assert_same(sharded(processes, Ragged(), tables=fsdp(replicas=replicas)), alone)


@plugin
class Hang:
    """Lets the second process hang in the forward pass of one step, for longer than the timeout."""

    role = "training"

    @hookimpl(wrapper=True)
    def forward(self, run: Run) -> Any:
        if run.progress.step == 3 and run.rank == 1:
            time.sleep(5)
        return (yield)


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_process_that_hangs_counts_as_lost_after_the_timeout(sharded: Any, replicas: int) -> None:
    tables = fsdp(timeout=2, replicas=replicas)
    first, _ = sharded(2, Ragged(), Hang(), tables=tables, length=SHORT)
    assert isinstance(first.error, PeerError)


def test_a_process_without_a_target_takes_part(sharded: Any) -> None:
    (alone,) = sharded(1, Ragged(only_first=True))
    assert_same(sharded(2, Ragged(only_first=True)), alone)


@plugin
class Parts:
    """Keeps how many numbers of the model, its gradients and its optimizer this process holds."""

    role = "observer"

    def __attrs_post_init__(self) -> None:
        self.held: dict[str, int] = {}

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        states = [value for state in run.optimizer.state.values() for value in state.values()]
        tensors: dict[str, list[Any]] = {
            "weights": list(run.model.parameters()),
            "gradients": [p.grad for p in run.model.parameters()],
            "states": [value for value in states if value.ndim],
        }
        for name, found in tensors.items():
            parts = [t.to_local() if hasattr(t, "to_local") else t for t in found]
            self.held[name] = sum(part.numel() for part in parts)

    def get_state(self) -> dict[str, int]:
        return self.held

    def set_state(self, state: dict[str, int]) -> None:
        self.held = state


@pytest.mark.parametrize(("replicas", "share"), [(1, 4), (2, 2)])
def test_a_process_holds_a_part_of_weights_gradients_and_optimizer_states(
    sharded: Any, replicas: int, share: int
) -> None:
    (alone,) = sharded(1, Ragged(), Parts(), length=2)
    trained = sharded(4, Ragged(), Parts(), length=2, tables=fsdp(replicas=replicas))
    whole = alone.states["parts"]
    for one in trained:
        held = one.states["parts"]
        assert held == {name: number / share for name, number in whole.items()}


OPTIONS: dict[str, dict[str, Any]] = {
    "weights_kept": {"reshard": False},
    "other_blocks": {"blocks": ["blocks.*.mlp", "blocks.*.attention"]},
    "offload_on_the_cpu": {"offload": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_setting_of_the_sharding_changes_the_run(sharded: Any, options: dict[str, Any]) -> None:
    # The average is validated with: weights of the training must not be used in its place.
    (alone,) = sharded(1, Ragged(), "ema", length=SHORT)
    assert_same(sharded(2, Ragged(), "ema", tables=fsdp(**options), length=SHORT), alone)


def test_a_model_without_a_list_of_blocks_is_sharded_as_a_whole(two_processes: Any) -> None:
    for one in two_processes(kind="fsdp", length=4):
        assert one.outcome == "finished"


@pytest.mark.parametrize("setting", ["params", "reduce"])
def test_bf16_rounds_and_still_updates_the_original_weights(sharded: Any, setting: str) -> None:
    single = Ragged(dtype="float32")
    (alone,) = sharded(1, single, length=SHORT)
    for one in sharded(2, single, length=SHORT, tables=fsdp(**{setting: "bf16"})):
        assert {weight.dtype for weight in one.weights.values()} == {torch.float32}
        assert 1e-6 < furthest(one.weights, alone.weights) < 1e-2
        assert one.history[-1]["val/loss"] == pytest.approx(alone.history[-1]["val/loss"], rel=1e-2)


WITH: dict[str, tuple[str, dict[str, Any]]] = {
    "accumulate": ("accumulate", {"microbatches": 3}),
    "activation_checkpointing": ("activation_checkpointing", {}),
    "amp": ("amp", {}),
    "ema": ("ema", {"decay": 0.9, "save": True}),
    "freeze": ("freeze", {"patterns": ["embed.*"]}),
    "grad_stats": ("grad_stats", {"every": 2, "histograms": True}),
    "lora": ("lora", {}),
    "lr_schedule": ("lr_schedule", {"warmup": 4}),
    "swa": ("swa", {"start": 0.5, "save": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "table"), WITH.values(), ids=WITH)
def test_other_plugins_do_what_they_do_in_one_process(
    sharded: Any, name: str, table: dict[str, Any]
) -> None:
    (alone,) = sharded(1, Ragged(), name, tables={name: table}, length=SHORT)
    trained = sharded(2, Ragged(), name, tables={name: table}, length=SHORT)
    assert_same(trained, alone)
    files = f"{name}.safetensors", f"{name}.jsonl"
    wrote = [file for file in files if (alone.folder / file).exists()]
    assert len(wrote) == int(name in ("ema", "swa", "grad_stats"))
    for file in wrote:
        ours, theirs = trained[0].folder / file, alone.folder / file
        if file.endswith("jsonl"):
            assert ours.read_text() == theirs.read_text()
        else:
            assert furthest(load_file(ours), load_file(theirs)) <= 1e-14


@pytest.mark.slow  # the compiler takes half a minute
@pytest.mark.parametrize("scope", ["model", "blocks"])
def test_a_compiled_model_is_sharded(sharded: Any, scope: str) -> None:
    table = {"compile": {"backend": "aot_eager", "scope": scope}}
    (alone,) = sharded(1, Ragged(), "compile", tables=table, length=SHORT)
    assert_same(sharded(2, Ragged(), "compile", tables=table, length=SHORT), alone)


@plugin
class Overflow:
    """Puts an infinite gradient into the last row of the embedding at one step."""

    role = "training"

    @hookimpl(wrapper=True)
    def train_microbatch(self, run: Run) -> Any:
        yield
        gradient: Any = dict(run.model.named_parameters())["embed.weight"].grad
        part = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        if run.progress.step == 7 and run.rank == run.world_size - 1:
            part[-1, -1] = float("inf")


def test_an_overflow_in_the_part_of_one_process_rejects_the_step_in_all(sharded: Any) -> None:
    more = {"tables": {"amp": {"dtype": "fp16", "init_scale": 2.0**24}}, "length": SHORT}
    single = Ragged(dtype="float32")
    (alone,) = sharded(1, single, Overflow(), "amp", **more)
    first, second = sharded(2, single, Overflow(), "amp", **more)
    assert first.states["amp"] == second.states["amp"] == alone.states["amp"]
    assert alone.states["amp"]["overflows"] > 1  # the first scales are too large, too
    assert furthest(first.weights, alone.weights) < 1e-3


CLIPS: dict[str, dict[str, Any]] = {
    "largest": {"max_norm": 0.05, "norm_type": float("inf")},
    "sum": {"max_norm": 5.0, "norm_type": 1.0},
    "value": {"max_value": 0.001},
}


@pytest.mark.slow
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_gradients_are_clipped_by_the_norm_of_all_parts(sharded: Any, clip: dict[str, Any]) -> None:
    # Of a model with vectors shorter than the processes are many, some hold nothing.
    tables = {"grad_clip": clip, "lora": {"rank": 2}}
    (alone,) = sharded(1, Ragged(), "lora", tables=tables, length=SHORT)
    assert_same(sharded(3, Ragged(), "lora", tables=tables, length=SHORT), alone)


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("adam", {}),
    "muon": ("muon", {}),
    "sgd": ("sgd", {"lr": 0.1}),
    "sgd_with_momentum": ("sgd", {"lr": 0.1, "momentum": 0.9}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "table"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_update_parts_as_they_update_the_whole(
    sharded: Any, name: str, table: dict[str, Any]
) -> None:
    more = {"optimizer": None, "tables": {name: table}, "length": SHORT}
    (alone,) = sharded(1, Ragged(), name, **more)
    assert_same(sharded(2, Ragged(), name, **more), alone)


@pytest.mark.parametrize(
    ("name", "tables", "text"),
    [
        ("adafactor", {}, "adafactor: PyTorch's Adafactor cannot train weights that are divided"),
        ("sgd", {"sgd": {"lr": 0.1, "fused": True}}, "sgd.fused: PyTorch has no fused kernel"),
        ("adamw", fsdp(replicas=3), "fsdp.replicas: 2 processes cannot form 3 groups"),
        ("adamw", fsdp(blocks=["layers.*"]), "fsdp.blocks: 'layers.*' matches no module"),
    ],
)
def test_what_does_not_work_with_parts_is_refused(
    sharded: Any, name: str, tables: dict[str, Any], text: str
) -> None:
    for one in sharded(2, Ragged(), name, optimizer=None, tables=tables, length=2):
        assert isinstance(one.error, SettingsError)
        assert text in str(one.error)


@pytest.mark.parametrize("setting", ["params", "reduce"])
def test_one_process_does_not_ignore_a_precision(sharded: Any, setting: str) -> None:
    (alone,) = sharded(1, Ragged(), tables=fsdp(**{setting: "bf16"}), length=2)
    assert isinstance(alone.error, SettingsError)
    assert f"fsdp.{setting}: one process divides nothing" in str(alone.error)


TEXT = {
    "text": {"tokenizer": "byte", "context_length": 16, "batch_size": 8},
    "gpt": {"num_layers": 2, "d_model": 32, "num_heads": 4},
    "sample": {"every": "4 steps", "max_tokens": 24, "prompt": "a"},
}


@pytest.fixture
def sampling(two_processes: Any, tmp_path: Path) -> Any:
    """Train on text with samples, in the run folder ``run-<processes>``."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(chr(97 + i * i % 26) for i in range(4000)))
    tables = TEXT | {"text": {"path": str(corpus), **TEXT["text"]}}

    def train(processes: int, kind: str) -> Path:
        folder = tmp_path / f"run-{processes}"
        more = {"settings": tables, "run_dir": folder, "length": 12, "validate_every": 4}
        listed = ("text", "gpt", "adamw", "ema", "sample")
        trained = two_processes(*listed, kind=kind, processes=processes, **more)
        assert [one.error for one in trained] == [None] * processes
        return folder / "samples"

    return train


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_samples_are_those_of_one_process_and_written_once(sampling: Any, kind: str) -> None:
    alone, both = (
        {file.name: file.read_text() for file in sampling(processes, kind).iterdir()}
        for processes in (1, 2)
    )
    assert sorted(alone) == [f"step-{step:08d}.txt" for step in (4, 8, 12)]
    assert alone == both


def test_samples_that_cannot_be_written_are_left_out_in_all_processes(
    sampling: Any, tmp_path: Path
) -> None:
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-2" / "samples").write_text("in the way")
    assert sampling(2, "fsdp").read_text() == "in the way"


SAVING = ("checkpoint", "ema")
TABLES = {"checkpoint": {"every": "4 steps", "keep_last": 9}}
HALF = SHORT // 3 * 2


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    found = {}
    for file in sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        found |= {f"{file.stem}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


@pytest.fixture
def saving(ragged: Any) -> Any:
    """Train with checkpoints; the run folder is ``name`` for any number of processes."""

    def train(
        name: str, processes: int, kind: str, length: int, replicas: int = 1
    ) -> list[Trained]:
        tables = TABLES | (fsdp(replicas=replicas) if kind == "fsdp" else {})
        more = {"tables": tables, "folder": name, "length": length}
        trained: list[Trained] = ragged(processes, Ragged(), *SAVING, kind=kind, **more)
        return trained

    return train


@pytest.mark.parametrize(("processes", "replicas"), [(2, 1), (4, 2)])
def test_a_checkpoint_of_parts_is_that_of_one_process(
    saving: Any, processes: int, replicas: int
) -> None:
    (alone,) = saving("alone", 1, "fsdp", SHORT)
    first, *_ = saving("several", processes, "fsdp", SHORT, replicas)
    for step in (4, 8, 12):
        mine, theirs = saved(first.folder, step), saved(alone.folder, step)
        assert mine.keys() == theirs.keys()
        assert {"model", "optimizer", "state"} == {name.split("/")[0] for name in mine}
        assert furthest(mine, theirs) <= 1e-14
        assert all(mine[name].dtype == theirs[name].dtype for name in mine)


def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(saving: Any) -> None:
    whole, _ = saving("whole", 2, "fsdp", SHORT)
    saving("again", 2, "fsdp", HALF)
    resumed, _ = saving("again", 2, "fsdp", SHORT)
    mine, theirs = saved(resumed.folder, SHORT), saved(whole.folder, SHORT)
    assert all(mine[name].equal(theirs[name]) for name in theirs)
    assert resumed.history[-1] == whole.history[-1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "fsdp"), (1, "fsdp")),
        ((1, "fsdp"), (2, "fsdp")),
        ((2, "fsdp"), (3, "fsdp")),
        ((2, "ddp"), (2, "fsdp")),
        ((2, "fsdp"), (2, "ddp")),
    ],
)
def test_a_run_is_resumed_in_another_number_of_processes_or_with_ddp(
    saving: Any, before: tuple[int, str], after: tuple[int, str]
) -> None:
    (alone,) = saving("alone", 1, "fsdp", SHORT)
    saving("moved", *before, HALF)
    resumed = saving("moved", *after, SHORT)
    for one in resumed:
        assert one.error is None
        assert furthest(one.weights, alone.weights) <= 1e-14
    assert furthest(saved(resumed[0].folder, SHORT), saved(alone.folder, SHORT)) <= 1e-14
