"""What plain PyTorch answers where no plugin does."""

from __future__ import annotations

from collections.abc import Sized
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from fundamentallm.hookspecs import HOOKS, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from torch import Tensor, nn

    from fundamentallm.data import Batch, Tokenizer
    from fundamentallm.run import Run


def build_tokenizer(run: Run) -> Tokenizer | None:
    return getattr(run.data, "tokenizer", None)


def checkpoint_activations(model: nn.Module) -> nn.Module:
    return model


compile_model = distribute_model = checkpoint_activations


def read_checkpoint() -> None:
    return None


def collect_batches(run: Run, stream: Iterator[Batch]) -> list[Batch]:
    return list(islice(stream, 1))


def weigh_window(run: Run, window: list[Batch]) -> float:
    return float(sum(map(attrgetter("weight"), window)))


def train_microbatch(run: Run, batch: Batch, share: float, is_last: bool) -> None:
    loss = run.hook.forward(run=run, batch=batch)
    run.losses.append(loss.detach())
    # A share of exactly 1 is the usual case; multiplying by it would cost two kernels for nothing.
    run.hook.backward(run=run, loss=loss if share == 1.0 else loss * share)


def forward(run: Run, batch: Batch) -> Tensor:
    data = batch.data
    loss: Tensor = run.module(**data) if isinstance(data, dict) else run.module(*data)
    return loss


def backward(run: Run, loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def optimizer_step(run: Run) -> None:
    run.optimizer.step()


def evaluation_weights() -> AbstractContextManager[None]:
    return nullcontext()


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    modes = {module: module.training for module in run.module.modules()}
    logged = run.swap_logged()
    devices = [torch.cuda.current_device()] if run.device.startswith("cuda") else []
    run.module.eval()
    try:
        with torch.random.fork_rng(devices=devices), run.hook.evaluation_weights(run=run):
            for split, batches in run.data.validation().items():
                run.phase = split
                total = len(batches) if isinstance(batches, Sized) else None
                for index, batch in enumerate(batches):
                    if run.signal is not None:
                        return {}
                    if batch.weight:  # the mean over no target at all would be no number
                        run.weight = batch.weight
                        run.log(f"{split}/loss", run.hook.forward(run=run, batch=batch))
                    run.report("validation", index + 1, total)
        return run.take_logged()
    finally:
        run.swap_logged(logged)
        run.phase, run.weight = "train", 1.0
        for module, mode in modes.items():
            module.training = mode


def reduce_metrics(metrics: dict[str, float]) -> dict[str, float]:
    return metrics


def stop_agreed(run: Run, stopping: bool) -> bool:
    return stopping


def answers() -> dict[str, Callable[..., Any]]:
    """Return the defaults by hook name."""
    return {name: hookimpl(value) for name, value in globals().items() if name in HOOKS}
