"""The run: what the loop and the plugins share while it lasts."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sized
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from weakref import WeakSet

import attrs

from fundamentallm.data import Batch, Progress
from fundamentallm.epochs import begins_epoch, end_epochs
from fundamentallm.errors import DataError, ReservedNameError, SettingsError, StorageError
from fundamentallm.gradients import total_norm
from fundamentallm.host import get_state, renew, set_state
from fundamentallm.rng import Generators

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from fundamentallm.checks import Checks
    from fundamentallm.data import Data, Loaded, Rejection, Tokenizer
    from fundamentallm.hookspecs import Hooks, Outcome
    from fundamentallm.settings import RunSettings

Snapshot: TypeAlias = dict[str, Any]
_NUMBER = (float, int)  # making a union of types takes longer than asking it
# Value, weight, and `progress.step` before the attempt that logged it; None between attempts.
_Entry: TypeAlias = tuple[Any, float, int | None]
Logged: TypeAlias = defaultdict[str, list[_Entry]]
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
    outcome: Outcome = "failed"
    error: BaseException | None = None
    wanted_checkpoint: str | None = None
    rewind_to: str | None = None
    # A list while no plugin may change the gradients: then their norm is computed once.
    known_norm: list[Tensor] | None = None
    edits_once = False

    def __init__(self, settings: RunSettings, plugins: dict[str, Any], folder: Path) -> None:
        self.settings = settings
        self.plugins = plugins
        self.folder = folder
        self.name = settings.name or folder.name
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

    def log(self, name: str, value: Tensor | float, weight: float | None = None) -> None:
        """Add to the mean of ``name`` over the log period (in validation: over the split). A tensor
        stays on the device: nothing waits. It must be 0-d and not be changed in place later.
        ``weight`` is by default that of the current batch, and 1 between batches. The names
        ``train/loss``, ``<split>/loss``, ``train/tokens`` and ``optim/lr`` are the core's own."""
        if name not in self._seen:
            self._check_logged(name, value)
        if not isinstance(value, _NUMBER) and value.requires_grad:
            value = value.detach()
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
        if not isinstance(value, _NUMBER) and getattr(value, "ndim", 1) != 0:
            shape = list(value.shape) if hasattr(value, "shape") else type(value).__name__
            raise ValueError(f"run.log({name!r}): expected a number or a 0-d tensor, got {shape}")
        self._seen.add(name)

    def grad_norm(self) -> Tensor:
        """Return the global 2-norm of the gradients as they are now: a 0-d tensor on their device.

        In ``judge_step`` and in the first plugin that answers ``edit_gradients``, all plugins that
        ask share one computation.
        """
        known = self.known_norm
        if known:
            return known[0]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = total_norm(gradients, alike=self._alike)
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
        of the split, and in this process: no other one gets them. In training nothing is kept.
        """
        if self.phase != "train":
            pieces = self._collected.setdefault(self.phase, {}).setdefault(name, [])
            pieces.append(tensor.detach())

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

    def rewind(self, checkpoint: str) -> None:
        """Ask to go back to a checkpoint (``"step-00000500"``, ``"latest"``) once the step is over,
        and on from there with the data that follows what has been read. See ``on_rewind``."""
        self.rewind_to = checkpoint

    def go_back(self) -> None:
        """Do what ``rewind`` asked for: weights and plugins go back, the data does not."""
        left, self.wanted_checkpoint, self.rewind_to = self.progress, self.rewind_to, None
        snapshot = self.hook.read_checkpoint(run=self)
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

    def reopen_data(self) -> None:
        """Open the stream of micro-batches where ``progress`` stands. A plugin calls this in
        ``on_step_start`` if it has changed how the data is cut."""
        self.close_stream()
        self.generators.seed(self.seed_for(f"data/{self.rank}"))
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
        phase, weight, logged = self.phase, self.weight, self.swap_logged()
        collected, self._collected = self._collected, {}
        self.phase, self.weight = split or phase, 1.0
        try:
            seed = self.seed_for(f"evaluation/{self.phase}/{self.rank}")
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
            self.swap_logged(logged)
            self._collected = collected
            for module, mode in modes:
                module.training = mode

    def held_out(self, task: str = "validation") -> Generator[tuple[str, Batch]]:
        """Yield every micro-batch that has a target of the held-out splits, with its split.

        To be used within ``evaluating``. Sets ``phase`` and ``weight``, seeds the random generators
        for each split, reports the progress of ``task``. Ends early once there is a signal.
        """
        for split, batches in self.data.validation().items():
            self.phase = split
            self._collected.setdefault(split, {})
            self.generators.seed(self.seed_for(f"evaluation/{split}/{self.rank}"))
            total = len(batches) if isinstance(batches, Sized) else None
            has_target = False
            for index, batch in enumerate(batches):
                if self.signal is not None:
                    return
                if index == 0:
                    self.checks.first_of_split(batch, self)
                if batch.weight:  # a mean over no target would not be a number
                    has_target, self.weight = True, batch.weight
                    yield split, batch
                self.report(task, index + 1, total)
            if not has_target:
                raise DataError(
                    f"validation()[{split!r}]: no batch has a target (a weight above 0)"
                )

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
        return self.seed_for(f"step/{self.rank}")

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
        """Return the weighted means of all logged values, and clear them: one device read."""
        means = {name: _mean(e) for name, e in sorted(self._settled().items()) if e}
        self._logged.clear()
        return means

    def swap_logged(self, other: Logged | None = None) -> Logged:
        """Put ``other`` (default: nothing) in place of what was logged so far, and return that."""
        before, self._logged = self._logged, defaultdict(list) if other is None else other
        return before

    def _settled(self) -> Logged:
        """Turn what was logged into plain numbers, which is exact, and keep it that way."""
        entries = [entry for rows in self._logged.values() for entry in rows]
        tensors = [value for value, _, _ in entries if not isinstance(value, float | int)]
        if tensors:
            numbers = iter(_to_floats(tensors))
            for name, rows in self._logged.items():
                self._logged[name] = [
                    (v if isinstance(v, float | int) else next(numbers), w, s) for v, w, s in rows
                ]
        return self._logged

    def snapshot(self) -> Snapshot:
        """Return all that a resumed run needs, at a safe point: a tree of dicts and lists of JSON
        values and tensors, the live ones: copy before the next step. ``optimizer`` holds the states
        by parameter name, ``plugins`` by instance name."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        states = {name: get_state(instance) for name, instance in self.plugins.items()}
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": {names[id(p)]: dict(s) for p, s in self.optimizer.state.items() if s},
            "optimizer_class": str(type(self.optimizer)),
            "plugins": {name: kept for name, kept in states.items() if kept},
            "progress": attrs.asdict(self.progress) | {"before": list(self.progress.before)},
            "logged": {name: [list(e) for e in rows] for name, rows in self._settled().items()},
        }

    def restore(self, snapshot: Snapshot, *, weights_only: bool = False) -> None:
        """Put a snapshot back; raise ``StorageError`` if it is one of another model. A newly listed
        plugin starts with its initial state; learning rates and the like are what the settings say.
        The key ``loaded``, if there, is a ``Loaded``; ``weights_only`` leaves the optimizer out."""
        self.loaded = snapshot.get("loaded")
        try:
            self.model.load_state_dict(snapshot["model"])
        except RuntimeError as error:
            raise StorageError(f"the checkpoint is one of another model: {error}") from error
        for name in self.plugins.keys() & snapshot["plugins"].keys():
            set_state(self.plugins[name], snapshot["plugins"][name])
        counts = snapshot["progress"] | {"epoch_samples": self.progress.epoch_samples}
        self.progress = Progress(**counts | {"before": tuple(counts["before"])})
        if weights_only:
            return
        names = {id(p): name for name, p in self.model.named_parameters()}
        packed = self.optimizer.state_dict()
        held = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        kept, kind = snapshot["optimizer"], snapshot["optimizer_class"]
        if kind != str(type(self.optimizer)):
            raise SettingsError(f"the checkpoint's optimizer is {kind}; resume with that one")
        packed["state"] = {i: kept[name] for i, name in enumerate(held) if name in kept}
        self.optimizer.load_state_dict(packed)
        rows = {name: [(v, w, s) for v, w, s in r] for name, r in snapshot["logged"].items()}
        self._logged = defaultdict(list, rows)


def _to_floats(tensors: list[Tensor]) -> list[float]:
    import torch

    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.cpu() for tensor in tensors]
    return cast("list[float]", torch.stack(tensors).tolist())


def _mean(entries: list[_Entry]) -> float:
    # Lists: a generator would be called once for every step of the period.
    total = math.fsum([weight for _, weight, _ in entries])
    return math.fsum([v * w for v, w, _ in entries]) / total if total else math.nan
