"""The run: what the loop and the plugins share while it lasts."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import attrs

from fundamentallm.errors import StorageError
from fundamentallm.state import get_state, random_state, set_random_state, set_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from fundamentallm.hookspecs import Hooks
    from fundamentallm.settings import RunSettings

Snapshot: TypeAlias = dict[str, Any]
_Entry: TypeAlias = tuple[Any, float, int]  # value, weight, step
Logged: TypeAlias = defaultdict[str, list[_Entry]]


@attrs.define
class Batch:
    """One micro-batch, already on the run's device.

    ``data`` is what ``forward`` unpacks: a tuple of tensors, or a dict of them. ``weight`` is what
    its mean loss is a mean over (target tokens of a language model, else samples): windows and
    validations weigh by it. ``first`` is the index of its first sample in the order of the data.
    """

    data: Any
    weight: float
    samples: int
    tokens: int
    first: int = 0


class Data(Protocol):
    """A data source. Data for language models also has ``vocab_size`` and ``context_length``."""

    epoch_samples: int | None
    """Samples in one epoch, over all processes; None if the source has no epochs."""
    fingerprint: str
    """Changes exactly if the samples or their order would."""

    def batches(self, progress: Progress) -> Iterator[Batch]:
        """Yield micro-batches without end, from where ``progress`` stands: seek, do not replay."""
        ...

    def validation(self) -> Mapping[str, Iterable[Batch]]:
        """Return the held-out splits by name (``"val"``); the same batches at every call."""
        ...


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...


@attrs.define
class Progress:
    """How far the run is. Everything that follows a schedule is a function of this."""

    step: int = 0
    """Attempted updates."""
    applied: int = 0
    """Updates that changed weights."""
    microbatches: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Training time, over all the processes that continued this run."""
    epoch_samples: int | None = None
    before: tuple[int, int, float] = (0, 0, 0.0)
    """Samples, tokens and seconds as they stood before the last step."""

    @property
    def epoch(self) -> float:
        """Passes over the training data; 0.0 where the source has no epochs."""
        return self.samples / self.epoch_samples if self.epoch_samples else 0.0

    def advance(self, window: list[Batch], applied: bool, seconds: float) -> None:
        """Count one attempted step."""
        self.before = (self.samples, self.tokens, self.seconds)
        self.step += 1
        self.applied += applied
        self.microbatches += len(window)
        for batch in window:
            self.samples += batch.samples
            self.tokens += batch.tokens
        self.seconds += seconds


class Run:
    """One training run. Hooks ask for it as ``run``; ``train`` returns it.

    ``model`` is the canonical module whose state dict is saved; ``module`` is what ``forward``
    calls (compiled, distributed). ``window`` and ``losses`` hold the step's micro-batches and their
    detached losses. ``phase`` is ``"train"`` or the split being validated. ``ending`` is true
    from the moment it is clear that no further step follows.
    """

    data: Data
    tokenizer: Tokenizer | None
    model: nn.Module
    module: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    hook: Hooks

    def __init__(self, settings: RunSettings, plugins: dict[str, object], folder: Path) -> None:
        self.settings = settings
        self.plugins = plugins
        self.folder = folder
        self.device = settings.device
        self.rank = 0
        self.world_size = 1
        self.progress = Progress()
        self.phase = "train"
        self.window: list[Batch] = []
        self.losses: list[Tensor] = []
        self.weight = 1.0
        self.rejected: list[str] = []
        self.base_lrs: list[float] = []
        self.wanted_checkpoint: str | None = None
        self.ending = False
        self.stop_reason: str | None = None
        self.signal: int | None = None
        self.outcome: str | None = None
        self.error: BaseException | None = None
        self.history: list[dict[str, float]] = []
        self._logged: dict[str, list[tuple[Any, float]]] = defaultdict(list)

    def log(self, name: str, value: Tensor | float, weight: float | None = None) -> None:
        """Add to the mean of ``name`` over the log period (in validation: over the split).

        A tensor stays on the device: nothing waits. It must be 0-d and not be changed in place
        later. ``weight`` is by default that of the batch at hand, and 1 between batches.
        """
        if not isinstance(value, float | int):
            value = value.detach()
        weighed = self.weight if weight is None else weight
        self._logged[name].append((value, weighed, self.progress.step))

    def stop(self, reason: str) -> None:
        """Ask for the end: the run stops at the next safe point, validated and saved."""
        self.stop_reason = self.stop_reason or reason

    def report(self, task: str, done: int, total: int | None = None) -> None:
        """Tell whoever shows progress how far a long task is."""
        self.hook.on_progress(run=self, task=task, done=done, total=total)

    def seed_for(self, purpose: str) -> int:
        """Return a 63-bit seed of its own for every purpose, the same at every start."""
        text = f"{self.settings.seed}/{purpose}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1

    def forget_step(self) -> None:
        """Drop what was logged since the last step was counted: the step has been rejected."""
        for entries in self._logged.values():
            while entries and entries[-1][2] == self.progress.step:
                entries.pop()

    def take_logged(self) -> dict[str, float]:
        """Return the weighted means of all that was logged, and begin anew: one device read."""
        means = {name: _mean(e) for name, e in sorted(self._settled().items()) if e}
        self._logged.clear()
        return means

    def swap_logged(self, other: Logged | None = None) -> Logged:
        """Put ``other`` (default: nothing) in place of what was logged so far, and return that."""
        before, self._logged = self._logged, defaultdict(list) if other is None else other
        return before

    def _settled(self) -> Logged:
        """Turn what was logged into plain numbers, which is exact, and keep it that way."""
        import torch

        waiting = [e[0] for entries in self._logged.values() for e in entries]
        numbers = iter(_to_floats([value for value in waiting if torch.is_tensor(value)]))
        for name, entries in self._logged.items():
            self._logged[name] = [
                (next(numbers) if torch.is_tensor(value) else value, weight, step)
                for value, weight, step in entries
            ]
        return self._logged

    def snapshot(self) -> Snapshot:
        """Return everything a resumed run needs, at a safe point: a tree of dicts and lists of
        tensors and JSON values. The tensors are the live ones: copy before the next step.

        ``model``: the state dict. ``optimizer``: parameter name -> its state. ``plugins``:
        instance name -> its state. ``progress``, ``random`` and ``logged``: what they say.
        """
        states = {name: get_state(p) for name, p in self.plugins.items()}
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self._optimizer_state(),
            "plugins": {name: kept for name, kept in states.items() if kept},
            "progress": attrs.asdict(self.progress),
            "random": random_state(),
            "logged": {name: [list(e) for e in entries] for name, entries in self._settled().items()},
        }

    def restore(self, snapshot: Snapshot, *, weights_only: bool = False) -> None:
        """Put a snapshot back; raise ``StorageError`` if it is one of another model.

        The state of a plugin that is no longer listed is left out; a newly listed one starts
        afresh. Learning rates and the like come from the settings, not from the snapshot.
        """
        try:
            self.model.load_state_dict(snapshot["model"])
        except RuntimeError as error:
            raise StorageError(f"the checkpoint is one of another model: {error}") from error
        if weights_only:
            return
        self._restore_optimizer(snapshot["optimizer"])
        for name, kept in snapshot["plugins"].items():
            if name in self.plugins:
                set_state(self.plugins[name], kept)
        counts = dict(snapshot["progress"])
        counts["before"] = tuple(counts["before"])
        self.progress = Progress(**counts | {"epoch_samples": self.progress.epoch_samples})
        self._logged = defaultdict(list)
        for name, rows in snapshot["logged"].items():
            self._logged[name] = [(value, weight, step) for value, weight, step in rows]
        set_random_state(snapshot["random"])

    def _optimizer_state(self) -> dict[str, Any]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {names[id(p)]: dict(kept) for p, kept in self.optimizer.state.items() if kept}

    def _restore_optimizer(self, named: dict[str, Any]) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        packed = self.optimizer.state_dict()
        order = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        packed["state"] = {i: named[name] for i, name in enumerate(order) if name in named}
        self.optimizer.load_state_dict(packed)


def _to_floats(tensors: list[Tensor]) -> list[float]:
    import torch

    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.cpu() for tensor in tensors]
    return cast("list[float]", torch.stack(tensors).tolist()) if tensors else []


def _mean(entries: list[_Entry]) -> float:
    total = math.fsum(weight for _, weight, _ in entries)
    return math.fsum(value * weight for value, weight, _ in entries) / total if total else math.nan
