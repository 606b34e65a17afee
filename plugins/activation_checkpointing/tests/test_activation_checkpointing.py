"""Recomputation saves memory and leaves gradients, names and random draws bit-identical."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fundamentallm import Batch, Run, SettingsError, find_blocks, hookimpl, plugin
from fundamentallm.testing import PluginContract, TinyRun, assert_same_weights, weights
from fundamentallm_activation_checkpointing import ActivationCheckpointing
from fundamentallm_activation_checkpointing.recompute import recompute

MODES: list[dict[str, Any]] = [
    {},
    {"every": 2},
    {"every": 9},
    {"mode": "selective"},
    {"mode": "selective", "every": 3},
    {"blocks": ["embed", "blocks.*.up"]},
]


class TestContract(PluginContract):
    plugin = ActivationCheckpointing
    needs = {"blocks": ["hidden"]}
    wrong_settings = (
        ({"mode": "some"}, 'activation_checkpointing.mode: unknown value "some"'),
        ({"every": 0}, "activation_checkpointing.every: must be >= 1"),
        ({"blocks": []}, "activation_checkpointing.blocks: is empty; leave it out"),
        ({"blocks": "blocks.*"}, "activation_checkpointing.blocks: expected a list"),
    )


class Block(nn.Module):
    """Attention and feed-forward, with dropout in three places."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).view(*x.shape[:2], 6, 8).split(2, 2)
        drop = self.dropout.p if self.training else 0.0
        heads = (part.transpose(1, 2) for part in (query, key, value))
        seen = scaled_dot_product_attention(*heads, dropout_p=drop, is_causal=True)
        x = x + self.dropout(seen.transpose(1, 2).flatten(2))
        x = x + self.dropout(self.down(gelu(self.up(x))))
        return x if scale is None else x * scale


class Counting(Block):
    """A block that counts how often it runs, which no compiler would take into a graph."""

    calls = 0

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(x, scale=scale)


class Transformer(nn.Module):
    """A transformer of four blocks on tokens made of a regression's inputs."""

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.small = nn.ModuleList([nn.Linear(16, 16)])
        self.head = nn.Linear(16, 32)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        tokens = ((inputs + 1) * 15).long()
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, scale=self.scale)
        logits = self.head(self.small[0](x))
        return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@plugin
class Gpt:
    """Builds the transformer, and records a run's snapshots and gradients."""

    def __attrs_post_init__(self) -> None:
        self.kept: dict[int, Any] = {}
        self.start: Any = None
        self.grads: list[list[Tensor]] = []

    @hookimpl
    def build_model(self) -> nn.Module:
        return Transformer()

    @hookimpl
    def collect_batches(self, stream: Any) -> list[Batch]:
        return [next(stream), next(stream)]

    @hookimpl
    def read_checkpoint(self) -> Any:
        return copy.deepcopy(self.start)

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.grads.append([p.grad.clone() for p in run.parameters])

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        self.kept[run.progress.step] = copy.deepcopy(run.snapshot())


@pytest.fixture
def plain(tiny_run: TinyRun, tmp_path: Path) -> tuple[Run, Gpt]:
    gpt = Gpt()
    return tiny_run(gpt, length=3, validate_every=1, run_dir=tmp_path / "plain"), gpt


@pytest.mark.parametrize("settings", MODES)
def test_gradients_losses_and_weights_are_bit_identical_to_those_without_recomputation(
    tiny_run: TinyRun, plain: tuple[Run, Gpt], settings: dict[str, Any]
) -> None:
    gpt = Gpt()
    run = tiny_run(ActivationCheckpointing(**settings), gpt, length=3, validate_every=1)
    for mine, theirs in zip(gpt.grads, plain[1].grads, strict=True):
        assert all(a.equal(b) for a, b in zip(mine, theirs, strict=True))
    assert_same_weights(run, plain[0])
    assert run.history == plain[0].history


def test_a_run_resumed_with_recomputation_ends_as_the_run_without_it(
    tiny_run: TinyRun, plain: tuple[Run, Gpt]
) -> None:
    gpt = Gpt()
    gpt.start = plain[1].kept[1]
    run = tiny_run(ActivationCheckpointing(mode="selective"), gpt, length=3, validate_every=1)
    assert_same_weights(run, plain[0])


def model(settings: dict[str, Any] | None, block: type[Block] = Block) -> Transformer:
    torch.manual_seed(0)
    found = Transformer(block)
    if settings is not None:
        plugin = ActivationCheckpointing(**settings)
        recompute(find_blocks(found, plugin.blocks, "it.blocks"), plugin, "it")
    return found


INPUTS = torch.linspace(-1, 1, 4 * 64).view(4, 64).sin()


def kept_bytes(net: nn.Module) -> int:
    """Return the bytes that a forward pass leaves allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss = net(INPUTS, INPUTS)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in found.key_averages())


def test_recomputing_more_blocks_stores_fewer_bytes_until_the_backward_pass() -> None:
    everything = kept_bytes(model(None))
    full, half, selective = (
        kept_bytes(model(settings)) for settings in ({}, {"every": 2}, {"mode": "selective"})
    )
    assert 2 * full < half < 0.7 * everything
    assert 2 * full < selective < 0.7 * everything


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def backward_counts(settings: dict[str, Any] | None) -> Counter[str]:
    loss = model(settings)(INPUTS, INPUTS)
    with Operators() as operators:
        loss.backward()
    return operators.counts


def test_selective_mode_recomputes_activations_but_no_matrix_product() -> None:
    plain, full, selective = map(backward_counts, (None, {}, {"mode": "selective"}))
    for again, name in ((12, "aten::addmm"), (8, "aten::bmm")):
        assert selective[name] == plain[name]
        assert full[name] == plain[name] + again
    assert (plain["aten::gelu"], full["aten::gelu"], selective["aten::gelu"]) == (0, 4, 4)


def test_every_recomputes_only_the_first_of_each_group_of_blocks() -> None:
    net = model({"every": 3}, Counting)
    net(INPUTS, INPUTS).backward()
    assert [block.calls for block in net.blocks] == [2, 1, 1, 2]


def test_a_forward_without_gradients_runs_each_block_once() -> None:
    net = model({}, Counting)
    with torch.no_grad():
        net(INPUTS, INPUTS)
    net.eval()(INPUTS, INPUTS).backward()
    assert [block.calls for block in net.blocks] == [3, 3, 3, 3]


def test_the_model_its_modules_and_parameter_names_do_not_change(tiny_run: TinyRun) -> None:
    run = tiny_run(ActivationCheckpointing(), Gpt(), length=1)
    assert run.module is run.model
    assert list(weights(run)) == list(Transformer().state_dict())
    assert [type(block) for block in run.model.blocks] == [Block] * 4


def test_a_copy_of_the_model_is_independent_and_also_recomputes_activations() -> None:
    net = model({}, Counting)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    twin(INPUTS, INPUTS).backward()
    assert [block.calls for block in net.blocks] == [0] * 4
    assert [block.calls for block in twin.blocks] == [2] * 4
    assert net.blocks[0].up.weight.grad is None


@pytest.mark.parametrize("settings", [{}, {"mode": "selective"}])
def test_compiled_blocks_with_recomputation_compute_the_same_gradients(
    tiny_run: TinyRun, plain: tuple[Run, Gpt], settings: dict[str, Any]
) -> None:
    @plugin
    class Compiled:
        """Compiles half of the blocks."""

        @hookimpl
        def compile_model(self, model: nn.Module) -> nn.Module:
            torch.compiler.reset()
            for block in model.blocks[:2]:
                block.compile(backend="aot_eager", fullgraph=True)
            return model

    gpt = Gpt()
    run = tiny_run(ActivationCheckpointing(**settings), Compiled(), gpt, length=3, validate_every=1)
    for mine, theirs in zip(gpt.grads, plain[1].grads, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert run.history[-1]["val/loss"] == pytest.approx(plain[0].history[-1]["val/loss"])


@pytest.mark.parametrize("settings", [{}, {"mode": "selective"}])
def test_compiled_frozen_blocks_are_not_recomputed(
    settings: dict[str, Any],
) -> None:
    grads = []
    for compiled in (False, True):
        torch.compiler.reset()
        net = model(settings)
        for module in (net.embed, net.blocks[0]):
            for parameter in module.parameters():
                parameter.requires_grad = False
        for block in net.blocks:
            if compiled:
                block.compile(backend="aot_eager", fullgraph=True)
        x = net.embed(((INPUTS + 1) * 15).long())
        torch.manual_seed(0)
        for block in net.blocks:
            x = block(x)
        x.square().mean().backward()
        grads.append([p.grad for p in net.blocks.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads)


@torch.library.custom_op("fundamentallm_tests::scaled_dot_product_and_dropout", mutates_args=())
def attend(query: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Stand for the fused kernels of GPUs, which apply their own dropout."""
    mask = torch.rand_like(query).ge(dropout_p).to(query.dtype) if dropout_p else query * 0 + 1
    return query * mask, mask


attend.register_autograd(
    lambda ctx, grad, _: (grad * ctx.saved_tensors[0], None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


class Fused(nn.Module):
    """A block whose attention draws numbers, and a dropout that draws after it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout, self.weight = dropout, nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        x = attend(x * self.weight, self.dropout)[0]
        return (nn.functional.dropout(x, 0.5) * self.weight).exp()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_with_fused_dropout_is_recomputed_so_that_later_dropout_draws_the_same_numbers(
    dropout: float,
) -> None:
    grads, runs = [], []
    for settings in (None, {"mode": "selective"}):
        net = nn.Sequential(Fused(dropout))
        if settings:
            recompute({"0": net[0]}, ActivationCheckpointing(**settings), "it")
        torch.manual_seed(0)
        loss = net(INPUTS).sum()
        with Operators() as operators:
            loss.backward()
        grads.append(net[0].weight.grad)
        runs.append(operators.counts["fundamentallm_tests::scaled_dot_product_and_dropout"])
    assert grads[0].equal(grads[1])
    assert runs == [0, int(dropout > 0)]


def test_a_model_without_a_list_of_modules_needs_patterns(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError, match=r"activation_checkpointing\.blocks: the model has no"):
        tiny_run(ActivationCheckpointing(), length=1)


def test_running_statistics_would_be_updated_twice_and_are_refused() -> None:
    blocks = {"norms": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))}
    with pytest.raises(SettingsError, match=r"it: norms\.1 is a BatchNorm1d"):
        recompute(blocks, ActivationCheckpointing(), "it")
