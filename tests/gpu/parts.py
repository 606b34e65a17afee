"""The parts of the benchmark: each measures, and returns figures and whether they meet their goals."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import by_hand
import nanogpt
import race
import torch
from goals import Goal, median_ratio, quantile
from roofline import measure_ceilings, terms
from safetensors.torch import save_file
from sizes import settings, token_file

from fundamentallm import Run, hookimpl, plugin, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from device import Device
    from sizes import Size


@dataclass
class Bench:
    """What a part needs: the device, the sizes, and a folder for data and runs."""

    device: Device
    size: Size
    work: Path
    runs: Path


@dataclass
class Found:
    """What a part found."""

    goals: list[Goal] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def loops(bench: Bench) -> Found:
    """The run against the handwritten loop, and that one against itself, on real text."""
    found = Found()
    contest = race_by_hand(bench, "stdlib", bench.size.rounds, bench.size.long)
    compare(found, contest)
    against_roofline(found, bench, contest)
    # The steps begin and end on the device, so these are times of the device, not of the host.
    for name, steps in contest.step_seconds.items():
        ratio = quantile(steps, 0.99) / median(steps)
        found.figures[f"{name}: step p99/median"] = ratio
        found.figures[f"{name}: step ms, median"] = 1e3 * median(steps)
        if name == race.RUN:
            text = f"step time of the run, p99/median over {len(steps)} steps"
            found.goals.append(Goal(text, ratio, at_most=1.05))
    return found


def synthetic(bench: Bench) -> Found:
    """The same on random tokens, with half of the rounds."""
    found = Found()
    compare(found, race_by_hand(bench, "random", max(bench.size.rounds // 2, 1), 0))
    return found


def race_by_hand(bench: Bench, data: str, rounds: int, long: int) -> race.Race:
    """Let the run and two equal handwritten loops take turns."""
    device, size = bench.device, bench.size
    tokens = token_file(data, size, bench.work)
    segments = race.plan(rounds, size.turn, long)
    out = bench.runs
    rivals = [
        race.Rival(name, by_hand_loop(bench, tokens, out / name)) for name in ("by hand", "again")
    ]
    contest = race.Race(device, rivals, segments, out)
    tables = settings(size, device, tokens, contest.steps)
    train(tables, plugins=[race.Turns(race=contest)], run_dir=out / "run")
    return contest


def by_hand_loop(bench: Bench, tokens: Path, out: Path) -> Callable[[Iterator[int]], None]:
    """Return the handwritten loop with its data, to be started with the numbers of its steps."""
    out.mkdir()
    size, device = bench.size, bench.device
    model = size.by_hand(device)
    source = by_hand.batches(tokens, size.batch, size.context, device)
    return lambda turns: by_hand.train(model, source, turns, device, out)


def compare(found: Found, contest: race.Race) -> None:
    """Add the ratios of the run to the handwritten loop, and of that loop to itself."""
    mine, hand, again = (contest.seconds[name] for name in (race.RUN, "by hand", "again"))
    ratio, same = median_ratio(hand, mine), median_ratio(again, hand)
    text = (
        f"tokens/s of the run over the handwritten loop ({ratio.interval}; that loop over itself "
        f"{same.value:.4f}, {same.interval})"
    )
    found.goals.append(Goal(text, ratio.value, at_least=0.998))
    idle = contest.idle
    text = f"idle share of the device: run {idle[race.RUN]:.4f}, handwritten {idle['by hand']:.4f}"
    more = idle[race.RUN] - idle["by hand"]
    found.goals.append(Goal(f"{text}; difference", more, at_most=0.002))
    reads = {name: len(operations) for name, operations in contest.reads.items()}
    text = f"reads of device values in {race.READ} steps: handwritten {reads['by hand']}, run"
    found.goals.append(Goal(text, reads[race.RUN], at_most=0))
    found.figures |= {"ratio": asdict(ratio), "A/A": asdict(same), "idle": idle}
    found.figures |= {"reads": contest.reads, "turns": dict(contest.seconds)}
    found.figures |= {"work of the device": contest.work}


def against_roofline(found: Found, bench: Bench, contest: race.Race) -> None:
    """Add the share that the run reaches of the roofline, with ceilings measured now."""
    size = bench.size
    ceilings = measure_ceilings(bench.device, size.product, size.copied)
    tokens = size.batch * size.context
    parts = terms(size.model, tokens, 1, ceilings)
    floor = sum(parts.values())
    took = {name: median(turns) / size.turn for name, turns in contest.seconds.items()}
    found.figures |= {
        "ceilings": asdict(ceilings),
        "roofline, ms": {name: 1e3 * seconds for name, seconds in parts.items()},
        "tokens/s at the roofline": tokens / floor,
        "tokens/s": {name: tokens / seconds for name, seconds in took.items()},
        "share of the roofline": {name: floor / seconds for name, seconds in took.items()},
    }
    text = (
        f"bf16 product {ceilings.flops / 1e12:.0f} TFLOP/s, copy {ceilings.bandwidth / 1e12:.2f} "
        f"TB/s, roofline {tokens / floor:,.0f} tokens/s; run {tokens / took[race.RUN]:,.0f}, share"
    )
    found.goals.append(Goal(text, floor / took[race.RUN], at_least=0.80))


def nano(bench: Bench) -> Found:
    """The run against a loop in nanoGPT's way, both with steps of 480 windows."""
    size, device, found = bench.size, bench.device, Found()
    tokens = token_file("stdlib", size, bench.work)
    model = size.nanogpt(device)
    source = nanogpt.batches(tokens, size.nano_batch, size.context, device)
    window = size.window // size.nano_batch
    rival = race.Rival("nanogpt", lambda turns: nanogpt.train(model, source, window, device, turns))
    segments = [race.Segment("warm", 1)] * 2
    segments += [race.Segment("time", 1)] * max(size.rounds // 2, 1)
    contest = race.Race(device, [rival], segments, bench.runs)
    tables = settings(size, device, tokens, contest.steps)
    # The largest micro-batches that make up exactly as many windows.
    batch = max(n for n in range(1, size.batch + 1) if size.window % n == 0)
    tables["text"]["batch_size"] = batch
    tables["accumulate"]["microbatches"] = size.window // batch
    train(tables, plugins=[race.Turns(race=contest)], run_dir=bench.runs / "run")
    ratio = median_ratio(contest.seconds["nanogpt"], contest.seconds[race.RUN])
    rates = {
        name: size.window * size.context / median(turns) for name, turns in contest.seconds.items()
    }
    text = (
        f"tokens/s: run {rates[race.RUN]:,.0f}, in nanoGPT's way {rates['nanogpt']:,.0f}; ratio "
        f"({ratio.interval})"
    )
    found.goals.append(Goal(text, ratio.value, at_least=1.25))
    found.figures |= {"tokens/s": rates, "ratio": asdict(ratio)}
    return found


@plugin
class Clock:
    """Marks the end of each step; in the steps that ``plain_at`` names, saves and waits for that."""

    device: Any = None
    plain_at: Any = None

    def __attrs_post_init__(self) -> None:
        self.marks: list[Any] = []
        self.plain: list[float] = []

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.marks.append(self.device.mark())

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if self.plain_at is not None and self.plain_at(run.progress.step):
            self.plain.append(saved_plainly(run, self.device))

    def seconds(self, start: int, end: int) -> float:
        """Return the time between the ends of two steps."""
        return self.device.seconds(self.marks[start - 1], self.marks[end - 1])


def saved_plainly(run: Run, device: Device) -> float:
    """Save weights and optimizer as one does by hand, durably; return what it took."""
    device.synchronize()
    before = time.perf_counter()
    tensors = dict(run.model.state_dict())
    for number, state in enumerate(run.optimizer.state.values()):
        tensors |= {f"{key}/{number}": value for key, value in state.items()}
    path = run.folder / "plain.safetensors"
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    taken = time.perf_counter() - before
    path.unlink()
    return taken


def save(bench: Bench) -> Found:
    """What an asynchronous save costs the training, against a plain one that is waited for."""
    size, device, found = bench.size, bench.device, Found()
    period, half = 2 * size.half, size.half
    clock = Clock(device=device, plain_at=lambda step: step % period == half)
    length = (size.saves + 2) * period
    tables = settings(size, device, token_file("random", size, bench.work), length)
    tables["checkpoint"] |= {"every": period, "keep_last": 2}
    train(tables, plugins=[clock], run_dir=bench.runs / "run")
    device.synchronize()
    # The first save allocates its memory, and the last step ends the run.
    at = range(2 * period, length, period)
    usual = median(
        clock.seconds(step, step + 1) for k in at for step in range(k + half + 1, k + period)
    )
    stalls = [clock.seconds(k, k + half) - half * usual for k in at]
    plain = clock.plain[2:]
    ratios = median_ratio(stalls, plain)
    text = (
        f"an asynchronous save costs {median(stalls):.4f} s of training, a plain one "
        f"{median(plain):.3f} s; ratio ({ratios.interval})"
    )
    found.goals.append(Goal(text, ratios.value, at_most=0.10))
    found.figures |= {"stalls": stalls, "plain": plain, "step": usual}
    return found


def graphs(bench: Bench) -> Found:
    """Micro-batches of one window: without the compiler, with it, and with CUDA graphs."""
    size, device, found = bench.size, bench.device, Found()
    tokens = token_file("stdlib", size, bench.work)
    rates, losses = {}, {}
    for name in ("eager", "compiled", "graphs"):
        clock = Clock(device=device)
        tables = settings(size, device, tokens, size.small)
        tables["text"]["batch_size"] = 1
        if name == "eager":
            tables["plugins"].remove("compile")
            del tables["compile"]
        elif name == "graphs":
            tables["compile"] |= device.graphs
        run = train(tables, plugins=[clock], run_dir=bench.runs / name)
        device.synchronize()
        start = size.small // 2  # graphs are recorded in the first steps
        rates[name] = (size.small - start) * size.context / clock.seconds(start, size.small)
        losses[name] = run.history[-1]["train/loss"]
        torch.compiler.reset()
        device.free()
    text = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    gain = rates["graphs"] / rates["eager"]
    found.goals.append(Goal(f"tokens/s at batch size 1: {text}; ratio", gain, at_least=2.0))
    apart = abs(losses["graphs"] / losses["eager"] - 1)
    text = (
        f"loss with graphs {losses['graphs']:.4f}, without {losses['eager']:.4f}; relative change"
    )
    found.goals.append(Goal(text, apart, at_most=0.02))
    found.figures |= {"tokens/s": rates, "losses": losses}
    return found


def memory(bench: Bench) -> Found:
    """The peak memory of the run and of the handwritten loop, each alone."""
    size, device, found = bench.size, bench.device, Found()
    tokens = token_file("random", size, bench.work)
    steps = 2 * size.turn

    def hand() -> None:
        by_hand_loop(bench, tokens, bench.runs / "by hand")(iter(range(1, steps + 1)))

    def run() -> None:
        train(settings(size, device, tokens, steps), run_dir=bench.runs / "run")

    peaks = {}
    for name, work in (("by hand", hand), (race.RUN, run)):
        device.free()
        before = device.allocated()
        device.reset_peak()
        work()
        device.synchronize()
        peaks[name] = device.peak() - before
        torch.compiler.reset()
    text = ", ".join(f"{name} {peak / 2**30:.2f} GiB" for name, peak in peaks.items())
    ratio = peaks[race.RUN] / peaks["by hand"]
    found.goals.append(Goal(f"peak memory of the device: {text}; ratio", ratio, at_most=1.02))
    found.figures |= {"bytes": peaks}
    return found


PARTS: dict[str, Callable[[Bench], Found]] = {
    "loops": loops,
    "nanogpt": nano,
    "save": save,
    "synthetic": synthetic,
    "graphs": graphs,
    "memory": memory,
}
"""By name, the longest first."""
