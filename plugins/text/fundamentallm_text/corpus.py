"""The data source of a run: windows of tokens in an order that is a function of the seed."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakSet

from numpy.lib.stride_tricks import sliding_window_view

from fundamentallm import DataError, SettingsError
from fundamentallm_text.loader import BatchPart, BatchShape, batch_parts, load_batches
from fundamentallm_text.run_tokenizer import (
    RunTokenizer,
    read_run_tokenizer,
    tokenizer_kind,
    write_run_tokenizer,
)
from fundamentallm_text.sampling import EpochWindows, EvenWindows, RandomWindows, share
from fundamentallm_text.splits import MAIN_SPLIT
from fundamentallm_text.text_reader import TextReader
from fundamentallm_text.token_cache import TokenCache
from fundamentallm_text.token_files import TokenReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fundamentallm import Batch, Progress, Run
    from fundamentallm_text import Text
    from fundamentallm_text.sampling import Sampling
    from fundamentallm_text.splits import Split
    from fundamentallm_text.token_cache import Tokens

AHEAD_ON_CUDA = 2


class Corpus:
    """The core's ``Data`` for tokens.

    ``vocab_size`` is the number of ids that a model must have, ``context_length`` the length of its
    longest window in tokens. The settings ``batch_size`` and ``context_length`` may change during a
    run: ``batches`` uses their values at its call, ``validation`` those at the start of the run.
    """

    def __init__(self, settings: Text, run: Run) -> None:
        reader = TokenReader if settings.reads_tokens else TextReader
        try:
            recorded = read_run_tokenizer(run.folder, settings)
            known = recorded.tokenizer if recorded else None
            cache = TokenCache(settings.cache_dir)
            splits = reader(settings, cache, partial(_report, run), known).read()
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        self.run = run
        self.settings = settings
        self.context_length = settings.context_length
        self.validation_size = settings.batch_size
        self.tokenizer = splits.tokenizer
        self.vocab_size = splits.vocab_size
        self.train = splits.train
        self.held_out = splits.held_out
        self._check_lengths()
        self.sampling = self._sampling(self.context_length)
        self.epoch_samples = self.sampling.epoch_samples
        identity = self.tokenizer.identity if self.tokenizer else None
        facts = [self.train.digest, identity, repr(self.sampling)]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._streams: WeakSet[Iterator[Batch]] = WeakSet()

    def batches(self, progress: Progress) -> Iterator[Batch]:
        """Yield micro-batches without end, from sample ``progress.samples`` on.

        Every process reads its part of each micro-batch. The last micro-batch of an epoch continues
        into the next one, so all have the same size. Sample ``i`` is the same for every batch size.
        """
        size, length = self.settings.batch_size, self.settings.context_length
        begin, end = share(size, self.run.data_rank, self.run.data_size)
        if begin == end:
            raise SettingsError(
                f"text.batch_size: {size} windows are too few for {self.run.data_size} "
                "processes; it is the total of all processes"
            )
        same = length == self.context_length
        sampling = self.sampling if same else self._sampling_of_other(length)
        parts = batch_parts(sampling, BatchShape(size, begin, end), progress.samples)
        windows = sliding_window_view(self.train.tokens, length + 1)
        stream = load_batches(windows, parts, end - begin, self.run.device, self._depth())
        self._streams.add(stream)
        return stream

    def validation(self) -> Mapping[str, ValidationBatches]:
        """Return the held-out splits by name: "val" and those of ``validation_splits``."""
        return {
            name: ValidationBatches(self, split.tokens) for name, split in self.held_out.items()
        }

    def bytes_per_token(self, split: str) -> float | None:
        """Return the mean number of bytes of text per token of a held-out split; None if unknown.

        A loss in nats per token is ``loss / log(2) / bytes_per_token`` bits per byte.
        """
        found = self.held_out.get(split)
        return found.size / len(found.tokens) if found and found.size is not None else None

    def record_tokenizer(self) -> None:
        """Write the tokenizer into the run folder, for later starts and for loading the run."""
        kind = tokenizer_kind(self.settings)
        if kind is not None and self.tokenizer is not None:
            recorded = RunTokenizer(kind, self.tokenizer, self.vocab_size)
            write_run_tokenizer(self.run.folder, recorded)

    def close(self) -> None:
        """End the threads that prepare batches."""
        for stream in list(self._streams):
            stream.close()  # type: ignore[attr-defined]

    def _depth(self) -> int:
        if self.settings.prefetch is not None:
            return self.settings.prefetch
        # On the CPU a batch takes microseconds, and a thread would take them from the training.
        return AHEAD_ON_CUDA if self.run.device.startswith("cuda") else 0

    def _sampling(self, length: int) -> Sampling:
        seed, tokens = self.run.seed_for("data"), len(self.train.tokens)
        if self.settings.has_epochs:
            return EpochWindows(tokens, length, seed)
        return RandomWindows(tokens, length, seed)

    def _sampling_of_other(self, length: int) -> Sampling:
        """Return the order of windows of another length than at the start of the run."""
        if self.settings.has_epochs:
            raise SettingsError(
                f"text.context_length: cannot change from {self.context_length} to {length} during "
                'a run with sampling = "epochs", where all samples have one length; use '
                'sampling = "random"'
            )
        model = getattr(self.run, "model", None)
        longest = getattr(model, "context_length", self.context_length)
        if not 1 <= length <= longest:
            raise SettingsError(
                f"text.context_length: cannot change to {length} during the run: the model was "
                f"built for windows of 1 to {longest} tokens"
            )
        _check_length("training", self.train, length, "more text")
        return self._sampling(length)

    def _check_lengths(self) -> None:
        _check_length("training", self.train, self.context_length, "more text")
        for name, split in self.held_out.items():
            more = f"more text to validation_splits.{name}"
            if name == MAIN_SPLIT:
                more = "more held-out text (text.validation_fraction = 0 for none)"
            what = "held-out" if name == MAIN_SPLIT else f"held-out {name!r}"
            _check_length(what, split, self.context_length, more)


class ValidationBatches:
    """The held-out windows of a split as micro-batches, the same in every validation."""

    def __init__(self, corpus: Corpus, tokens: Tokens) -> None:
        settings = corpus.settings
        self._corpus = corpus
        self._size = corpus.validation_size
        wanted = settings.validation_batches
        self._sampling = EvenWindows(
            len(tokens), corpus.context_length, None if wanted is None else wanted * self._size
        )
        self._windows = sliding_window_view(tokens, corpus.context_length + 1)

    def __len__(self) -> int:
        return sum(1 for _ in self._shares())

    def __iter__(self) -> Iterator[Batch]:
        parts = (
            BatchPart(first, self._sampling.starts(first, count), size, has_weight)
            for first, count, size, has_weight in self._shares()
        )
        return load_batches(self._windows, parts, self._size, self._corpus.run.device, 0)

    def _shares(self) -> Iterator[tuple[int, int, int, bool]]:
        """Yield this process's first sample and count in each micro-batch, the samples of all
        processes, and whether any are this one's: if not, it reads one without weight."""
        run, samples = self._corpus.run, self._sampling.epoch_samples
        for first in range(0, samples, self._size):
            size = min(self._size, samples - first)
            begin, end = share(size, run.data_rank, run.data_size)
            shift = begin if begin < end else 0
            yield first + shift, max(end - begin, 1), size, begin < end


def _check_length(name: str, split: Split, length: int, hint: str) -> None:
    if len(split.tokens) <= length:
        raise DataError(
            f"the {name} text has {len(split.tokens)} tokens; one window of "
            f"text.context_length = {length} needs {length + 1}: reduce it, or give {hint}"
        )


def _report(run: Run, task: str, done: int, total: int | None) -> None:
    """Report the progress of a task, and end it if a signal asked for the end of the run."""
    run.report(task, done, total)
    if run.signal is not None:
        # There is no safe point before the first step. The next start does the task again.
        raise KeyboardInterrupt
