"""A step sends what a handwritten loop sends, and one message between the hosts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fundamentallm import Run, field, hookimpl, plugin, train
from fundamentallm.testing import TinyModel, TinySamples, compose_tiny, in_processes


class Calls:
    """Counts the collectives that torch carries out, by the size of what they send."""

    def __enter__(self) -> Counter[tuple[str, int]]:
        from torch.profiler import ProfilerActivity, profile

        self.counted: Counter[tuple[str, int]] = Counter()
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.profile.__enter__()
        return self.counted

    def __exit__(self, *error: object) -> None:
        self.profile.__exit__(*error)
        for event in self.profile.events():
            if event.name.startswith("gloo:"):
                sizes = [torch.Size(shape).numel() for shape in event.input_shapes if shape]
                self.counted[event.name, sum(sizes)] += 1


@plugin
class CountsSteps:
    """Counts the collectives of the third step."""

    counted: Any = field(init=False, default=None)
    _calls: Any = field(init=False, default=None)

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if self._calls is None and run.progress.step == 2:
            self._calls = Calls()
            self.counted = self._calls.__enter__()
        elif self._calls is not None and run.progress.step == 3:
            self._calls.__exit__(None, None, None)


def by_run(folder: Path, *plugins: str) -> dict[tuple[str, int], int]:
    counts = CountsSteps()
    settings = {"accumulate": {"microbatches": 3}} if "accumulate" in plugins else None
    composed = compose_tiny(counts, *plugins, settings=settings, length=4, log_every=100)
    train(composed, run_dir=folder)
    return dict(counts.counted)


def by_hand(rank: int, kind: str) -> dict[tuple[str, int], int]:
    dist.init_process_group("gloo")
    model: Any = TinyModel().build_model()
    if kind == "fsdp":
        fully_shard(model)
        model.set_force_sum_reduction_for_comms(True)
    else:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters())
    calls = Calls()
    data = TinySamples(4, "cpu", (rank, 2))
    for step in range(4):
        if step == 2:
            counted = calls.__enter__()
        optimizer.zero_grad(set_to_none=True)
        model(*data.batch(range(4 * step, 4 * step + 4)).data).backward()
        optimizer.step()
        if step == 2:
            calls.__exit__(None, None, None)
    del model, optimizer  # a wrapper that outlives its process group may hang when it is freed
    dist.destroy_process_group()
    return dict(counted)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_step_has_the_collectives_of_a_handwritten_loop_and_one_message(
    tmp_path: Path, kind: str
) -> None:
    ours = in_processes(2, lambda _: by_run(tmp_path / "run", kind))
    theirs = in_processes(2, lambda rank: by_hand(rank, kind))
    for mine, its in zip(ours, theirs, strict=True):
        messages = {key: count for key, count in mine.items() if key not in its}
        assert {key: count for key, count in mine.items() if key in its} == its
        assert sum(messages.values()) == 1, messages


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_window_of_several_micro_batches_adds_gradients_once(tmp_path: Path, kind: str) -> None:
    def added(listed: tuple[str, ...]) -> int:
        folder = tmp_path / "-".join(listed)
        counts = in_processes(2, lambda _: by_run(folder, *listed))[0]
        return sum(count for (call, _), count in counts.items() if "reduce" in call)

    assert added((kind, "accumulate")) == added((kind,)) >= 1
