"""What plain PyTorch answers where no plugin does."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from fundamentallm import processes
from fundamentallm.errors import SettingsError
from fundamentallm.hookspecs import HOOKS, hookimpl
from fundamentallm.metrics import measured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from fundamentallm.data import Batch, Tokenizer
    from fundamentallm.run import Run


# How torchrun and srun say that they have started several processes.
_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def join_processes() -> AbstractContextManager[None]:
    for name in _SIZES:
        size = os.environ.get(name, "")
        if size.isdecimal() and int(size) > 1:
            raise SettingsError(
                f"this is one of several processes ({name} is {size}), but no listed plugin joins "
                "them: each would train a run of its own. List 'ddp' or 'fsdp' in `plugins`, or "
                "start one process"
            )
    return nullcontext()


def agree(mine: Any) -> list[Any]:
    return [mine]


def gather(tree: Any) -> Any:
    return tree


def spread(tensor: Tensor) -> Tensor:
    return tensor


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
    if run.world_size > 1:
        return processes.total_weight(run, window)
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


def validate(run: Run) -> dict[str, float]:
    # Closed also where an error keeps its frame: the loaders of the splits may have workers.
    with run.evaluating(), closing(run.held_out()) as batches:
        for _, batch in batches:
            run.log_loss(run.hook.forward(run=run, batch=batch), batch.weight)
        # After a signal, the means would be those of a part of the data.
        return {} if run.signal is not None else measured(run, run.take_logged())


def reduce_metrics(metrics: dict[str, float]) -> dict[str, float]:
    return metrics


def stop_agreed(run: Run, stopping: bool) -> bool:
    return processes.stop_agreed(run) if run.world_size > 1 else stopping


def answers() -> dict[str, Callable[..., Any]]:
    """Return the defaults by hook name."""
    return {name: hookimpl(value) for name, value in globals().items() if name in HOOKS}
