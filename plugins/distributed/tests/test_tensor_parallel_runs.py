"""A run whose layers are split over processes is the run of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ragged import Ragged, assert_same_rows, furthest
from safetensors.torch import load_file

from fundamentallm import Run, SettingsError, hookimpl, plugin
from fundamentallm.testing import PluginContract, Trained
from fundamentallm_distributed import Fsdp, TensorParallel

SHORT = 12
# With two processes in a group and two groups, a process has 23 or 22 of the 90 hidden units.
GPT = {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_ff": 90}


class TestContract(PluginContract):
    plugin = TensorParallel
    needs = {"size": 1}
    companions = (Fsdp,)
    wrong_settings = (({"size": 0}, "tensor_parallel.size: must be >= 1"),)


def groups_of(size: int, **fsdp: Any) -> dict[str, Any]:
    return {"fsdp": {"timeout": 20, **fsdp}, "tensor_parallel": {"size": size}}


@pytest.fixture
def split(ragged: Any) -> Any:
    """Train on ragged data with layers split over ``size`` processes, and checkpoints."""

    def train(processes: int, size: int, *plugins: Any, **more: Any) -> list[Trained]:
        listed = [Ragged(), "checkpoint", "tensor_parallel", *plugins]
        chosen = groups_of(size) | {"gpt": GPT, "checkpoint": {"every": "4 steps", "keep_last": 9}}
        if "optimizer" not in more:
            # Adam divides small gradients by their size: the rounding of one would be an update.
            chosen["adamw"] = {"eps": 1e-5}
        chosen |= more.pop("tables", {})
        more = {"folder": f"{processes}-{size}", "length": SHORT} | more
        trained: list[Trained] = ragged(processes, *listed, kind="fsdp", tables=chosen, **more)
        return trained

    return train


def saved(folder: Path, step: int = SHORT) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    found = {}
    for file in sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        found |= {f"{file.stem}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


def assert_same(trained: list[Trained], alone: Trained) -> None:
    for one in trained:
        assert one.error is None
        assert_same_rows(one.history, alone.history)
    # Rows in files have the order of one process.
    assert furthest(saved(trained[0].folder), saved(alone.folder)) <= 1e-14


@pytest.mark.parametrize(("processes", "size"), [(2, 2), (4, 2)])
def test_split_layers_end_with_the_weights_and_metrics_of_one_process(
    split: Any, processes: int, size: int
) -> None:
    (alone,) = split(1, 1, "ema")
    assert_same(split(processes, size, "ema"), alone)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 2), (1, 1)),
        ((1, 1), (2, 2)),
        pytest.param((2, 1), (4, 2), marks=pytest.mark.slow),
        pytest.param((4, 2), (2, 1), marks=pytest.mark.slow),
    ],
)
def test_a_run_is_resumed_in_other_groups(
    split: Any, before: tuple[int, int], after: tuple[int, int]
) -> None:
    (alone,) = split(1, 1, "ema", folder="alone")
    split(*before, "ema", folder="moved", length=SHORT // 3 * 2)
    resumed = split(*after, "ema", folder="moved")
    assert [one.error for one in resumed] == [None] * after[0]
    assert furthest(saved(resumed[0].folder), saved(alone.folder)) <= 1e-14


@pytest.mark.slow
def test_with_dropout_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(
    split: Any,
) -> None:
    chosen = {"gpt": GPT | {"dropout": 0.2}}
    whole, other = split(2, 2, "ema", folder="whole", tables=chosen)
    split(2, 2, "ema", folder="again", tables=chosen, length=SHORT // 3 * 2)
    resumed, _ = split(2, 2, "ema", folder="again", tables=chosen)
    mine, theirs = saved(resumed.folder), saved(whole.folder)
    assert all(mine[name].equal(theirs[name]) for name in theirs)
    assert resumed.history[-1] == whole.history[-1] == other.history[-1]


WITH: dict[str, dict[str, Any]] = {
    "accumulate": {"microbatches": 3},
    "activation_checkpointing": {},
    "amp": {},
    "freeze": {"patterns": ["embed.*"]},
    "grad_stats": {"every": 2, "histograms": True},
    "guard": {},
    "lora": {},
    "lr_schedule": {"warmup": 4},
    "sgd": {"lr": 0.1},
    "swa": {"start": 0.5, "save": True},
    "validation": {},
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "table"), WITH.items(), ids=WITH)
def test_other_plugins_do_what_they_do_in_one_process(
    split: Any, name: str, table: dict[str, Any]
) -> None:
    more: dict[str, Any] = {"tables": {name: table}}
    if name == "sgd":
        more["optimizer"] = None
    (alone,) = split(1, 1, name, **more)
    assert_same(split(4, 2, name, **more), alone)


@pytest.mark.slow
def test_muon_differs_by_the_rounding_of_its_products_in_bf16(split: Any) -> None:
    # The rows of queries, keys and values have another order in its sums.
    (alone,) = split(1, 1, "muon", optimizer=None)
    trained = split(4, 2, "muon", optimizer=None)
    assert [one.error for one in trained] == [None] * 4
    assert furthest(saved(trained[0].folder), saved(alone.folder)) <= 2e-4
    for key in ("train/loss", "val/loss"):
        expected = pytest.approx(alone.history[-1][key], rel=1e-6)
        assert [one.history[-1][key] for one in trained] == [expected] * 4


CLIPS: dict[str, dict[str, Any]] = {
    "largest": {"max_norm": 0.05, "norm_type": float("inf")},
    "sum": {"max_norm": 5.0, "norm_type": 1.0},
    "value": {"max_value": 0.001},
}


@pytest.mark.slow
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_gradients_are_clipped_by_the_norm_of_all_parts(split: Any, clip: dict[str, Any]) -> None:
    (alone,) = split(1, 1, tables={"grad_clip": clip})
    assert_same(split(4, 2, tables={"grad_clip": clip}), alone)


TEXT = {
    "text": {"tokenizer": "byte", "context_length": 16, "batch_size": 8},
    "sample": {"every": "4 steps", "max_tokens": 24, "prompt": "a"},
}


@pytest.mark.slow
def test_samples_are_those_of_one_process(two_processes: Any, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(chr(97 + i * i % 26) for i in range(4000)))
    settings = {"gpt": GPT, **TEXT, "text": {"path": str(corpus), **TEXT["text"]}}
    texts = []
    for size in (1, 2):
        folder = tmp_path / f"run-{size}"
        trained = two_processes(
            *("text", "gpt", "adamw", "ema", "sample", "tensor_parallel"),
            kind="fsdp",
            processes=size,
            settings=groups_of(size) | settings,
            run_dir=folder,
            length=8,
            validate_every=4,
        )
        assert [one.error for one in trained] == [None] * size
        texts.append({file.name: file.read_text() for file in (folder / "samples").iterdir()})
    assert sorted(texts[0]) == ["step-00000004.txt", "step-00000008.txt"]
    assert texts[0] == texts[1]


@plugin
class Places:
    """Keeps which samples this process read first, and what it held of the weights."""

    role = "observer"

    def __attrs_post_init__(self) -> None:
        self.kept: dict[str, Any] = {}

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        parameters: list[Any] = list(run.model.parameters())
        held = sum(parameter.to_local().numel() for parameter in parameters)
        self.kept = {
            "first": run.window[0].first,
            "random": float(torch.rand(())),
            "share": held / sum(parameter.numel() for parameter in parameters),
        }

    def get_state(self) -> dict[str, Any]:
        return self.kept

    def set_state(self, state: dict[str, Any]) -> None:
        self.kept = state


def test_the_processes_of_a_group_read_the_same_samples_and_draw_the_same_numbers(
    split: Any,
) -> None:
    kept = [one.states["places"] for one in split(4, 2, Places(), length=2)]
    assert [one["first"] for one in kept] == [8, 8, 12, 12]
    assert kept[0]["random"] == kept[1]["random"] != kept[2]["random"] == kept[3]["random"]
    assert all(0.25 <= one["share"] < 0.27 for one in kept)


def test_what_cannot_be_split_is_refused(split: Any, two_processes: Any) -> None:
    for one in split(2, 3):
        assert isinstance(one.error, SettingsError)
        assert "tensor_parallel.size: 2 processes cannot form groups of 3" in str(one.error)
    for one in two_processes("tensor_parallel", kind="fsdp", settings=groups_of(2), length=2):
        assert isinstance(one.error, SettingsError)
        assert "tensor_parallel: Tiny has no method tensor_parallel_plan" in str(one.error)
    for one in split(4, 2, tables=groups_of(2, replicas=2)):
        assert "fsdp.replicas: 2 replicas do not work with tensor_parallel" in str(one.error)
    table = {"tensor_parallel": {"size": 2}}
    for one in two_processes("tensor_parallel", kind="ddp", settings=table, length=2):
        assert "tensor_parallel: needs 'fsdp' in `plugins`" in str(one.error)
