"""What plain PyTorch answers where no plugin does."""

from __future__ import annotations

from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING

from fundamentallm.hookspecs import HOOKS, hookimpl
from fundamentallm.metrics import measured

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
    return stopping


def answers() -> dict[str, Callable[..., Any]]:
    """Return the defaults by hook name."""
    return {name: hookimpl(value) for name, value in globals().items() if name in HOOKS}
