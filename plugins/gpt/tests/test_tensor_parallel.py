"""One model in two processes: loss, gradients, training and checkpoints of one process."""

from __future__ import annotations

import traceback
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import forked
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

from fundamentallm import SettingsError
from fundamentallm_gpt.model import GPT
from fundamentallm_gpt.shapes import PRESETS, Preset, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh

    from fundamentallm_gpt.tensor_parallel import TensorParallelPlan

# Large initial weights, so that attention is far from uniform.
TINY = {"num_layers": 2, "num_heads": 4, "d_model": 16, "d_ff": 24, "init_std": 0.3}
GPT2 = PRESETS["gpt2"] | TINY
LLAMA = PRESETS["llama-3-8b"] | TINY | {"num_kv_heads": 2}
CASES = {
    "gpt2": GPT2,
    "gpt2 without biases, with grouped queries": GPT2 | {"bias": False, "num_kv_heads": 2},
    "gpt2 untied, with normalized queries": GPT2 | {"tie_embeddings": False, "qk_norm": True},
    "llama": LLAMA,
    "llama tied, with biases and normalized queries": LLAMA
    | {"tie_embeddings": True, "bias": True, "qk_norm": True},
}
MOMENTS = ("exp_avg", "exp_avg_sq")
SECONDS = 60


def in_two_processes(work: Callable[..., Any], folder: Path, *arguments: Any) -> Any:
    """Call ``work(mesh, *arguments)`` in two processes, and return what the first one returns."""
    processes = [
        forked.context.Process(target=member, args=(rank, folder, work, arguments))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.join()
    failed = sorted(folder.glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.read_text() for path in failed] == []
    assert [process.exitcode for process in processes] == [0, 0]
    return torch.load(folder / "0.found")


def member(rank: int, folder: Path, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'meeting'}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=SECONDS / 2),
        )
        torch.save(work(init_device_mesh("cpu", (2,)), *arguments), folder / f"{rank}.found")
        distributed.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.failed").write_text(traceback.format_exc())
        raise


def make(chosen: dict[str, Any], **options: Any) -> GPT:
    """A model in float64 whose biases and norms are not trivial, as after some training."""
    torch.manual_seed(0)
    model = GPT(shape_of(None, chosen), **{"vocab_size": 12, "context_length": 9} | options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.double()


def batch(step: int = 0, vocab_size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs, targets = torch.randint(vocab_size, (2, 3, 9), generator=generator)
    targets[0, :5] = -100
    return inputs, targets


def split(model: GPT, mesh: DeviceMesh) -> TensorParallelPlan:
    """Split a whole model, which every process has, as its plan says."""
    plan = model.tensor_parallel_plan(mesh.size())
    with torch.no_grad():
        for name, order in plan.row_order.items():
            parameter = model.get_parameter(name)
            parameter.copy_(parameter[order])
    parallelize_module(model, mesh, plan.styles)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                same = distribute_tensor(parameter.data, mesh, [Replicate()])
                module.register_parameter(name, nn.Parameter(same))
    return plan


def spread(plan: TensorParallelPlan, name: str, whole: Tensor, like: DTensor) -> Tensor:
    """This process's part of a whole tensor: a parameter, or what an optimizer has of it."""
    if name in plan.row_order:
        whole = whole[plan.row_order[name]]
    same = [Replicate()] * like.device_mesh.ndim
    everywhere = DTensor.from_local(whole, like.device_mesh, same, run_check=False)
    return everywhere.redistribute(placements=like.placements)


def join(plan: TensorParallelPlan, name: str, tensor: Any) -> Tensor:
    """The whole tensor again; every process calls it."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole[plan.row_order[name].argsort()] if name in plan.row_order else whole


def assert_near(found: Tensor, expected: Tensor, name: str) -> None:
    # Key biases have no influence, so that their gradients are rounding errors alone.
    scale = max(expected.abs().max().item(), 0.1)
    assert (found - expected).abs().max().item() <= 1e-14 * scale, name


def compare_gradients(
    mesh: DeviceMesh, cases: dict[str, dict[str, Any]], chunks: int, vocab_size: int
) -> None:
    for case, chosen in cases.items():
        one, two = (make(chosen, vocab_size=vocab_size) for _ in range(2))
        plan = split(two, mesh)
        one.loss_chunks = two.loss_chunks = chunks
        expected = one(*batch(vocab_size=vocab_size))
        expected.backward()
        with loss_parallel():
            loss = two(*batch(vocab_size=vocab_size))
            loss.backward()
        assert type(loss) is Tensor
        assert_near(loss, expected, f"{case}: loss")
        for name, parameter in two.named_parameters():
            gradient = one.get_parameter(name).grad
            assert_near(join(plan, name, parameter.grad), gradient, f"{case}: {name}")


def test_two_processes_compute_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    in_two_processes(compare_gradients, tmp_path, CASES, 1, 12)


def test_a_loss_in_chunks_and_an_odd_vocabulary_change_no_gradient(tmp_path: Path) -> None:
    in_two_processes(compare_gradients, tmp_path, {"gpt2": GPT2, "llama": LLAMA}, 4, 11)


def count_elements(mesh: DeviceMesh) -> dict[str, float]:
    model = make(CASES["gpt2 untied, with normalized queries"])
    split(model, mesh)
    return {name: p.to_local().numel() / p.numel() for name, p in model.named_parameters()}


def test_each_process_has_half_of_each_matrix(tmp_path: Path) -> None:
    shares = in_two_processes(count_elements, tmp_path)
    assert set(shares.values()) == {0.5, 1.0}
    whole = {name for name, share in shares.items() if share == 1}
    assert {name for name in whole if "norm" not in name and not name.endswith(".bias")} == {
        "positions.weight"
    }


def finish_gradients(model: GPT) -> list[Tensor]:
    """Give each gradient the placement of its parameter; some are sums that are still to be made,
    and the embedding's is the whole one."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
    return [parameter.grad for parameter in model.parameters()]


def train(model: GPT, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        with loss_parallel():
            model(*batch(step)).backward()
        norm: Any = nn.utils.get_total_norm(finish_gradients(model))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: GPT) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)


def continue_in_two(mesh: DeviceMesh, chosen: dict[str, Any]) -> dict[str, Tensor]:
    """Train one process, go on from its weights and moments in two, and compare with one."""
    one, two = make(chosen), make(chosen)
    plan = split(two, mesh)
    expected, found = adamw(one), adamw(two)
    train(one, expected, range(2))
    live = dict(two.named_parameters())
    two.load_state_dict(
        {name: spread(plan, name, value, live[name]) for name, value in one.state_dict().items()}
    )
    packed = found.state_dict()
    for index, (name, parameter) in enumerate(live.items()):
        kept = {
            key: value.clone() for key, value in expected.state[one.get_parameter(name)].items()
        }
        moments = {key: spread(plan, name, kept.pop(key), parameter) for key in MOMENTS}
        packed["state"][index] = kept | moments
    found.load_state_dict(packed)
    train(one, expected, range(2, 4))
    train(two, found, range(2, 4))
    for name, parameter in live.items():
        mine = one.get_parameter(name)
        for key in MOMENTS:
            joined = join(plan, name, found.state[parameter][key])
            assert_near(joined, expected.state[mine][key], f"{name} {key}")
    return {name: join(plan, name, tensor) for name, tensor in two.state_dict().items()}


@pytest.mark.parametrize("chosen", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_run_of_one_process_continues_in_two_to_the_weights_and_moments_of_one(
    chosen: dict[str, Any], tmp_path: Path
) -> None:
    joined = in_two_processes(continue_in_two, tmp_path, chosen)
    model = make(chosen)
    train(model, adamw(model), range(4))
    for name, tensor in model.state_dict().items():
        assert_near(joined[name], tensor, name)
    model.load_state_dict(joined)


def load_and_join(mesh: DeviceMesh, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    model = make(GPT2 | {"num_kv_heads": 2})
    plan = split(model, mesh)
    live = model.state_dict()
    model.load_state_dict(
        {name: spread(plan, name, tensor, live[name]) for name, tensor in kept.items()}
    )
    inputs, targets = batch()
    with torch.no_grad(), loss_parallel():
        joined = {"loss": model(inputs, targets)}
    return joined | {name: join(plan, name, tensor) for name, tensor in model.state_dict().items()}


def test_a_state_dict_of_one_process_is_split_and_joined_without_a_change(tmp_path: Path) -> None:
    model = make(GPT2 | {"num_kv_heads": 2})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    kept = model.state_dict()
    joined = in_two_processes(load_and_join, tmp_path, kept)
    assert_near(joined.pop("loss"), model(*batch()).detach(), "loss")
    assert list(joined) == list(kept)
    for name, tensor in kept.items():
        assert torch.equal(joined[name], tensor), name


def compute_logits(mesh: DeviceMesh, chosen: dict[str, Any]) -> None:
    one, two = (make(chosen, vocab_size=11, pad_vocab_to=4) for _ in range(2))
    split(two, mesh)
    inputs, _ = batch(vocab_size=11)
    with torch.no_grad():
        expected = one.logits(inputs)
        cache = two.make_cache(3, 9)
        parts = [two.logits(part, cache) for part in torch.split(inputs, [3, 1, 5], dim=1)]
        assert_near(two.logits(inputs), expected, "without a cache")
        assert_near(torch.cat(parts, dim=1), expected, "with a cache")
    assert two.num_parameters() == one.num_parameters()
    assert two.flops_per_token() == one.flops_per_token()


@pytest.mark.parametrize("chosen", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_logits_in_two_processes_are_those_of_one_with_and_without_a_cache(
    chosen: dict[str, Any], tmp_path: Path
) -> None:
    in_two_processes(compute_logits, tmp_path, chosen)


def drop(mesh: DeviceMesh) -> None:
    model = make(LLAMA, dropout=0.3)
    split(model, mesh)
    torch.manual_seed(3)
    with loss_parallel():
        loss = model(*batch())
        loss.backward()
    assert not torch.equal(loss, make(LLAMA)(*batch()))
    finish_gradients(model)
    same = {"loss": loss.detach(), "generator": torch.get_rng_state()}
    same |= {name: p.grad.to_local() for name, p in model.named_parameters() if "norm" in name}
    for name, tensor in same.items():
        first = tensor.clone()
        distributed.broadcast(first, 0)
        assert torch.equal(tensor, first), name


def test_with_dropout_and_one_seed_the_processes_stay_equal(tmp_path: Path) -> None:
    in_two_processes(drop, tmp_path)


def compile_blocks(mesh: DeviceMesh, chosen: dict[str, Any]) -> None:
    one, two = make(chosen), make(chosen)
    for block in two.blocks:
        block.compile(backend="aot_eager")
    plan = split(two, mesh)
    expected = one(*batch())
    expected.backward()
    with loss_parallel():
        loss = two(*batch())
        loss.backward()
    assert_near(loss, expected, "loss")
    for name, parameter in two.named_parameters():
        assert_near(join(plan, name, parameter.grad), one.get_parameter(name).grad, name)


def test_compiled_blocks_compute_the_same(tmp_path: Path) -> None:
    # The embedding is summed over the processes, and no operation follows it before the blocks.
    chosen = LLAMA | {"tie_embeddings": True, "num_layers": 1}
    in_two_processes(compile_blocks, tmp_path, chosen)


def test_each_process_gets_the_queries_keys_and_values_of_its_heads() -> None:
    model = make(TINY | {"num_heads": 6, "num_kv_heads": 3, "d_model": 12, "d_ff": 6, "bias": True})
    plan = model.tensor_parallel_plan(3)
    assert set(plan.row_order) == {
        f"blocks.{layer}.attention.qkv.{kind}" for layer in (0, 1) for kind in ("weight", "bias")
    }
    for order in plan.row_order.values():
        # Heads of width 2: queries 0-11, keys 12-17, values 18-23.
        assert [part.tolist() for part in order.chunk(3)] == [
            [0, 1, 2, 3, 12, 13, 18, 19],
            [4, 5, 6, 7, 14, 15, 20, 21],
            [8, 9, 10, 11, 16, 17, 22, 23],
        ]


def test_a_number_of_processes_that_does_not_fit_is_refused_with_those_that_do() -> None:
    model = make(TINY | {"num_kv_heads": 2, "d_ff": 24})
    with pytest.raises(SettingsError) as caught:
        model.tensor_parallel_plan(4)
    assert str(caught.value) == (
        "gpt: the model cannot be split over 4 processes: num_kv_heads, 2, and d_ff, 24, must be "
        "multiples of that number; possible numbers are 1, 2"
    )


@pytest.mark.parametrize(
    ("preset", "most"),
    [("gpt2", 12), ("gpt2-xl", 25), ("smollm-135m", 3), ("smollm-1.7b", 32), ("llama-3-8b", 8)],
)
def test_a_preset_can_be_split_over_as_many_processes_as_it_has_heads_of_keys(
    preset: Preset, most: int
) -> None:
    with torch.device("meta"):
        model = GPT(shape_of(preset, {}), vocab_size=256, context_length=8)
    plan = model.tensor_parallel_plan(most)
    weight = model.get_parameter("blocks.0.attention.qkv.weight")
    assert plan.row_order["blocks.0.attention.qkv.weight"].sort().values.tolist() == list(
        range(len(weight))
    )
