"""The benchmark of a GPU compares equal work, decides by its goals, and runs dry on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # scripts, not a package
import bench
import parts
from device import Cpu, Cuda, idle_share, longest, work_in
from goals import Goal, median_ratio, quantile
from nanogpt import Layer
from race import READ, Rival, plan
from roofline import Ceilings, terms
from sizes import GPT2, TINY, settings, token_file

from fundamentallm import compose
from fundamentallm_gpt.model import GPT


def trace(folder: Path, *spans: tuple[str, str, int, int]) -> Path:
    """Write a trace of work: category, name, begin and duration in microseconds."""
    keys = ("cat", "name", "ts", "dur")
    events = [{"ph": "X", **dict(zip(keys, span, strict=True))} for span in spans]
    path = folder / "trace.json"
    path.write_text(json.dumps({"traceEvents": [*events, {"ph": "i", "cat": "kernel", "ts": 99}]}))
    return path


def test_idle_is_the_time_in_which_no_stream_works(tmp_path):
    path = trace(
        tmp_path,
        ("kernel", "mm", 0, 4),
        ("gpu_memcpy", "copy", 2, 4),
        ("kernel", "mm", 8, 2),
        ("cpu_op", "host", 6, 2),
    )
    work = work_in(path, ("kernel", "gpu_memcpy"))
    assert idle_share(work) == pytest.approx(0.2)
    assert longest(work) == {"mm": {"count": 2, "ms": 0.006}, "copy": {"count": 1, "ms": 0.004}}


def test_a_trace_without_work_meets_no_goal(tmp_path):
    assert not Goal("idle", idle_share(work_in(trace(tmp_path), ("kernel",))), at_most=1.0).met


def test_the_roofline_counts_all_parameters_but_those_of_norms():
    model = TINY.by_hand(Cpu())
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert TINY.model.parameters == matrices
    assert TINY.model.matrices == sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)


def test_products_and_attention_of_the_roofline_are_the_flops_of_the_model_without_the_mask():
    ceilings = Ceilings(flops=1.0, bandwidth=1e30)
    seconds = terms(TINY.model, micro=TINY.context, count=1, ceilings=ceilings)
    masked = 6 * TINY.layers * TINY.context * TINY.width
    flops = TINY.by_hand(Cpu()).flops_per_token(TINY.context) - masked
    assert sum(seconds.values()) == pytest.approx(TINY.context * flops)


def test_more_micro_batches_of_the_same_tokens_only_add_casts_and_additions_of_gradients():
    ceilings = Ceilings(flops=1.0, bandwidth=1.0)
    whole, parted = (terms(TINY.model, 64 // count, count, ceilings) for count in (1, 4))
    changed = {name for name in whole if whole[name] != parted[name]}
    assert changed == {"casts of weights and gradients"}
    assert parted[changed.pop()] == TINY.model.parameters * (4 * 12 + 3 * 4)


def test_the_measured_model_is_gpt_2_of_124_million_parameters():
    assert GPT2.model.parameters == 124_354_560
    assert GPT2.rows == 50304


@pytest.mark.parametrize("build", [TINY.by_hand, TINY.nanogpt])
def test_compiled_models_keep_what_the_roofline_counts_for_the_backward_pass(build):
    kept = []

    def pack(tensor):
        kept.append((tensor.numel(), tensor.dtype))
        return tensor

    tokens = torch.randint(TINY.vocab, (2, TINY.batch, TINY.context))
    # The backend divides the graph as the inductor does, and generates no code.
    compiled = torch.compile(build(Cpu()), backend="aot_eager_decomp_partition")
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        compiled(*tokens)
    torch.compiler.reset()
    count = TINY.batch * TINY.context
    # The scores of the vocabulary once, and not in fp32.
    assert [kind for size, kind in kept if size == count * TINY.rows] == [torch.bfloat16]
    # The inputs of all norms, in fp32.
    residuals = [kind for size, kind in kept if size == count * TINY.width]
    assert residuals.count(torch.float32) <= 2 * TINY.layers + 1


def test_the_loop_in_nanogpt_s_way_trains_the_same_function():
    nano = TINY.nanogpt(Cpu())
    gpt = TINY.by_hand(Cpu())
    exact_gelu(gpt)
    copy_weights(nano, gpt)
    tokens = torch.randint(TINY.vocab, (2, TINY.context + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    torch.testing.assert_close(nano(inputs, targets)[1], gpt(inputs, targets))


def exact_gelu(gpt: GPT) -> None:
    for block in gpt.blocks:
        block.mlp.approximate = "none"


@torch.no_grad()
def copy_weights(nano: nn.Module, gpt: GPT) -> None:
    nano.output.weight.copy_(gpt.embed.weight)
    nano.places.weight.copy_(gpt.positions.weight)
    nano.norm.weight.copy_(gpt.norm.weight)
    layer: Layer
    for layer, block in zip(nano.layers, gpt.blocks, strict=True):
        for norm, other in zip(layer.norms, (block.attention_norm, block.mlp_norm), strict=True):
            norm.weight.copy_(other.weight)
        layer.three.weight.copy_(block.attention.qkv.weight)
        layer.joined.weight.copy_(block.attention.out.weight)
        layer.up.weight.copy_(block.mlp.up.weight)
        layer.down.weight.copy_(block.mlp.down.weight)


@pytest.mark.parametrize(("rounds", "turn"), [(30, 10), (2, 2), (1, 7)])
def test_no_row_is_due_in_the_steps_whose_reads_are_counted(rounds, turn):
    done = 0
    for segment in plan(rounds, turn, long=500):
        if segment.kind == "reads":
            assert done % 50 == 0
            assert segment.steps == READ < 50
        done += segment.steps


def test_an_error_of_a_rival_ends_the_race():
    def fails(turns):
        next(turns)
        raise ArithmeticError("overflow")

    rival = Rival("fails", fails)
    with pytest.raises(ArithmeticError, match="overflow"):
        rival.train(3)


def test_a_rival_trains_as_many_steps_as_its_turn_has():
    done = []
    rival = Rival("counts", done.extend)
    steps = []
    rival.step_ended = lambda: steps.append(len(steps))
    rival.train(3)
    rival.train(2)
    assert len(steps) == 5


def test_the_median_ratio_lies_in_its_interval():
    ratio = median_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (ratio.low, ratio.value, ratio.high) == (1.0, 3.0, 5.0)


def test_a_quantile_is_a_measured_value():
    assert quantile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert quantile([5.0], 0.99) == 5.0


@pytest.mark.parametrize(("value", "verdict"), [(0.998, "PASS"), (0.997, "FAIL")])
def test_a_line_says_whether_the_goal_is_met(value, verdict):
    assert Goal("ratio", value, at_least=0.998).line(dry=False).startswith(f"{verdict}: ratio 0.99")
    assert Goal("ratio", value, at_least=0.998).line(dry=True).startswith("DRY")


def measured(monkeypatch, tmp_path, value: float) -> int:
    """Return the exit code of the benchmark if its only figure is ``value``, at most 1."""
    found = parts.Found(goals=[Goal("figure", value, at_most=1)], figures={"of": "a test"})
    monkeypatch.setitem(bench.PARTS, "loops", lambda _: found)
    monkeypatch.setattr(bench, "Cuda", lambda mode: Cpu())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = ["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--part", "loops"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    return bench.main()


def test_a_missed_goal_is_exit_code_1_and_the_results_are_written(monkeypatch, tmp_path):
    assert measured(monkeypatch, tmp_path, 0.5) == 0
    assert measured(monkeypatch, tmp_path, 1.5) == 1
    facts = json.loads((tmp_path / "bench.json").read_text())
    assert facts["loops"]["figures"] == {"of": "a test"}
    assert "loops: FAIL: figure 1.5000 (at most 1)" in (tmp_path / "bench.txt").read_text()


def test_without_a_gpu_the_benchmark_says_so_and_succeeds(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--out", str(tmp_path / "none")])
    assert bench.main() == 0
    assert "no NVIDIA GPU here" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_each_of_several_parts_gets_the_other_arguments_of_the_command():
    words = ["--dry", "--part=save", "--part", "loops", "--out", "folder"]
    command = bench.command_of("loops", words)
    assert command[2:] == ["--dry", "--out", "folder", "--part", "loops"]


@pytest.mark.parametrize("device", [Cpu(), *map(Cuda, bench.MODES)])
def test_the_settings_of_the_measured_model_are_valid(device, tmp_path):
    composed = compose(settings(GPT2, device, tmp_path / "tokens.bin", 480))
    assert len(composed.plugins) == 16
    assert composed.run.device == device.kind
    assert compose_graphs(device, tmp_path).plugins["compile"].backend == device.backend


def compose_graphs(device, folder):
    tables = settings(GPT2, device, folder / "tokens.bin", 480)
    tables["compile"] |= device.graphs
    return compose(tables)


def test_tokens_of_the_standard_library_are_below_the_vocabulary(tmp_path):
    path = token_file("stdlib", TINY, tmp_path)
    tokens = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.int16)
    assert 256 < int(tokens.max()) < TINY.vocab
    assert token_file("stdlib", TINY, tmp_path) == path


def test_a_part_runs_dry_on_a_cpu(monkeypatch, tmp_path, capsys):
    arguments = [
        "--dry",
        "--part",
        "save",
        "--out",
        str(tmp_path),
        "--work",
        str(tmp_path / "work"),
    ]
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    assert bench.main() == 0
    torch.compiler.reset()
    assert "save: DRY: an asynchronous save costs" in capsys.readouterr().out


@pytest.mark.slow
def test_all_parts_run_dry_on_a_cpu(tmp_path):
    command = [
        sys.executable,
        bench.__file__,
        "--dry",
        "--out",
        tmp_path,
        "--work",
        tmp_path / "work",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "bench.json").read_text())
    assert list(facts) == list(bench.PARTS)
    assert all(found["lines"] for found in facts.values())
