"""Half precision in a run is, bit for bit, the loop that one writes by hand with PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fundamentallm import Batch, Progress, Run, RunSettings, hookimpl, plugin, train
from fundamentallm.testing import compose_tiny
from fundamentallm_gpt.model import GPT
from fundamentallm_gpt.shapes import shape_of

STEPS, MICROBATCHES, BATCH_SIZE = 30, 3, 2
LR, WARMUP, MAX_NORM = 1e-2, 5, 0.5
VOCABULARY, LENGTH = 13, 8
# At the first scale the gradients overflow by themselves, and growing after every second step they
# soon do so again; in these steps one more micro-batch of the window overflows.
INIT_SCALE, GROWTH_INTERVAL = 2.0**20, 2
BOOSTED = {7, 14, 15, 21}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


class Mlp(nn.Module):
    """Two layers with dropout; its loss is multiplied by what comes with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(LENGTH, 32)
        self.layers = nn.Sequential(nn.LayerNorm(32), nn.Dropout(0.1), nn.GELU(), nn.Linear(32, 1))

    def forward(self, tokens: Tensor, targets: Tensor, boost: Tensor) -> Tensor:
        scores = self.layers(self.embedding(tokens.float() / VOCABULARY))
        return nn.functional.mse_loss(scores, targets.float().mean(1, keepdim=True)) * boost


class BoostedGpt(GPT):
    """A small transformer; its loss is multiplied by what comes with the batch."""

    def __init__(self) -> None:
        shape = shape_of(None, {"num_layers": 1, "num_heads": 2, "d_model": 16})
        super().__init__(shape, vocab_size=VOCABULARY, context_length=LENGTH, dropout=0.1)

    def forward(self, tokens: Tensor, targets: Tensor, boost: Tensor) -> Tensor:
        return super().forward(tokens, targets) * boost


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW; of two kinds, since a GradScaler lets the fused one skip steps by itself."""
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=isinstance(model, BoostedGpt))


class Letters:
    """Micro-batches that are a pure function of their index, some with a boosted loss."""

    epoch_samples = None
    fingerprint = "letters"

    def __init__(self, device: str) -> None:
        self.device = device

    def batches(self, progress: Progress) -> Iterator[Batch]:
        index = progress.samples // BATCH_SIZE
        while True:
            yield self.batch(index)
            index += 1

    def batch(self, index: int) -> Batch:
        numbers = torch.arange(BATCH_SIZE * (LENGTH + 1)).view(BATCH_SIZE, -1) + 100 * index
        tokens = (numbers * numbers // 7) % VOCABULARY
        boosted = index % MICROBATCHES == 1 and index // MICROBATCHES in BOOSTED
        data = (tokens[:, :-1], tokens[:, 1:], torch.tensor(1e6 if boosted else 1.0))
        weight = BATCH_SIZE * LENGTH
        moved = tuple(tensor.to(self.device) for tensor in data)
        return Batch(moved, weight, BATCH_SIZE, weight, first=index * BATCH_SIZE)

    def validation(self) -> dict[str, list[Batch]]:
        return {"val": [self.batch(10_001)]}


@plugin
class Parts:
    """The data, the model and the optimizer that the handwritten loop has too."""

    model: Any

    @hookimpl
    def build_data(self, run: Run) -> Letters:
        return Letters(run.device)

    @hookimpl
    def build_model(self) -> nn.Module:
        return self.model()

    @hookimpl
    def build_optimizer(self, run: Run) -> torch.optim.Optimizer:
        return make_optimizer(run.model)


@plugin
class Diary:
    """Writes down what every step came to; stops the run after one of them, if asked."""

    stop_after: int | None = None
    losses: list[float] = attrs.field(factory=list, init=False)
    norms: list[float] = attrs.field(factory=list, init=False)
    rates: list[float] = attrs.field(factory=list, init=False)
    """Norms and learning rates of the steps that are made."""
    rejected: list[int] = attrs.field(factory=list, init=False)
    gradients: list[list[Tensor]] = attrs.field(factory=list, init=False)
    """As they are unscaled and clipped, in the steps that are made."""

    @classmethod
    def joined(cls, diaries: list[Diary]) -> Diary:
        """Return what several of a run's pieces wrote, as one."""
        whole = cls()
        for name in ("losses", "norms", "rates", "rejected", "gradients"):
            setattr(whole, name, [one for diary in diaries for one in getattr(diary, name)])
        return whole

    @hookimpl
    def settle_step(self, run: Run, applied: bool) -> None:
        self.losses += [float(loss) for loss in run.losses]
        if applied:
            self.rates.append(run.optimizer.param_groups[0]["lr"])
            self.gradients.append([p.grad.clone() for p in run.parameters])
        else:
            self.rejected.append(run.progress.step - 1)

    @hookimpl
    def on_log(self, metrics: dict[str, float]) -> None:
        self.norms += [metrics["optim/grad_norm"]] if "optim/grad_norm" in metrics else []

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.stop_after:
            run.stop("as planned")


def factor(applied: int) -> float:
    """A linear warmup, and half a cosine down to a tenth."""
    if applied < WARMUP:
        return (applied + 1) / (WARMUP + 1)
    x = (applied - WARMUP) / (STEPS - WARMUP)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2


class ByHand:
    """What a PyTorch user writes: autocast, GradScaler, accumulation, clipping, LambdaLR."""

    def __init__(self, model: Any, device: str, dtype: torch.dtype, params: torch.dtype) -> None:
        empty = Run(RunSettings(length=STEPS, device=device), {}, Path())
        empty.generators.seed(empty.seed_for("model"))
        self.model = model().to(params).to(device)
        self.diary, self.scales = Diary(), []
        optimizer = self.optimizer = make_optimizer(self.model)
        schedule = LambdaLR(optimizer, factor)
        scaler = torch.amp.GradScaler(
            device,
            init_scale=INIT_SCALE,
            growth_interval=GROWTH_INTERVAL,
            enabled=dtype is torch.float16,
        )
        batches = Letters(device).batches(Progress())
        self.model.train()
        for step in range(STEPS):
            optimizer.zero_grad()
            empty.generators.seed(empty.step_seed, step - len(self.diary.rejected))
            for _ in range(MICROBATCHES):
                with torch.autocast(device, dtype):
                    loss = self.model(*next(batches).data)
                scaler.scale(loss * (1 / MICROBATCHES)).backward()
                self.diary.losses.append(float(loss.detach()))
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            self.scales.append(scaler.get_scale())
            if scaler.get_scale() >= before:
                self.diary.norms.append(float(norm))
                self.diary.rates.append(optimizer.param_groups[0]["lr"])
                self.diary.gradients.append([p.grad.clone() for p in self.model.parameters()])
                schedule.step()
            else:
                self.diary.rejected.append(step)


def by_run(model: Any, folder: Path, order: str, **amp: Any) -> tuple[Run, Diary]:
    """Train as the loop above does, stopping where ``amp`` says under ``stop_after``."""
    diary = Diary(stop_after=amp.pop("stop_after", None))
    tables = {
        "accumulate": {"microbatches": MICROBATCHES},
        "grad_clip": {"max_norm": MAX_NORM},
        "lr_schedule": {"warmup": WARMUP, "decay_to": 0.1},
        "checkpoint": {"every": 1000},
        "guard": {"nonfinite": "stop"},  # an overflow is none of its business
        "amp": {k: v for k, v in amp.items() if k != "device"},
        "run": {"log_every": 1, "validate_every": 4, "device": amp.get("device", "cpu")},
    }
    names = sorted(set(tables) - {"run"}, reverse=order == "reversed")
    composed = compose_tiny(*names, Parts(model=model), diary, settings=tables, length=STEPS)
    return train(composed, run_dir=folder), diary


FP16 = {
    "dtype": "fp16",
    "init_scale": INIT_SCALE,
    "growth_interval": GROWTH_INTERVAL,
    "min_scale": 1e-3,
}


def assert_same(run: Run, diaries: list[Diary], hand: ByHand) -> None:
    """Fail unless a run, in one piece or several, and the handwritten loop came to the same bits."""
    for name, tensor in hand.model.state_dict().items():
        assert run.model.state_dict()[name].equal(tensor), name
    for ours, theirs in zip(run.parameters, hand.model.parameters(), strict=True):
        kept, expected = run.optimizer.state[ours], hand.optimizer.state[theirs]
        assert all(kept[key].equal(expected[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
        assert kept["exp_avg"].dtype is ours.dtype is theirs.dtype
    ours = Diary.joined(diaries)
    assert repr(ours.losses) == repr(hand.diary.losses)  # of which some may be NaN
    assert ours.rejected == hand.diary.rejected
    for mine, theirs in zip(ours.gradients, hand.diary.gradients, strict=True):
        assert all(map(torch.equal, mine, theirs))
    assert ours.norms == hand.diary.norms
    assert ours.rates == hand.diary.rates
    assert (run.progress.step, run.progress.applied) == (STEPS, len(ours.gradients))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", Mlp), id="cpu-mlp"),
        pytest.param(("cpu", BoostedGpt), id="cpu-gpt"),
        pytest.param(("cuda", Mlp), id="cuda-mlp", marks=pytest.mark.cuda),
        pytest.param(("cuda", BoostedGpt), id="cuda-gpt", marks=pytest.mark.cuda),
    ],
)
def fp16(request: Any) -> tuple[str, Any, ByHand]:
    """A device, a model, and what the handwritten loop made of it in fp16."""
    device, model = request.param
    return device, model, ByHand(model, device, torch.float16, torch.float32)


def test_the_loop_by_hand_overflows_as_it_should(fp16: Any) -> None:
    *_, hand = fp16
    rejected = set(hand.diary.rejected)
    assert rejected > BOOSTED, "some overflow without an injected fault"
    assert 0 in rejected
    assert rejected & set(range(STEPS // 2, STEPS)) > BOOSTED & set(range(STEPS // 2, STEPS))
    assert len(hand.diary.gradients) > STEPS // 2


@pytest.mark.parametrize("order", ["sorted", "reversed"])
def test_fp16_is_the_handwritten_loop_bit_by_bit(fp16: Any, order: str, tmp_path: Path) -> None:
    device, model, hand = fp16
    run, diary = by_run(model, tmp_path, order, device=device, **FP16)
    assert_same(run, [diary], hand)
    assert [row["amp/scale"] for row in run.history] == hand.scales
    counts = [len([r for r in hand.diary.rejected if r <= step]) for step in range(STEPS)]
    assert [row["amp/overflows"] for row in run.history] == counts


def test_fp16_is_that_also_when_it_is_stopped_and_resumed(fp16: Any, tmp_path: Path) -> None:
    device, model, hand = fp16
    assert {14, 15} < set(hand.diary.rejected)
    assert hand.scales[18] == hand.scales[17]
    # Between two overflows; with a step done of the two that growing takes; and after another.
    stops, diaries, scales = [15, 19, 20, None], [], []
    for stop in stops:
        run, diary = by_run(model, tmp_path, "sorted", device=device, stop_after=stop, **FP16)
        assert run.outcome == ("finished" if stop is None else "stopped")
        diaries.append(diary)
        scales += [row["amp/scale"] for row in run.history]
    assert_same(run, diaries, hand)
    assert scales == hand.scales


@pytest.mark.parametrize("model", [Mlp, BoostedGpt])
@pytest.mark.parametrize("params", [None, "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_bf16_is_the_handwritten_loop_bit_by_bit(
    device: str, params: str | None, model: Any, tmp_path: Path
) -> None:
    kept = torch.bfloat16 if params else torch.float32
    hand = ByHand(model, device, torch.bfloat16, kept)
    settings = {"dtype": "bf16", **({"params": params} if params else {})}
    run, diary = by_run(model, tmp_path / "whole", "sorted", device=device, **settings)
    assert_same(run, [diary], hand)
    assert {p.dtype for p in run.parameters} == {kept}
    diaries = []
    for stop in (11, None):
        more = {"device": device, "stop_after": stop, **settings}
        run, diary = by_run(model, tmp_path / "resumed", "reversed", **more)
        diaries.append(diary)
    assert_same(run, diaries, hand)
