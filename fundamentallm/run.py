"""The run: what the loop and the plugins share while it lasts."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sized
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from weakref import WeakSet

from fundamentallm import logged, processes, snapshots
from fundamentallm.data import Batch, Progress
from fundamentallm.epochs import begins_epoch, end_epochs
from fundamentallm.errors import DataError, ReservedNameError, StorageError
from fundamentallm.gradients import total_norm
from fundamentallm.host import renew
from fundamentallm.logged import NUMBER, Logged
from fundamentallm.rng import Generators
from fundamentallm.snapshots import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    import torch
    from torch import Tensor, nn

    from fundamentallm.checks import Checks
    from fundamentallm.data import Data, Loaded, Rejection, Tokenizer
    from fundamentallm.hookspecs import Hooks, Outcome
    from fundamentallm.settings import RunSettings

T = TypeVar("T")
Collected: TypeAlias = dict[str, dict[str, list[Any]]]  # by split and name

_used: WeakSet[Any] = WeakSet()
"""The plugin objects that were part of a run in this process."""


class Run:
    """One training run. Hooks ask for it as ``run``; ``train`` returns it.

    ``model`` is the canonical module whose state dict is saved; ``module`` is what ``forward``
    calls (compiled, distributed). ``window`` and ``losses`` hold the step's micro-batches that have
    targets and their detached losses, ``rejected`` the rejections of the step. ``in_step`` is true
    from ``on_step_start`` until the step is counted. ``phase`` is ``"train"`` or the split being
    validated. ``ending`` is true from the moment it is clear that no further step follows.
    ``tables`` are the settings as TOML states them, ``history`` the last 5,000 rows.
    ``training`` is false in a run that ``load_run`` loaded to use it: it has no optimizer, and its
    training data may be missing. ``begun`` is true once everything is built and recorded.
    ``loaded`` is the checkpoint that the run was restored from, or None.
    Of a run of several processes, ``rank`` counts them from 0 to ``world_size`` - 1; this one reads
    part ``data_rank`` of ``data_size`` of the data. ``received_signal`` is a signal that the others
    may not know of yet, ``signal`` one that all act on.
    """

    data: Data
    tokenizer: Tokenizer | None
    model: nn.Module
    module: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    base_lrs: list[float]
    hook: Hooks
    bind: Callable[..., Hooks]
    checks: Checks
    tables: dict[str, Any]
    stream: Iterator[Batch]
    rank = 0
    world_size = 1
    data_rank = 0
    data_size = 1
    data_compared = False
    training = True
    begun = False
    loaded: Loaded | None = None
    splits: tuple[str, ...] = ()
    phase = "train"
    in_step = False
    weight = 1.0
    ending = False
    stop_reason: str | None = None
    signal: int | None = None
    received_signal: int | None = None
    # Of the last step: of the first process, once it is known, and of this one.
    first_seconds = 0.0
    own_seconds = 0.0
    outcome: Outcome = "failed"
    error: BaseException | None = None
    wanted_checkpoint: str | None = None
    rewind_to: str | None = None
    # A list while no plugin may change the gradients: then their norm is computed once.
    known_norm: list[Tensor] | None = None
    edits_once = False

    def __init__(
        self, settings: RunSettings, plugins: dict[str, Any], folder: Path | None = None
    ) -> None:
        self.settings = settings
        self.plugins = plugins
        # Not known in a new run until all processes have met.
        self.folder = folder or Path()
        self.device: str = settings.device
        self.progress = Progress()
        self.window: list[Batch] = []
        self.losses: list[Tensor] = []
        self.rejected: list[Rejection] = []
        self.history: list[dict[str, float]] = []
        self._logged: Logged = defaultdict(list)
        self._seen: set[str] = set()
        self._collected: Collected = {}
        for plugin in plugins.values():
            # The state of a run must not be that of another one with the same object.
            if plugin in _used:
                renew(plugin)
            _used.add(plugin)

    @property
    def name(self) -> str:
        """The name of the run: that in the settings, else that of its folder."""
        return self.settings.name or self.folder.name

    def log(self, name: str, value: Tensor | float, weight: float | None = None) -> None:
        """Add to the mean of ``name`` over the log period (in validation: over the split). A tensor
        stays on the device: nothing waits. It must be 0-d and not be changed in place later.
        ``weight`` is by default that of the current batch; between batches it is 1 over all
        processes, so that what they all log counts once. The names
        ``train/loss``, ``<split>/loss``, ``train/tokens`` and ``optim/lr`` are the core's own. Of
        several processes, any may log; a distributed tensor has to be logged by all."""
        if name not in self._seen:
            self._check_logged(name, value)
        if not isinstance(value, NUMBER):
            value = value.detach() if value.requires_grad else value
            if self.world_size > 1 and hasattr(value, "full_tensor"):
                value = value.full_tensor()
        weighed = self.weight if weight is None else weight
        attempt = self.progress.step if self.in_step else None
        self._logged[name].append((value, weighed, attempt))

    def log_loss(self, loss: Tensor, weight: float) -> None:
        """Log a batch's loss as ``<phase>/loss``: what the core does, and what a plugin that
        answers ``validate`` does in its place."""
        attempt = self.progress.step if self.in_step else None
        loss = loss.detach() if loss.requires_grad else loss
        self._logged[f"{self.phase}/loss"].append((loss, weight, attempt))

    def _check_logged(self, name: str, value: Any) -> None:
        """Check what is logged under a name for the first time; raise what the plugin did wrong."""
        section, _, last = name.rpartition("/")
        losses = last == "loss" and section in ("train", self.phase, *self.splits)
        if losses or name in ("train/tokens", "optim/lr"):
            raise ReservedNameError(f"run.log({name!r}): the core logs {name}; take another name")
        if not isinstance(value, NUMBER) and getattr(value, "ndim", 1) != 0:
            shape = list(value.shape) if hasattr(value, "shape") else type(value).__name__
            raise ValueError(f"run.log({name!r}): expected a number or a 0-d tensor, got {shape}")
        self._seen.add(name)

    def grad_norm(self, norm_type: float = 2.0) -> Tensor:
        """Return the global norm of the gradients as they are now: a 0-d tensor on their device.

        In ``judge_step`` and in the first plugin that answers ``edit_gradients``, all plugins that
        ask for the 2-norm share one computation. Of several processes, all call this.
        """
        known = self.known_norm if norm_type == 2.0 else None
        if known:
            return known[0]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = total_norm(gradients, alike=self._alike, norm_type=norm_type)
        if known is not None:
            known.append(norm)
        return norm

    @cached_property
    def _alike(self) -> bool:
        """Whether all parameters have one device and one dtype."""
        return len({(p.device, p.dtype) for p in self.parameters}) == 1

    def collect(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor of the current batch for ``measure_split``, which gets all of a split.

        Its first dimension counts what the split is made of (samples, tokens); pieces with the same
        name differ in that dimension alone. They stay on the device, without a wait, until the end
        of the split; then ``measure_split`` gets those of all processes. In training nothing is
        kept.
        """
        if self.phase != "train":
            pieces = self._collected.setdefault(self.phase, {}).setdefault(name, [])
            # A micro-batch without a sample of this process is there for the others' sake.
            pieces.append(tensor.detach() if self.weight else tensor.detach()[:0])

    def take_collected(self) -> Collected:
        """Return what was collected, by split and name, in the order of the batches; forget it."""
        collected, self._collected = self._collected, {}
        return collected

    def name_of(self, plugin: object) -> str:
        """Return the instance name of a listed plugin: the name of its TOML table."""
        for name, listed in self.plugins.items():
            if listed is plugin:
                return name
        raise ValueError(f"run.name_of(): no listed plugin is this {type(plugin).__name__}")

    def stop(self, reason: str) -> None:
        """Ask for the end: the run stops at the next safe point, validated and saved."""
        self.stop_reason = self.stop_reason or reason

    def receive_signal(self, number: int) -> None:
        """Ask for the end because of a signal that this process has received."""
        self.received_signal = self.received_signal or number
        # Of several processes, all act on it from the next safe point on.
        if self.world_size == 1 or not self.begun:
            self.signal = self.received_signal

    def rewind(self, checkpoint: str) -> None:
        """Ask to go back to a checkpoint (``"step-00000500"``, ``"latest"``) once the step is over,
        and on from there with the data that follows what has been read. See ``on_rewind``."""
        self.rewind_to = checkpoint

    def go_back(self) -> None:
        """Do what ``rewind`` asked for: weights and plugins go back, the data does not."""
        left, self.wanted_checkpoint, self.rewind_to = self.progress, self.rewind_to, None
        snapshot = self.read_checkpoint()
        if snapshot is None:
            raise StorageError(f"{self.folder}: there is no checkpoint {self.wanted_checkpoint}")
        self.wanted_checkpoint = None
        self.restore(snapshot)
        since, begun = self.progress.samples, not begins_epoch(self.progress)
        for count in ("microbatches", "samples", "tokens", "seconds"):
            setattr(self.progress, count, getattr(left, count))
        self.history = [row for row in self.history if row["step"] <= self.progress.step]
        self.hook.on_rewind(run=self, left=left.step)
        end_epochs(self, since, begun=begun)

    def from_first(self, make: Callable[[], T]) -> T:
        """Call ``make`` in the first process alone and return its result, JSON values, in all.

        All processes call this at the same moment. An error of ``make`` is raised in all of them.
        """
        return make() if self.world_size == 1 else processes.from_first(self, make)

    def of_each_part(self, topic: str, mine: T) -> list[T]:
        """Return what the processes pass as ``mine``, JSON values: once for each part of the data,
        in the order of the parts. All call this at the same moment, with the same ``topic``."""
        return [mine] if self.world_size == 1 else processes.of_each_part(self, topic, mine)

    def read_checkpoint(self) -> Snapshot | None:
        """Return the snapshot to continue from, or None: the same one in all processes."""
        return snapshots.read(self)

    def reopen_data(self) -> None:
        """Open the stream of micro-batches where ``progress`` stands. A plugin calls this in
        ``on_step_start`` if it has changed how the data is cut."""
        self.close_stream()
        self.generators.seed(self.seed_for(f"data/{self.data_rank}"))
        self.stream = self.checks.stream(self.data.batches(self.progress))

    def close_stream(self) -> None:
        """Close the stream of micro-batches, and with it the workers of a data loader."""
        # Without the last reference, an iterator of a data loader ends its workers, too.
        stream = self.__dict__.pop("stream", None)
        close = getattr(stream, "close", None)
        if close is not None:
            close()

    @contextmanager
    def evaluating(self, split: str | None = None) -> Iterator[None]:
        """Evaluate in this context: evaluation weights, evaluation mode, no gradients.

        ``phase`` is ``split`` if one is given. What is logged is kept apart: ``take_logged``
        returns it, or it is dropped. The random generators have a seed of their own, the same in
        every evaluation of a split. At the end all is put back, also after an error.
        """
        import torch

        modules = [*self.model.modules(), *self.module.modules()]
        modes = [(module, module.training) for module in modules]
        phase, weight, outside = self.phase, self.weight, self.swap_logged()
        collected, self._collected = self._collected, {}
        self.phase, self.weight = split or phase, 1 / self.data_size
        try:
            seed = self.seed_for(f"evaluation/{self.phase}/{self.data_rank}")
            self.model.eval()
            self.module.eval()
            with (
                torch.no_grad(),
                self.generators.aside(seed),
                self.hook.evaluation_weights(run=self),
            ):
                yield
        finally:
            self.phase, self.weight = phase, weight
            self.swap_logged(outside)
            self._collected = collected
            for module, mode in modes:
                module.training = mode

    def held_out(self, task: str = "validation") -> Generator[tuple[str, Batch]]:
        """Yield every micro-batch that has a target of the held-out splits, with its split.

        To be used within ``evaluating``. Sets ``phase`` and ``weight``, seeds the random generators
        for each split, reports the progress of ``task``. Ends early once there is a signal. Of
        several processes, each gets all micro-batches: others may wait for it in a forward pass.
        """
        for split, batches in self.data.validation().items():
            self.phase = split
            self._collected.setdefault(split, {})
            self.generators.seed(self.seed_for(f"evaluation/{split}/{self.data_rank}"))
            total = len(batches) if isinstance(batches, Sized) else None
            has_target = False
            for index, batch in enumerate(batches):
                if processes.interrupts_validation(self, index):
                    return
                if index == 0:
                    self.checks.first_of_split(batch, self)
                # A mean over no target would not be a number.
                has_target, self.weight = has_target or batch.weight > 0, batch.weight
                if batch.weight or self.world_size > 1:
                    yield split, batch
                self.report(task, index + 1, total)
            if self.world_size > 1:
                has_target = processes.has_target(self, mine=has_target)
            if not has_target:
                text = f"validation()[{split!r}]: no batch has a target (a weight above 0)"
                raise processes.in_all(self.rank, DataError(text))

    def report(self, task: str, done: int, total: int | None = None) -> None:
        """Report the progress of a long task to the plugins that show it."""
        self.hook.on_progress(run=self, task=task, done=done, total=total)

    @cached_property
    def generators(self) -> Generators:
        """The global random number generators of this process."""
        return Generators(self.device)

    @cached_property
    def step_seed(self) -> int:
        """The seed that those of this process's steps follow from."""
        return self.seed_for(f"step/{self.data_rank}")

    def seed_step(self) -> None:
        """Seed the random generators for the current step, from the number of applied updates.

        The loop does it before a window; what re-runs a part of a step does it again.
        """
        self.generators.seed(self.step_seed, self.progress.applied)

    def seed_for(self, purpose: str) -> int:
        """Return a 63-bit seed of its own for every purpose, the same at every start."""
        text = f"{self.settings.seed}/{purpose}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1

    def forget_attempt(self) -> None:
        """Drop what was logged in the current attempt: the step has been rejected."""
        self.known_norm = None
        for entries in self._logged.values():
            while entries and entries[-1][2] == self.progress.step:
                entries.pop()

    def take_logged(self) -> dict[str, float]:
        """Return the weighted means of all logged values, and clear them: one device read.

        Of several processes, all call this at the same moment, and get the means over all.
        """
        sums = {name: logged.sums(e) for name, e in sorted(self.settle_logged().items()) if e}
        self._logged.clear()
        if self.world_size > 1:
            sums = processes.all_sums(self, sums)
        return {n: total / weight if weight else math.nan for n, (total, weight) in sums.items()}

    def swap_logged(self, other: Logged | None = None) -> Logged:
        """Put ``other`` (default: nothing) in place of what was logged so far, and return that."""
        before, self._logged = self._logged, defaultdict(list) if other is None else other
        return before

    def settle_logged(self) -> Logged:
        """Turn what was logged into plain numbers, which is exact, and keep it that way."""
        return logged.settle(self._logged)

    def snapshot(self) -> Snapshot:
        """Return all that a resumed run needs, at a safe point: a tree of dicts and lists of JSON
        values and tensors, the live ones: copy before the next step. ``optimizer`` holds the states
        by parameter name, ``plugins`` by instance name. All processes take part; the whole tensors
        of a sharded model may be in the first one only."""
        return snapshots.take(self)

    def restore(self, snapshot: Snapshot, *, weights_only: bool = False) -> None:
        """Put a snapshot back; raise ``StorageError`` if it is one of another model. A newly listed
        plugin starts with its initial state; learning rates and the like are what the settings say.
        The key ``loaded``, if there, is a ``Loaded``; ``weights_only`` leaves the optimizer out."""
        snapshots.restore(self, snapshot, weights_only=weights_only)
