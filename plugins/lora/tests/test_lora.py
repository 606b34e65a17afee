"""Adapters compute and learn what the paper says, and no other weight changes."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fundamentallm import (
    Batch,
    Progress,
    Run,
    SettingsError,
    StorageError,
    command_line,
    hookimpl,
    plugin,
)
from fundamentallm.testing import (
    PluginContract,
    TinyModel,
    TinyRun,
    assert_same_weights,
    weights,
)
from fundamentallm_lora import Lora
from fundamentallm_lora.layer import LoraLinear, add_adapter


class TestContract(PluginContract):
    plugin = Lora
    wrong_settings = (
        ({"targets": []}, "lora.targets: is empty; name linear layers"),
        ({"targets": "*"}, "lora.targets: expected a list"),
        ({"rank": 0}, "lora.rank: must be >= 1"),
        ({"rank": 8.5}, "lora.rank: expected a whole number"),
        ({"alpha": 0}, "lora.alpha: must be > 0"),
        ({"dropout": 1.0}, "lora.dropout: must be < 1"),
    )


def tiny(dropout: float = 0.0) -> nn.Module:
    return TinyModel(dropout=dropout).build_model()


@plugin
class Build:
    """Builds a model and records snapshots."""

    def __attrs_post_init__(self) -> None:
        self.make: Callable[[], nn.Module] = tiny
        self.kept: dict[int, Any] = {}
        self.start: Any = None
        self.trained: set[str] = set()

    @hookimpl
    def build_model(self) -> nn.Module:
        return self.make()

    @hookimpl
    def forward(self, run: Run, batch: Batch) -> Tensor:
        like = next(run.model.parameters())
        return run.module(*(tensor.to(like.dtype) for tensor in batch.data))

    @hookimpl
    def read_checkpoint(self) -> Any:
        return copy.deepcopy(self.start)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self.kept[run.progress.step] = copy.deepcopy(run.snapshot())

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        named = run.model.named_parameters()
        self.trained |= {name for name, p in named if p.grad is not None}

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        self.kept[run.progress.step] = copy.deepcopy(run.snapshot())


def building(make: Callable[[], nn.Module]) -> Build:
    build = Build()
    build.make = make
    return build


class Reference(nn.Module):
    """The tiny network with the formula of the paper written out: (W + alpha / rank * B A) x."""

    def __init__(self, state: dict[str, Tensor], scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.frozen = {name: tensor.clone() for name, tensor in state.items()}
        for name in ("hidden.lora_a", "hidden.lora_b", "out.lora_a", "out.lora_b"):
            self.register_parameter(name.replace(".", "_"), nn.Parameter(state[name].clone()))

    def layer(self, name: str, x: Tensor) -> Tensor:
        a, b = getattr(self, f"{name}_lora_a"), getattr(self, f"{name}_lora_b")
        weight = self.frozen[f"{name}.weight"] + self.scale * b @ a
        return x @ weight.T + self.frozen[f"{name}.bias"]

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.layer("hidden", inputs))
        return nn.functional.mse_loss(self.layer("out", hidden), targets)


def test_a_run_learns_the_weights_of_the_formula_written_out(tiny_run: TinyRun) -> None:
    build = building(lambda: tiny().double())
    run = tiny_run(build, Lora(rank=3, alpha=7.5), length=6)
    reference = Reference(build.kept[0]["model"], scale=2.5)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01)
    for _, batch in zip(range(6), run.data.batches(Progress()), strict=False):
        optimizer.zero_grad()
        reference(*(tensor.double() for tensor in batch.data)).backward()
        optimizer.step()
    found = weights(run)
    for name, parameter in reference.named_parameters():
        mine = found[name.replace("_", ".", 1)]
        torch.testing.assert_close(mine, parameter.data, rtol=0, atol=1e-12)
    assert not found["hidden.lora_b"].equal(build.kept[0]["model"]["hidden.lora_b"])


def test_only_adapters_have_gradients_and_optimizer_state_and_other_weights_keep_their_bits(
    tiny_run: TinyRun,
) -> None:
    build = building(tiny)
    run = tiny_run(build, Lora(rank=2), length=4)
    adapters = {"hidden.lora_a", "hidden.lora_b", "out.lora_a", "out.lora_b"}
    assert build.trained == adapters
    assert set(build.kept[4]["optimizer"]) == adapters
    before, after = build.kept[0]["model"], weights(run)
    assert {name for name in after if not after[name].equal(before[name])} == adapters


def test_names_and_shapes_are_those_of_the_base_and_the_adapters(tiny_run: TinyRun) -> None:
    run = tiny_run(building(tiny), Lora(rank=3, targets=["hidden"]), length=1)
    shapes = {name: list(tensor.shape) for name, tensor in weights(run).items()}
    assert shapes == {
        "hidden.weight": [16, 8],
        "hidden.bias": [16],
        "hidden.lora_a": [3, 8],
        "hidden.lora_b": [16, 3],
        "out.weight": [1, 16],
        "out.bias": [1],
    }
    assert "rank=3, scale=5.33333" in repr(run.model.hidden)


def test_before_the_first_step_the_model_computes_the_same_as_without_adapters(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"length": 1, "validate_first": True, "validate_every": 1}
    with_dropout = lambda: tiny(dropout=0.3)  # noqa: E731
    plain = tiny_run(building(with_dropout), run_dir=tmp_path / "plain", **settings)
    adapted = tiny_run(building(with_dropout), Lora(dropout=0.0), **settings)
    assert adapted.history[0]["val/loss"] == plain.history[0]["val/loss"]
    assert adapted.history[1]["train/loss"] == plain.history[1]["train/loss"]


def test_a_starts_uniform_within_one_over_the_root_of_the_inputs_and_b_as_zeros(
    tiny_run: TinyRun,
) -> None:
    build = building(Wide)
    tiny_run(build, Lora(rank=64), length=1)
    state = build.kept[0]["model"]
    first, bound = state["inner.lora_a"], 1 / math.sqrt(256)
    assert bool((first.abs() <= bound).all())
    assert float(first.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(float(first.mean())) < bound / 50
    assert not bool(state["inner.lora_b"].any())


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.inner, self.out = nn.Linear(8, 256), nn.Linear(256, 256), nn.Linear(256, 1)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.out(self.inner(self.into(inputs))), targets)


def test_an_adapter_starts_with_the_same_values_whichever_other_adapters_there_are(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    states = []
    for index, targets in enumerate((["*"], ["out"], ["out", "*"])):
        build = building(tiny)
        tiny_run(build, Lora(targets=targets), length=1, run_dir=tmp_path / str(index))
        states.append(build.kept[0])
    for state in states[1:]:
        assert state["model"]["out.lora_a"].equal(states[0]["model"]["out.lora_a"])
    other = building(tiny)
    tiny_run(other, Lora(), length=1, seed=7)
    assert not other.kept[0]["model"]["out.lora_a"].equal(states[0]["model"]["out.lora_a"])


def test_dropout_drops_only_inputs_of_adapters_and_only_in_training() -> None:
    layer = nn.Linear(64, 4)
    add_adapter(layer, Lora(rank=2, dropout=0.5), torch.Generator())
    with torch.no_grad():
        layer.lora_b.fill_(1)
    x = torch.ones(1, 64)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    torch.manual_seed(0)
    kept = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    assert layer(x).equal(plain + (kept @ layer.lora_a.T * 8) @ layer.lora_b.T)
    layer.eval()
    assert layer(x).equal(plain + (x @ layer.lora_a.T * 8) @ layer.lora_b.T)


def test_train_also_selects_other_trained_parameters(tiny_run: TinyRun) -> None:
    build = building(tiny)
    tiny_run(build, Lora(targets=["hidden"], train_also=["*.bias", "out.*"]), length=1)
    assert build.trained == {
        "hidden.lora_a",
        "hidden.lora_b",
        "hidden.bias",
        "out.weight",
        "out.bias",
    }


def test_targets_and_except_for_select_the_layers(tiny_run: TinyRun) -> None:
    run = tiny_run(building(tiny), Lora(except_for=["o*"]), length=1)
    assert [type(run.model.hidden), type(run.model.out)] == [LoraLinear, nn.Linear]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(
    tiny_run: TinyRun, tmp_path: Path, step: int
) -> None:
    whole, resumed = building(tiny), building(tiny)
    runs = [tiny_run(whole, Lora(dropout=0.2), length=4, validate_every=2)]
    resumed.start = whole.kept[step]
    settings: dict[str, Any] = {"length": 4, "validate_every": 2, "run_dir": tmp_path / "resumed"}
    runs.append(tiny_run(resumed, Lora(dropout=0.2), **settings))
    assert_same_weights(*runs)


@pytest.mark.parametrize("names", [("freeze", "lora"), ("lora", "freeze")])
def test_lora_is_applied_before_freeze_in_any_order_of_the_list(
    tiny_run: TinyRun, names: tuple[str, str]
) -> None:
    tables = {"freeze": {"patterns": ["hidden.*"], "unfreeze": {"*": 2}}, "lora": {"rank": 2}}
    build = building(tiny)
    run = tiny_run(*names, build, length=3, settings=tables)
    assert build.kept[2]["optimizer"].keys() == {"out.lora_a", "out.lora_b"}
    trainable = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trainable == {"hidden.lora_a", "hidden.lora_b", "out.lora_a", "out.lora_b"}


def test_the_log_states_how_many_weights_are_trained(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fundamentallm")
    tiny_run(Lora(rank=2), length=1)
    assert "lora: 2 adapters; 82 of 243 weights are trained" in caplog.messages


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight
        self.inner = nn.Linear(8, 8)
        self.again = self.inner

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        tokens = (inputs.abs() * 7).long()
        return self.head(self.again(self.inner(self.embed(tokens)))).square().mean()


def test_a_layer_that_shares_its_weight_with_another_is_refused(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError) as caught:
        tiny_run(building(Tied), Lora(), length=1)
    assert str(caught.value) == (
        "lora.targets: head shares its weight with embed, and the merged weight would be wrong there; "
        "untie them, or add 'head' to lora.except_for"
    )


def test_a_layer_that_is_used_twice_has_one_adapter(tiny_run: TinyRun) -> None:
    build = building(Tied)
    tiny_run(build, Lora(except_for=["head"]), length=1)
    assert build.trained == {"inner.lora_a", "inner.lora_b"}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.head(self.encoder(inputs[:, None])[:, 0]), targets)


def test_a_layer_whose_weight_is_read_without_calling_it_is_refused(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError, match=r"around encoder\.linear1 skips the adapter"):
        tiny_run(building(Attention), Lora(), length=1)
    with pytest.raises(SettingsError, match=r"out_proj is a NonDynamicallyQuantizableLinear"):
        tiny_run(building(Attention), Lora(targets=["*.out_proj"]), length=1)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        run = tiny_run(building(Attention), Lora(), length=1)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert type(run.model.encoder.linear1) is LoraLinear


class Conv1D(nn.Module):
    """A copy of transformers' Conv1D, which its GPT-2 uses in place of nn.Linear."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class Gpt2(nn.Module):
    """A model of Conv1D layers with different numbers of inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(24, 8), Conv1D(1, 24)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.c_proj(self.c_attn(inputs).tanh()), targets)


def test_the_conv1d_layers_of_transformers_are_adapted_and_merged(tiny_run: TinyRun) -> None:
    build = building(lambda: Gpt2().double())
    run = tiny_run(build, Lora(rank=3), length=5)
    found = weights(run)
    assert list(found["c_attn.lora_a"].shape) == [3, 8]
    assert list(found["c_attn.lora_b"].shape) == [24, 3]
    assert build.trained == {f"{n}.lora_{m}" for n in ("c_attn", "c_proj") for m in "ab"}
    assert isinstance(run.model.c_attn, Conv1D)
    batch = [tensor.double() for tensor in run.data.validation()["val"][0].data]
    with torch.no_grad():
        loss = run.model(*batch)
        plain = Gpt2().double()
        plain.load_state_dict({n: t for n, t in found.items() if "lora" not in n})
        assert not torch.allclose(plain(*batch), loss, rtol=1e-6)
        run.hook.finish_model(run=run)
        assert type(run.model.c_attn) is Conv1D
        assert set(weights(run)) == set(plain.state_dict())
        torch.testing.assert_close(run.model(*batch), loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"targets": ["hiden"]},
            "lora.targets: 'hiden' matches no linear layer (did you mean 'hidden'?)",
        ),
        ({"targets": ["q"]}, "lora.targets: 'q' matches no linear layer (known: hidden, out)"),
        (
            {"targets": ["drop*"]},
            "lora.targets: 'drop*' matches no linear layer (dropout is a Dropout)",
        ),
        (
            {"except_for": ["aut"]},
            "lora.except_for: 'aut' matches no linear layer (did you mean 'out'?)",
        ),
        ({"except_for": ["*"]}, "lora.except_for: leaves no layer to adapt"),
        (
            {"train_also": ["*.gain"]},
            "lora.train_also: '*.gain' matches no parameter (known: hidden.*",
        ),
    ],
)
def test_patterns_that_do_not_fit_the_model_are_reported_with_ones_that_do(
    tiny_run: TinyRun, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        tiny_run(building(tiny), Lora(**settings), length=1)
    assert complaint in str(caught.value)


class TestBase:
    @pytest.fixture
    def state(self) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return {name: tensor.clone() for name, tensor in tiny().state_dict().items()}

    def test_the_frozen_weights_are_those_of_the_file_or_folder(
        self, tiny_run: TinyRun, tmp_path: Path, state: dict[str, Tensor]
    ) -> None:
        save_file(state, tmp_path / "model.safetensors")
        for path in (tmp_path, tmp_path / "model.safetensors"):
            found = weights(tiny_run(building(tiny), Lora(base=path), length=2))
            assert all(found[name].equal(tensor) for name, tensor in state.items())

    def test_a_checkpoint_of_another_run_is_a_base(self, tiny_run: TinyRun, tmp_path: Path) -> None:
        first = tiny_run("checkpoint", TinyModel(), length=2, run_dir=tmp_path / "first")
        base = tmp_path / "first" / "checkpoints" / "step-00000002"
        found = weights(tiny_run(TinyModel(), Lora(base=base), length=1))
        assert all(found[name].equal(tensor) for name, tensor in weights(first).items())

    def test_tied_weights_may_be_in_the_file_once(self, tiny_run: TinyRun, tmp_path: Path) -> None:
        state = {name: torch.full_like(t, 0.5) for name, t in Tied().state_dict().items()}
        for name in ("head.weight", "again.weight", "inner.bias"):
            del state[name]
        save_file(state, tmp_path / "base.safetensors")
        lora = Lora(base=tmp_path / "base.safetensors", targets=["inner"])
        run = tiny_run(building(Tied), lora, length=1)
        assert bool((run.model.head.weight == 0.5).all())
        assert run.model.head.weight is run.model.embed.weight

    def test_a_resumed_run_needs_no_base_but_a_new_run_does(
        self, tiny_run: TinyRun, tmp_path: Path, state: dict[str, Tensor]
    ) -> None:
        file, whole, resumed = tmp_path / "base.safetensors", building(tiny), building(tiny)
        save_file(state, file)
        runs = [tiny_run(whole, Lora(base=file), length=3)]
        file.unlink()
        resumed.start = whole.kept[2]
        runs.append(tiny_run(resumed, Lora(base=file), length=3, run_dir=tmp_path / "resumed"))
        assert_same_weights(*runs)
        with pytest.raises(SettingsError, match=r"lora\.base: there is no file .*base\.safe"):
            tiny_run(building(tiny), Lora(base=file), length=3, run_dir=tmp_path / "new")

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (lambda state: state.pop("out.bias"), "does not fit the model: it lacks out.bias"),
            (lambda state: state.update(more=torch.ones(1)), "the model has no more"),
            (
                lambda state: state.update({"out.bias": torch.ones(2)}),
                "other shapes than in the model: out.bias ([2], expected [1])",
            ),
            (
                lambda state: state.update({"out.lora_a": torch.ones(2)}),
                "it contains adapters of another run; merge them with: "
                + command_line("lora-merge"),
            ),
            (
                lambda state: (state.clear(), state.update(x=torch.ones(1))),
                "it lacks hidden.bias, hidden.weight, out.bias and 1 more; the model has no x",
            ),
        ],
    )
    def test_a_base_of_another_model_is_an_error_with_the_differences(
        self,
        tiny_run: TinyRun,
        tmp_path: Path,
        state: dict[str, Tensor],
        change: Any,
        complaint: str,
    ) -> None:
        change(state)
        save_file(state, tmp_path / "base.safetensors")
        with pytest.raises(StorageError) as caught:
            tiny_run(building(tiny), Lora(base=tmp_path / "base.safetensors"), length=1)
        assert complaint in str(caught.value)

    @pytest.mark.parametrize("content", [b"", b"no", b'\x08\0\0\0\0\0\0\0{"a": 1', bytes(64)])
    def test_a_damaged_base_is_an_error_that_names_it(
        self, tiny_run: TinyRun, tmp_path: Path, content: bytes
    ) -> None:
        (tmp_path / "base.safetensors").write_bytes(content)
        with pytest.raises(StorageError, match=r"base\.safetensors is not a safetensors file"):
            tiny_run(building(tiny), Lora(base=tmp_path / "base.safetensors"), length=1)
