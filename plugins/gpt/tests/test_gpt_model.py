"""The model against an implementation written from the papers, and against published numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fundamentallm_gpt.model import GPT
from fundamentallm_gpt.rope import rotate, rotation
from fundamentallm_gpt.shapes import PRESETS, Preset, Shape, shape_of

# Large initial weights, so that attention is far from uniform.
SIZES = {"num_layers": 2, "num_heads": 4, "d_model": 16, "d_ff": 24}
TINY: dict[str, Any] = SIZES | {"init_std": 0.3}

shapes = st.fixed_dictionaries(
    {
        "num_kv_heads": st.sampled_from([1, 2, 4]),
        "bias": st.booleans(),
        "tie_embeddings": st.booleans(),
        "positions": st.sampled_from(["learned", "rope"]),
        "rope_theta": st.sampled_from([100.0, 10_000.0]),
        "norm": st.sampled_from(["layernorm", "rmsnorm"]),
        "activation": st.sampled_from(["gelu", "gelu_tanh", "swiglu"]),
        "qk_norm": st.booleans(),
    }
).map(lambda chosen: shape_of(None, TINY | chosen))


def make(shape: Shape, seed: int = 0, **options: Any) -> GPT:
    """A model in float64 whose biases and norms are not trivial, as after some training."""
    torch.manual_seed(seed)
    model = GPT(shape, **{"vocab_size": 11, "context_length": 9} | options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.double()


def tokens(batch_size: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(11, (batch_size, length), generator=generator)


def by_hand(model: GPT, ids: list[int]) -> Tensor:
    """The logits of one sequence, token by token and head by head, from the weights alone."""
    shape, weights = model.shape, model.state_dict()
    stream = [weights["embed.weight"][token] for token in ids]
    if shape.positions == "learned":
        stream = [x + weights["positions.weight"][t] for t, x in enumerate(stream)]
    for layer in range(shape.num_layers):
        own = {
            name.removeprefix(f"blocks.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        normed = [norm_by_hand(x, own, "attention_norm", shape) for x in stream]
        seen = attention_by_hand(normed, own, shape)
        stream = [x + y for x, y in zip(stream, seen, strict=True)]
        normed = [norm_by_hand(x, own, "mlp_norm", shape) for x in stream]
        stream = [x + mlp_by_hand(y, own, shape) for x, y in zip(stream, normed, strict=True)]
    output = weights["embed.weight" if shape.tie_embeddings else "head.weight"]
    return torch.stack([output @ norm_by_hand(x, weights, "norm", shape) for x in stream])


def linear_by_hand(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", torch.zeros(()))


def norm_by_hand(x: Tensor, weights: dict[str, Tensor], name: str, shape: Shape) -> Tensor:
    if shape.norm == "layernorm":
        x = x - x.mean()
    scaled = x / torch.sqrt((x * x).mean() + shape.norm_eps)
    return scaled * weights[f"{name}.weight"] + weights.get(f"{name}.bias", torch.zeros(()))


def mlp_by_hand(x: Tensor, weights: dict[str, Tensor], shape: Shape) -> Tensor:
    up = linear_by_hand(x, weights, "mlp.up")
    if shape.activation == "swiglu":
        gate = linear_by_hand(x, weights, "mlp.gate")
        inner = gate / (1 + torch.exp(-gate)) * up
    elif shape.activation == "gelu":
        inner = up * (1 + torch.erf(up / math.sqrt(2))) / 2
    else:
        inner = up / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return linear_by_hand(inner, weights, "mlp.down")


def turned_by_hand(x: Tensor, position: int, shape: Shape) -> Tensor:
    """Rotary embedding as the paper writes it: multiplication by a complex number per pair."""
    half = len(x) // 2
    pairs = torch.complex(x[:half], x[half:])
    angles = [position * shape.rope_theta ** (-2 * i / len(x)) for i in range(half)]
    turned = pairs * torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles])
    return torch.cat((turned.real, turned.imag))


def attention_by_hand(xs: list[Tensor], weights: dict[str, Tensor], shape: Shape) -> list[Tensor]:
    width, groups = shape.head_width, shape.num_heads // shape.num_kv_heads
    queries, keys, values = [], [], []
    for position, x in enumerate(xs):
        projected = torch.split(linear_by_hand(x, weights, "attention.qkv"), width)
        q = list(projected[: shape.num_heads])
        k = list(projected[shape.num_heads : shape.num_heads + shape.num_kv_heads])
        if shape.qk_norm:
            q = [norm_by_hand(part, weights, "attention.query_norm", shape) for part in q]
            k = [norm_by_hand(part, weights, "attention.key_norm", shape) for part in k]
        if shape.positions == "rope":
            q = [turned_by_hand(part, position, shape) for part in q]
            k = [turned_by_hand(part, position, shape) for part in k]
        queries.append(q)
        keys.append(k)
        values.append(projected[shape.num_heads + shape.num_kv_heads :])
    results = []
    for t in range(len(xs)):
        heads = []
        for head in range(shape.num_heads):
            shared = head // groups
            scores = [queries[t][head] @ keys[s][shared] / math.sqrt(width) for s in range(t + 1)]
            weight = torch.softmax(torch.stack(scores), dim=0)
            heads.append(sum((weight[s] * values[s][shared] for s in range(t + 1)), torch.zeros(1)))
        results.append(linear_by_hand(torch.cat(heads), weights, "attention.out"))
    return results


@given(shape=shapes, length=st.integers(1, 9), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_logits_equal_the_papers_formulas(shape: Shape, length: int, seed: int) -> None:
    model = make(shape, seed)
    ids = tokens(2, length, seed)
    with torch.no_grad():
        expected = torch.stack([by_hand(model, row) for row in ids.tolist()])
        # Angles are kept in float32, which is all that rope loses.
        torch.testing.assert_close(model.logits(ids), expected, atol=1e-6, rtol=1e-6)


@given(
    shape=shapes,
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=9).filter(lambda p: sum(p) <= 9),
)
@settings(max_examples=60, deadline=None)
def test_a_cache_changes_no_logits_for_any_split_of_the_tokens(
    shape: Shape, parts: list[int]
) -> None:
    model = make(shape).float()
    ids = tokens(3, sum(parts))
    with torch.no_grad():
        cache = model.make_cache(3, 9)
        found = [model.logits(part, cache) for part in torch.split(ids, parts, dim=1)]
        torch.testing.assert_close(torch.cat(found, 1), model.logits(ids), atol=1e-5, rtol=1e-5)


@given(shape=shapes, seed=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_greedy_decoding_with_a_cache_finds_the_same_tokens(shape: Shape, seed: int) -> None:
    model = make(shape, seed)
    plain = tokens(2, 1, seed)
    new, cache, found = plain, model.make_cache(2, 9), [plain]
    with torch.no_grad():
        for _ in range(8):
            plain = torch.cat((plain, model.logits(plain)[:, -1:].argmax(-1)), dim=1)
            new = model.logits(new, cache)[:, -1:].argmax(-1)
            found.append(new)
    assert torch.equal(torch.cat(found, dim=1), plain)


def test_the_loss_is_the_mean_over_the_targets_that_are_not_ignored() -> None:
    model = make(shape_of(None, TINY))
    inputs, targets = tokens(2, 6), tokens(2, 6, seed=2)
    targets[0, 3:] = -100
    logs = model.logits(inputs).log_softmax(-1)
    losses = [
        -logs[b, t, targets[b, t]] for b in range(2) for t in range(6) if targets[b, t] != -100
    ]
    assert model(inputs, targets).shape == ()
    torch.testing.assert_close(model(inputs, targets), torch.stack(losses).mean())


def test_a_low_precision_model_computes_its_loss_in_float32() -> None:
    model = make(shape_of(None, TINY)).bfloat16()
    assert model(tokens(2, 6), tokens(2, 6)).dtype == torch.float32


def test_a_token_does_not_depend_on_later_tokens() -> None:
    for positions in ("learned", "rope"):
        model = make(shape_of(None, TINY | {"positions": positions}))
        ids = tokens(1, 9)
        changed = ids.clone()
        changed[0, 5:] = (changed[0, 5:] + 1) % 11
        before, after = model.logits(ids), model.logits(changed)
        assert torch.equal(before[:, :5], after[:, :5])
        assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_rope_scores_depend_only_on_the_distance_of_positions() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8)
    cos, sin = rotation(64, 8, 100.0)

    def score(query_position: int, key_position: int) -> Tensor:
        at_query = cos[query_position, None], sin[query_position, None]
        at_key = cos[key_position, None], sin[key_position, None]
        return (rotate(query, at_query) * rotate(key, at_key)).sum()

    torch.testing.assert_close(score(7, 3), score(63, 59))
    assert not torch.allclose(score(7, 3), score(7, 4))


@pytest.mark.parametrize("rows", [11, 12, 16, 64])
def test_padded_rows_of_the_vocabulary_are_never_predicted(rows: int) -> None:
    model = make(shape_of(None, TINY), pad_vocab_to=rows)
    assert model.state_dict()["embed.weight"].shape[0] == rows
    assert model.logits(tokens(2, 3)).shape == (2, 3, 11)


# Published counts: OpenAI's and Meta's weights, and the model cards of SmolLM and TinyLlama.
PUBLISHED: list[tuple[Preset, int, int, int]] = [
    ("gpt2", 50257, 1024, 124_439_808),
    ("gpt2-medium", 50257, 1024, 354_823_168),
    ("gpt2-large", 50257, 1024, 774_030_080),
    ("gpt2-xl", 50257, 1024, 1_557_611_200),
    ("smollm-135m", 49152, 2048, 134_515_008),
    ("smollm-360m", 49152, 2048, 361_821_120),
    ("smollm-1.7b", 49152, 2048, 1_711_376_384),
    ("tinyllama-1.1b", 32000, 2048, 1_100_048_384),
    ("llama-2-7b", 32000, 4096, 6_738_415_616),
    ("llama-3-8b", 128256, 8192, 8_030_261_248),
]


@pytest.mark.parametrize(("preset", "vocab_size", "length", "published"), PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(
    preset: Preset, vocab_size: int, length: int, published: int
) -> None:
    with torch.device("meta"):
        model = GPT(shape_of(preset, {}), vocab_size=vocab_size, context_length=length)
    assert model.num_parameters() == published


def test_every_preset_is_compared_with_a_publication_or_is_the_default() -> None:
    assert set(PRESETS) == {preset for preset, *_ in PUBLISHED} | {"char"}
    assert shape_of("char", {}) == shape_of(None, {})


@given(shape=shapes, length=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_flops_per_token_equal_torchs_count(shape: Shape, length: int) -> None:
    model = make(shape)
    inputs = tokens(2, length)
    # The plain kernel: a flash kernel computes the scores a second time, which is not counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(inputs, inputs).backward()
    assert counter.get_total_flops() == 2 * length * model.flops_per_token(length)


def test_initial_weights_have_the_standard_deviations_of_gpt2() -> None:
    torch.manual_seed(0)
    shape = shape_of(None, {"num_layers": 8, "d_model": 256, "bias": True})
    model = GPT(shape, vocab_size=512, context_length=128)
    residual = 0.02 / math.sqrt(2 * 8)
    seen = set()
    for name, parameter in model.named_parameters():
        kind = ".".join(name.split(".")[2:]) or name
        seen.add(kind)
        if parameter.ndim == 1:
            expected = 0.0 if name.endswith("bias") else 1.0
            assert torch.equal(parameter, torch.full_like(parameter, expected)), name
            continue
        std = residual if kind in ("attention.out.weight", "mlp.down.weight") else 0.02
        # Ten standard errors of the estimate.
        error = 10 / math.sqrt(2 * parameter.numel())
        assert abs(parameter.std().item() / std - 1) < error, name
        assert abs(parameter.mean().item() / std) < error * math.sqrt(2), name
    assert {"attention.out.weight", "mlp.down.weight", "attention.qkv.weight"} <= seen


def test_the_initial_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = GPT(shape_of("char", {}), vocab_size=65, context_length=64)
    ids = torch.randint(65, (8, 64))
    assert model(ids, torch.randint(65, (8, 64))).item() == pytest.approx(math.log(65), abs=0.1)


def test_dropout_works_in_training_and_not_in_evaluation() -> None:
    model = make(shape_of(None, TINY), dropout=0.5)
    ids = tokens(2, 9)
    assert not torch.equal(model(ids, ids), model(ids, ids))
    model.eval()
    assert torch.equal(model(ids, ids), model(ids, ids))
    torch.testing.assert_close(model.logits(ids), make(shape_of(None, TINY)).logits(ids))


def test_without_dropout_training_draws_no_random_numbers() -> None:
    model = make(shape_of(None, TINY))
    before = torch.get_rng_state()
    model(tokens(2, 9), tokens(2, 9)).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_names_of_the_weights_are_stable() -> None:
    shape = shape_of(None, TINY | {"num_layers": 1, "bias": True, "qk_norm": True})
    assert list(make(shape).state_dict()) == [
        "embed.weight",
        "positions.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention_norm.bias",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.qkv.bias",
        "blocks.0.attention.out.weight",
        "blocks.0.attention.out.bias",
        "blocks.0.attention.query_norm.weight",
        "blocks.0.attention.query_norm.bias",
        "blocks.0.attention.key_norm.weight",
        "blocks.0.attention.key_norm.bias",
        "blocks.0.mlp_norm.weight",
        "blocks.0.mlp_norm.bias",
        "blocks.0.mlp.up.weight",
        "blocks.0.mlp.up.bias",
        "blocks.0.mlp.down.weight",
        "blocks.0.mlp.down.bias",
        "norm.weight",
        "norm.bias",
    ]
    llama = TINY | {"num_layers": 1, "tie_embeddings": False} | PRESETS["llama-2-7b"] | TINY
    names = set(make(shape_of(None, llama | {"num_layers": 1})).state_dict())
    assert {"head.weight", "blocks.0.mlp.gate.weight"} <= names
    assert "positions.weight" not in names


def test_every_parameter_gets_a_gradient() -> None:
    presets: list[Preset] = ["gpt2", "llama-3-8b"]
    for preset in presets:
        chosen = TINY | {"num_kv_heads": 2, "qk_norm": True}
        model = make(shape_of(preset, chosen))
        model(tokens(2, 9), tokens(2, 9, seed=2)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_sequences_longer_than_the_context_or_cache_are_refused() -> None:
    model = make(shape_of(None, TINY))
    with pytest.raises(ValueError, match="10 tokens exceed the context_length, 9"):
        model.logits(tokens(1, 10))
    cache = model.make_cache(2, 4)
    model.logits(tokens(2, 3), cache)
    with pytest.raises(ValueError, match="2 sequences of 4 tokens cannot contain 2 sequences of 5"):
        model.logits(tokens(2, 2), cache)
    assert cache.length == 3
    assert model.make_cache(1, 100).capacity == 9


def test_forward_has_no_data_dependent_python() -> None:
    """A graph with one piece: nothing that would make the host read a device value."""
    presets: list[Preset] = ["gpt2", "llama-3-8b"]
    for preset in presets:
        model = make(shape_of(preset, TINY | {"num_kv_heads": 2}))
        ids = tokens(2, 9)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(ids, ids), model(ids, ids))


@pytest.mark.parametrize("chunks", [2, 5, 100])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_loss_in_chunks_has_the_value_and_the_gradients_of_the_whole(
    chunks: int, tie_embeddings: bool
) -> None:
    found = []
    for count in (1, chunks):
        model = make(shape_of(None, TINY | {"tie_embeddings": tie_embeddings}))
        model.loss_chunks = count
        ids = tokens(3, 10)
        targets = ids[:, 1:].clone()
        targets[0, :5] = targets[2] = -100  # so that a chunk has no target at all
        loss = model(ids[:, :-1], targets)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for whole, parted in zip(*found, strict=True):
        torch.testing.assert_close(parted, whole, rtol=1e-12, atol=1e-12)


def test_a_loss_in_chunks_without_any_target_is_nan_as_the_mean_of_nothing() -> None:
    model = make(shape_of(None, TINY))
    ids = tokens(1, 9)
    for model.loss_chunks in (1, 4):
        assert model(ids, torch.full_like(ids, -100)).isnan()


@pytest.mark.parametrize(("chunks", "kept"), [(1, True), (4, False)])
def test_a_loss_in_chunks_keeps_no_scores_of_the_vocabulary_for_the_backward_pass(
    chunks: int, kept: bool
) -> None:
    model = make(shape_of(None, TINY), vocab_size=37)
    model.loss_chunks = chunks
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens(2, 8), tokens(2, 8))
    assert any(len(shape) == 2 and shape[1] == 37 for shape in shapes) is kept


def test_a_loss_in_chunks_is_captured_by_the_compiler_as_a_whole() -> None:
    model = make(shape_of(None, TINY))
    model.loss_chunks = 3
    ids, targets = tokens(2, 9), tokens(2, 9, seed=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(ids, targets)
    loss.backward()
    torch.testing.assert_close(loss, model(ids, targets))
    torch.compiler.reset()
