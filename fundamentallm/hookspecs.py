"""The contract between the loop and the plugins.

A run in pseudocode::

    with join_processes():                              exclusive; all that follows
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
        if an epoch begins: on_epoch_start(epoch)
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
        if an epoch is complete: on_epoch_end(epoch)
        if rewinding: on_rewind(), on to the next step
        if due: on_validation_end(metrics=validate())   validate is exclusive; by default:
            with evaluation_weights(): forward(batch)...    exclusive
            measure_split(split, collected)                 vote, all metrics
        if due: on_log(reduce_metrics(), validated)     reduce_metrics is exclusive
        stop_agreed()                                   exclusive
        on_safe_point()                                 -> on_checkpoint_saved(folder)
    on_train_end(outcome)
    at any time: on_progress(task, done, total), on_histogram(name, step, edges, counts)
    between processes: agree(topic, mine), gather(tree), spread(tensor, like)    exclusive
    in a command that exports or samples: finish_model()    edit

The marker of a specification states the kind of the hook; start-up checks keep to it:

- **exclusive**: exactly one plugin answers, or the core's default does. A wrapper,
  ``hookimpl(wrapper=True)``, may surround it; the wrappers of one action must commute.
- **vote**: every plugin may answer; a commutative rule combines the answers.
- **event**: every plugin is called; what it returns is ignored.
- **edit**: every plugin changes the same thing in place, in an order that the ``before`` and
  ``after`` names of the classes declare.

A **stable** hook changes only by deprecation: for two minor versions it warns and names its
replacement, then it is an error. A **provisional** hook may change in any version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import pluggy

from fundamentallm.host import HookFacts, hook_facts, markers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fundamentallm.data import Batch, Data, Rejection, Tokenizer
    from fundamentallm.host import Kind
    from fundamentallm.run import Run

hookimpl = pluggy.HookimplMarker("fundamentallm")
exclusive, vote, event, edit = markers("fundamentallm")

Outcome: TypeAlias = Literal["finished", "stopped", "interrupted", "failed"]


class Hooks(Protocol):
    """Every hook of a run, in the order in which a run emits them.

    An implementation may take any subset of the arguments, by name. Arguments are always passed
    by keyword. Unless a hook says otherwise it is called on every process of a distributed run.
    """

    @exclusive(since="0.1", stability="provisional")
    def join_processes(self, run: Run) -> AbstractContextManager[None]:
        """Meet the other processes of the run, set ``run.rank`` and ``run.world_size``, and return
        the context in which the run goes on. ``run.folder`` may not exist yet. Default: this
        process alone; a ``SettingsError`` if it was started as one of several."""

    @exclusive(since="0.1", stability="provisional")
    def agree(self, run: Run, topic: str, mine: Any) -> list[Any]:
        """Return what all processes pass as ``mine``, JSON values, in the order of their ranks. All
        call it at the same moment with the same ``topic``; if not, or if one has ended, it raises
        ``PeerError``. The core does not call it in a run of one process. Default: ``[mine]``."""

    @exclusive(since="0.1", stability="provisional")
    def gather(self, run: Run, tree: Any) -> Any:
        """Return a tree of dicts and lists with every distributed tensor as a whole one, at least
        in the first process. Keys name parameters. All processes call it. Default: unchanged."""

    @exclusive(since="0.1", stability="provisional")
    def spread(self, run: Run, tensor: Tensor, like: Tensor) -> Tensor:
        """Return the part of a whole tensor that this process keeps, distributed as ``like``, its
        parameter, is. All processes call it with the same values. Default: unchanged."""

    @event(since="0.1")
    def on_run_start(self, run: Run) -> None:
        """Begin or continue a run: ``run.folder`` exists and is locked, and nothing is built
        yet."""

    @exclusive(since="0.1")
    def build_data(self, run: Run) -> Data:
        """Make the data source. Nothing of the model exists yet. Has no default."""

    @exclusive(since="0.1")
    def build_tokenizer(self, run: Run) -> Tokenizer | None:
        """Make the tokenizer. Default: ``run.data.tokenizer`` if there is one, else None."""

    @exclusive(since="0.1")
    def build_model(self, run: Run) -> nn.Module:
        """Make the model and its initial weights. The core has seeded torch, and moves the model to
        ``run.device``. Has no default."""

    @edit(since="0.1")
    def adapt_model(self, run: Run) -> None:
        """Change ``run.model`` in place before it is wrapped: freeze, LoRA, quantize. The core
        calls ``run.model.train()`` later, before ``on_train_start``."""

    @exclusive(since="0.1")
    def checkpoint_activations(self, run: Run, model: nn.Module) -> nn.Module:
        """Return ``model`` with activation checkpointing. Default: unchanged."""

    @exclusive(since="0.1")
    def compile_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Return ``model`` compiled; the state-dict keys must not change. Default: unchanged."""

    @exclusive(since="0.1")
    def distribute_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Return the module that ``forward`` calls as ``run.module``: DDP, FSDP. Default:
        unchanged."""

    @exclusive(since="0.1")
    def build_optimizer(self, run: Run) -> Optimizer:
        """Make the optimizer for the parameters of ``run.model``; the ``lr`` of each group is the
        base that ``lr_factor`` multiplies. Has no default."""

    @exclusive(since="0.1")
    def read_checkpoint(self, run: Run) -> dict[str, Any] | None:
        """Return the newest sound snapshot (see ``Run.snapshot``) of the run folder, or None to
        start at step 0; the one that ``run.wanted_checkpoint`` names, if it names one."""

    @event(since="0.1")
    def on_train_start(self, run: Run) -> None:
        """Prepare for the first step: everything is built and restored. A run that is complete ends
        right after this."""

    @event(since="0.1", stability="provisional")
    def on_epoch_start(self, run: Run, epoch: int) -> None:
        """The next step is the first one of an epoch, which are counted from 0. Once for each
        epoch, also in a run that is resumed. Never if the data has no epochs."""

    @event(since="0.1")
    def on_step_start(self, run: Run) -> None:
        """Prepare for a step: ``run.progress`` holds the counts before it, all gradients are
        None."""

    @exclusive(since="0.1")
    def collect_batches(self, run: Run, stream: Iterator[Batch]) -> list[Batch]:
        """Take this step's micro-batches from the endless ``stream``. Default: one."""

    @exclusive(since="0.1")
    def weigh_window(self, run: Run, window: list[Batch]) -> float:
        """Return the weight that the window's losses are divided by. Default: the sum over its
        micro-batches and over all processes."""

    @exclusive(since="0.1")
    def train_microbatch(self, run: Run, batch: Batch, share: float, is_last: bool) -> None:
        """Add the gradients of ``share`` (the batch's weight over the window's) times the loss to
        ``.grad``, and the detached loss to ``run.losses``. Default: ``forward``, ``backward``."""

    @exclusive(since="0.1")
    def forward(self, run: Run, batch: Batch) -> Tensor:
        """Return the batch's mean loss, a 0-d tensor with a graph in training. ``run.phase`` is
        ``"train"`` or the name of a validation split. Default: ``run.module(*batch.data)``."""

    @exclusive(since="0.1")
    def backward(self, run: Run, loss: Tensor) -> None:
        """Backpropagate. ``loss`` already holds the batch's share. Default: ``loss.backward()``."""

    @edit(since="0.1")
    def finish_gradients(self, run: Run) -> None:
        """Turn the summed gradients of all micro-batches into the true ones: unscale, reduce."""

    @vote(since="0.1")
    def judge_step(self, run: Run) -> Rejection | None:
        """Return a ``Rejection`` of this step (overflow, NaN, spike), or None to accept it. One is
        enough: the weights stay as they are, and the step counts as attempted only. They are in
        ``run.rejected`` until the next step."""

    @edit(since="0.1")
    def edit_gradients(self, run: Run) -> None:
        """Change ``.grad`` of an accepted step in place: clip, add noise."""

    @vote(since="0.1")
    def lr_factor(self, run: Run) -> float:
        """Return a factor of the learning rate of the coming update: a pure function of
        ``run.progress``, so that nothing of it needs a checkpoint."""

    @exclusive(since="0.1")
    def optimizer_step(self, run: Run) -> None:
        """Update the weights of an accepted step. Default: ``run.optimizer.step()``."""

    @event(since="0.1")
    def settle_step(self, run: Run, applied: bool) -> None:
        """Follow an update that was made (``applied``) or rejected: loss scale, averaged weights.
        ``run.progress`` already counts the step."""

    @event(since="0.1")
    def on_step_end(self, run: Run) -> None:
        """Observe a finished step; its gradients still exist. Pass tensors to ``run.log``: reading
        a device value here would make the host wait at every step."""

    @event(since="0.1", stability="provisional")
    def on_epoch_end(self, run: Run, epoch: int) -> None:
        """The step that is over took the last sample of an epoch: before the validation, the row
        and the safe point of that step. If its window goes on into the next epoch, that one still
        starts with the next step."""

    @event(since="0.1")
    def on_rewind(self, run: Run, left: int) -> None:
        """Follow a rewind from step ``left`` to an earlier checkpoint (``Run.rewind``), whose state
        is restored. The steps between are void; the data continues after what was read."""

    @exclusive(since="0.1")
    def evaluation_weights(self, run: Run) -> AbstractContextManager[None]:
        """Return a context in which ``run.model`` holds the weights to validate and to sample with.
        ``run.evaluating`` enters it. Default: the weights that are trained."""

    @exclusive(since="0.1")
    def validate(self, run: Run) -> dict[str, float]:
        """Return the metrics of the held-out splits, and leave model and random state as they were.
        Default: the weighted mean loss of every split, and what ``forward`` logs."""

    @vote(since="0.1", stability="provisional")
    def measure_split(
        self, run: Run, split: str, collected: dict[str, Tensor]
    ) -> dict[str, float] | None:
        """Return metrics of a whole held-out split, such as ``val/f1``. ``collected`` holds what
        was given to ``run.collect`` for the split, by name: one tensor on the CPU, all pieces
        joined along their first dimension: those of all processes, in the order of the samples."""

    @event(since="0.1")
    def on_validation_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Receive the metrics of a validation as plain floats, such as ``val/loss``."""

    @exclusive(since="0.1")
    def reduce_metrics(
        self, run: Run, metrics: dict[str, float], scope: Literal["row", "validation"]
    ) -> dict[str, float]:
        """Return the metrics with derived ones added. ``scope`` is what they describe. They are
        those of all processes already, and what the first process returns counts in all of them.
        Default: unchanged."""

    @event(since="0.1")
    def on_log(self, run: Run, metrics: dict[str, float], validated: bool) -> None:
        """Receive a row of metrics as plain floats: the means since the last row, and the metrics
        of a validation of this step if ``validated``. Device values become numbers only here."""

    @exclusive(since="0.1")
    def stop_agreed(self, run: Run, stopping: bool) -> bool:
        """Return whether any process wants to stop, so that all stop together; set ``run.signal``
        and ``run.stop_reason`` in all. ``stopping`` is about this process. Default: as agreed."""

    @event(since="0.1")
    def on_safe_point(self, run: Run) -> None:
        """Save: all state is settled. ``run.ending`` is true at the last safe point."""

    @event(since="0.1")
    def on_checkpoint_saved(self, run: Run, folder: Path) -> None:
        """Receive the folder of a checkpoint that is durable now. The plugin that saved it emits
        this."""

    @event(since="0.1")
    def on_progress(self, run: Run, task: str, done: int, total: int | None) -> None:
        """Show the progress of a long task other than the steps: validation, tokenizing, saving.
        ``total`` is None while unknown; ``done == total`` ends the task."""

    @event(since="0.1", stability="provisional")
    def on_histogram(
        self, run: Run, name: str, step: int, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Receive a histogram under a metric's name: ``counts[i]`` values lie from ``edges[i]`` up
        to ``edges[i + 1]``. The plugin that counted emits this in its ``on_log``."""

    @edit(since="0.1", stability="provisional")
    def finish_model(self, run: Run) -> None:
        """Turn ``run.model`` in place into the model that is exported or sampled from (merge LoRA).
        Commands call it on a loaded run; training never does."""

    @event(since="0.1")
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """Close what the plugin opened: the run is over, also after an error or a signal.
        ``run.error`` holds the exception of a failed run."""


HOOKS = tuple(name for name in vars(Hooks) if not name.startswith("_"))
REQUIRED = ("build_data", "build_model", "build_optimizer")


def about_hook(hook: str) -> HookFacts:
    """Return what the specification of a hook states: kind, first version, stability."""
    return hook_facts(Hooks, hook)


def kind(hook: str) -> Kind:
    """Return the kind of a hook: ``"exclusive"``, ``"vote"``, ``"event"`` or ``"edit"``."""
    return about_hook(hook).kind
