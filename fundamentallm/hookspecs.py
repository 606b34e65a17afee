"""The contract between the loop and the plugins.

A run in pseudocode::

    on_run_start()
    data = build_data()                                 exclusive
    tokenizer = build_tokenizer()                       exclusive
    model = build_model()                               exclusive
    adapt_model()                                       edit
    module = checkpoint_activations(model)              exclusive
    module = compile_model(module)                      exclusive
    module = distribute_model(module)                   exclusive
    optimizer = build_optimizer()                       exclusive
    read_checkpoint()                                   exclusive
    on_train_start()
    while not done:
        on_step_start()
        window = collect_batches(stream)                exclusive
        total = weigh_window(window)                    exclusive
        for batch in window:
            train_microbatch(batch, share, is_last)     exclusive; by default:
                loss = forward(batch)                       exclusive
                backward(loss * share)                      exclusive
        finish_gradients()                              edit
        rejected = judge_step()                         vote, any reason rejects
        if not rejected:
            edit_gradients()                            edit
            lr = base * lr_factor()                     vote, product
            optimizer_step()                            exclusive
        settle_step(applied=not rejected)               event
        on_step_end()
        if rewinding: on_rewind(), on to the next step
        if due: on_validation_end(metrics=validate())   validate is exclusive; by default:
            with evaluation_weights(): forward(batch)...    exclusive
        if due: on_log(metrics=reduce_metrics())        reduce_metrics is exclusive
        stop_agreed()                                   exclusive
        on_safe_point()                                 -> on_checkpoint_saved(folder)
    on_train_end(outcome)
    any time, for whoever shows it: on_progress(task, done, total)

Four kinds of hooks, told apart by their names and kept by start-up checks:

- **exclusive** (``build_…`` and plain verbs): exactly one plugin answers, or the core's default.
  ``hookimpl(wrapper=True)`` may surround it; wrappers of one action must commute.
- **vote** (``judge_…``, ``…_factor``): everyone answers; a commutative rule combines the answers.
- **event** (``on_…``, ``settle_step``): everyone hears; answers are ignored.
- **edit** (``adapt_…``, ``edit_…``, ``finish_…``): everyone changes the thing in place, in an order
  that the ``before``/``after`` names of the classes declare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fundamentallm.data import Batch, Data, Tokenizer
    from fundamentallm.run import Run

hookspec = pluggy.HookspecMarker("fundamentallm")
hookimpl = pluggy.HookimplMarker("fundamentallm")
exclusive = hookspec(firstresult=True)

Outcome: TypeAlias = Literal["finished", "stopped", "interrupted", "failed"]


class Hooks(Protocol):
    """Every hook of a run, in the order in which a run emits them.

    An implementation may take any subset of the arguments, by name. Arguments are always passed
    by keyword. Unless a hook says otherwise it is called on every process of a distributed run.
    """

    @hookspec
    def on_run_start(self, run: Run) -> None:
        """A run begins, or goes on: ``run.folder`` is there, locked, and nothing is built yet."""

    @exclusive
    def build_data(self, run: Run) -> Data:
        """Make the data source. Nothing of the model exists yet. Has no default."""

    @exclusive
    def build_tokenizer(self, run: Run) -> Tokenizer | None:
        """Make the tokenizer. Default: ``run.data.tokenizer`` if there is one, else None."""

    @exclusive
    def build_model(self, run: Run) -> nn.Module:
        """Make the model and its initial weights, torch being seeded; the core moves the result to
        ``run.device``. Has no default."""

    @hookspec
    def adapt_model(self, run: Run) -> None:
        """Change ``run.model`` in place before anything wraps it: freeze, LoRA, quantize. All of it
        is put into training mode before ``on_train_start``, where a module may be taken out."""

    @exclusive
    def checkpoint_activations(self, run: Run, model: nn.Module) -> nn.Module:
        """Return ``model`` with activation checkpointing. Default: as it is."""

    @exclusive
    def compile_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Return ``model`` compiled; the state-dict keys must not change. Default: as it is."""

    @exclusive
    def distribute_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Return what ``forward`` calls as ``run.module``: DDP, FSDP… Default: as it is."""

    @exclusive
    def build_optimizer(self, run: Run) -> Optimizer:
        """Make the optimizer for the parameters of ``run.model``; the ``lr`` of each group is the
        base that ``lr_factor`` multiplies. Has no default."""

    @exclusive
    def read_checkpoint(self, run: Run) -> dict[str, Any] | None:
        """Return the newest sound snapshot (see ``Run.snapshot``) of the run folder, or None to
        start at step 0; the one that ``run.wanted_checkpoint`` names, if it names one."""

    @hookspec
    def on_train_start(self, run: Run) -> None:
        """Everything is built and restored; the next thing is a step (or the end, if done)."""

    @hookspec
    def on_step_start(self, run: Run) -> None:
        """A step begins: ``run.progress`` still holds the counts before it; gradients are None."""

    @exclusive
    def collect_batches(self, run: Run, stream: Iterator[Batch]) -> list[Batch]:
        """Take this step's micro-batches from the endless ``stream``. Default: one."""

    @exclusive
    def weigh_window(self, run: Run, window: list[Batch]) -> float:
        """Return what the window's losses are divided by: so much weight is in it, in all its
        micro-batches and processes. Default: the sum of this process's weights."""

    @exclusive
    def train_microbatch(self, run: Run, batch: Batch, share: float, is_last: bool) -> None:
        """Add the gradients of ``share`` (the batch's weight over the window's) times the loss to
        ``.grad``, and the detached loss to ``run.losses``. Default: ``forward``, ``backward``."""

    @exclusive
    def forward(self, run: Run, batch: Batch) -> Tensor:
        """Return the batch's mean loss, a 0-d tensor with a graph in training. ``run.phase`` tells
        ``"train"`` from the name of a validation split. Default: ``run.module(*batch.data)``."""

    @exclusive
    def backward(self, run: Run, loss: Tensor) -> None:
        """Backpropagate. ``loss`` already holds the batch's share. Default: ``loss.backward()``."""

    @hookspec
    def finish_gradients(self, run: Run) -> None:
        """All micro-batches are done: make the gradients what they mean (unscale, reduce)."""

    @hookspec
    def judge_step(self, run: Run) -> str | None:
        """Return a reason to reject this step (overflow, NaN, spike), or None. Rejected by anyone,
        it leaves the weights as they are and counts as attempted only."""

    @hookspec
    def edit_gradients(self, run: Run) -> None:
        """Change ``.grad`` of an accepted step in place: clip, add noise."""

    @hookspec
    def lr_factor(self, run: Run) -> float:
        """Return a factor of the learning rate of the coming update: a pure function of
        ``run.progress``, so that nothing of it needs a checkpoint."""

    @exclusive
    def optimizer_step(self, run: Run) -> None:
        """Update the weights of an accepted step. Default: ``run.optimizer.step()``."""

    @hookspec
    def settle_step(self, run: Run, applied: bool) -> None:
        """The update was made (``applied``) or rejected: follow it (scaler, averaged weights).
        ``run.progress`` counts the step already."""

    @hookspec
    def on_step_end(self, run: Run) -> None:
        """The step is over; its gradients are still there. ``run.log`` what you see: reading a
        device value here would make the host wait at every step."""

    @hookspec
    def on_rewind(self, run: Run, left: int) -> None:
        """The run has gone back from step ``left`` to an earlier checkpoint (``Run.rewind``), which
        is now its state; the data goes on behind what was read. The steps between are void."""

    @exclusive
    def evaluation_weights(self, run: Run) -> AbstractContextManager[None]:
        """Return a context in which ``run.model`` holds the weights to validate and to sample with.
        Whoever evaluates enters it. Default: the weights that are trained."""

    @exclusive
    def validate(self, run: Run) -> dict[str, float]:
        """Return the metrics of the held-out splits, and leave model and random state as they
        were. Default: the weighted mean loss of every split, and what ``forward`` logs."""

    @hookspec
    def on_validation_end(self, run: Run, metrics: dict[str, float]) -> None:
        """A validation is done; ``metrics`` are plain floats such as ``val/loss``."""

    @exclusive
    def reduce_metrics(self, run: Run, metrics: dict[str, float]) -> dict[str, float]:
        """Combine the metrics of all processes. Default: as they are."""

    @hookspec
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """A row for the loggers, as plain floats: means since the last one, and what a validation
        has just found. The only place where device values become numbers."""

    @exclusive
    def stop_agreed(self, run: Run, stopping: bool) -> bool:
        """Tell whether any process wants to stop, so that all stop together; where one has heard a
        signal, set ``run.signal`` in all. Default: ``stopping``, this process's own wish."""

    @hookspec
    def on_safe_point(self, run: Run) -> None:
        """All state is settled; savers save here. ``run.ending`` is true at the last one."""

    @hookspec
    def on_checkpoint_saved(self, run: Run, folder: Path) -> None:
        """A checkpoint is durable under ``folder``. Emitted by the plugin that saved it."""

    @hookspec
    def on_progress(self, run: Run, task: str, done: int, total: int | None) -> None:
        """Something long besides the steps moved on: validation, tokenizing, saving. ``total`` is
        None while unknown; ``done == total`` ends the task."""

    @hookspec
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """The run is over, also after an error or a signal. ``run.error`` holds the exception of
        a failed run. Close what you opened."""


HOOKS = tuple(name for name in vars(Hooks) if not name.startswith("_"))
REQUIRED = ("build_data", "build_model", "build_optimizer")
