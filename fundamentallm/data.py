"""What flows through a run: micro-batches from a data source, and the count of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

Cause: TypeAlias = Literal[
    "overflow", "nonfinite_loss", "nonfinite_gradient", "spike", "memory", "other"
]


@attrs.define
class Batch:
    """One micro-batch, already on the run's device.

    ``data`` is what ``forward`` unpacks: a tuple of tensors, or a dict of them. ``weight`` is what
    its mean loss is a mean over (target tokens of a language model, else samples): windows and
    validations weigh by it. ``first`` is the index of its first sample in the order of the data.
    ``samples`` and ``tokens`` count over all processes of a run, ``weight`` in this one. ``total``
    is the weight over all processes, if the source knows it: then they need not ask each other.
    """

    data: Any
    weight: float
    samples: int
    tokens: int
    first: int = 0
    total: float | None = None


class Data(Protocol):
    """A data source. Data for language models also has ``vocab_size`` and ``context_length``.

    In a run of several processes, each reads its part, that of ``run.data_rank`` of
    ``run.data_size``, and all yield equally many micro-batches: one without any sample for this
    process holds some sample and has the weight 0.
    """

    @property
    def epoch_samples(self) -> int | None:
        """Samples in one epoch, over all processes; None if the source has no epochs."""

    @property
    def fingerprint(self) -> str:
        """Changes exactly if the samples or their order would."""

    def batches(self, progress: Progress) -> Iterator[Batch]:
        """Yield micro-batches without end, from where ``progress`` stands: seek, do not replay."""

    def validation(self) -> Mapping[str, Iterable[Batch]]:
        """Return the held-out splits by name (``"val"``); the same batches at every call."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    eos_id: int | None
    """The id of the token that ends a text; None if there is none."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def decode(self, tokens: list[int]) -> str:
        """Return the text of some ids; of ids that are no text by themselves, what can be read."""

    def to_json(self) -> str:
        """Return the text of a ``tokenizer.json`` that the ``tokenizers`` library can read."""


@attrs.frozen
class Loaded:
    """The checkpoint that a run was restored from; a plugin's ``read_checkpoint`` makes it."""

    folder: Path
    step: int
    metrics: dict[str, float]
    """What was measured at its step."""
    digest: str
    """A hash of the whole checkpoint."""


@attrs.frozen
class Rejection:
    """Why a step must not change the weights.

    Other plugins decide by ``cause``: ``"overflow"`` is a gradient that a loss scale made too large
    for fp16, ``"nonfinite_loss"`` and ``"nonfinite_gradient"`` are NaN or infinity, ``"spike"`` is
    a loss far above the usual, ``"memory"`` a batch that did not fit.
    """

    cause: Cause
    text: str


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
    lr: float = 0.0
    """The learning rate of the last update, in the first parameter group."""
    closed: bool = True
    """Whether the last step has the validation and the row that were due; a signal may prevent it,
    and a resumed run then begins with them."""
    epoch_samples: int | None = None
    before: tuple[int, int, float] = (0, 0, 0.0)
    """Samples, tokens and seconds as they stood before the last step."""

    @property
    def logged_step(self) -> int:
        """The last step whose validation and row of metrics, where due, are complete."""
        return self.step - (not self.closed)

    @property
    def epoch(self) -> float:
        """Passes over the training data; 0.0 where the source has no epochs."""
        return self.samples / self.epoch_samples if self.epoch_samples else 0.0

    def advance(self, window: list[Batch], applied: bool, seconds: float) -> None:
        """Count one attempted step."""
        # Periods compare these counts with the new ones, and so need no state of their own.
        self.before = (self.samples, self.tokens, self.seconds)
        self.step += 1
        self.applied += applied
        # Also of a rejected step: its data has been read, and a resumed run continues after it.
        self.microbatches += len(window)
        for batch in window:
            self.samples += batch.samples
            self.tokens += batch.tokens
        self.seconds += seconds
