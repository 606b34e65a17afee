"""The data source of a run: windows of tokens, in an order that is a function of the seed."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakSet

from numpy.lib.stride_tricks import sliding_window_view

from fundamentallm import DataError, SettingsError
from fundamentallm_text.feed import Cut, Part, feed, plan
from fundamentallm_text.kept import Kept, kind_of, read_kept, write_kept
from fundamentallm_text.order import EpochWindows, EvenWindows, RandomWindows, share
from fundamentallm_text.splits import MAIN_SPLIT
from fundamentallm_text.store import Store
from fundamentallm_text.textreader import TextReader
from fundamentallm_text.tokenfiles import TokenReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fundamentallm import Batch, Progress, Run
    from fundamentallm_text import Text
    from fundamentallm_text.order import Order
    from fundamentallm_text.splits import Split
    from fundamentallm_text.store import Tokens

AHEAD_ON_CUDA = 2


class Corpus:
    """Tokens as micro-batches. ``batches`` and ``validation`` are what the loop asks for.

    ``vocab_size`` ids are what a model must know, ``context_length`` are the tokens of its longest
    window. The settings' ``batch_size`` and ``context_length`` may change during a run: ``batches``
    goes by what they are when it is called, ``validation`` by what they were at the start.
    """

    def __init__(self, settings: Text, run: Run) -> None:
        reader = TokenReader if settings.reads_tokens else TextReader
        try:
            kept = read_kept(run.folder, settings)
            known = kept.vocabulary if kept else None
            store = Store(settings.cache_dir)
            splits = reader(settings, store, partial(_report, run), known).read()
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        self.run = run
        self.settings = settings
        self.context_length = settings.context_length
        self.validation_size = settings.batch_size
        self.tokenizer = splits.vocabulary
        self.vocab_size = splits.vocab_size
        self.train = splits.train
        self.held_out = splits.held_out
        self._check_lengths()
        self.order = self._order(self.context_length)
        self.epoch_samples = self.order.epoch_samples
        identity = self.tokenizer.identity if self.tokenizer else None
        facts = [self.train.digest, identity, repr(self.order)]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._streams: WeakSet[Iterator[Batch]] = WeakSet()

    def batches(self, progress: Progress) -> Iterator[Batch]:
        """Yield micro-batches without end, from sample ``progress.samples`` on.

        Every process takes its part of each micro-batch. An epoch's last micro-batch goes on into
        the next epoch, so all have one size, and sample ``i`` is the same for every batch size.
        """
        size, length = self.settings.batch_size, self.settings.context_length
        begin, end = share(size, self.run.rank, self.run.world_size)
        if begin == end:
            raise SettingsError(
                f"text.batch_size: {size} windows cannot be shared by {self.run.world_size} "
                "processes; it counts those of all processes together"
            )
        order = self.order if length == self.context_length else self._order_of_other(length)
        parts = plan(order, Cut(size, begin, end), progress.samples)
        windows = sliding_window_view(self.train.tokens, length + 1)
        stream = feed(windows, parts, end - begin, self.run.device, self._depth())
        self._streams.add(stream)
        return stream

    def validation(self) -> Mapping[str, HeldOut]:
        """Return the held-out splits by name: "val" and those of ``validation_splits``."""
        return {name: HeldOut(self, split.tokens) for name, split in self.held_out.items()}

    def bytes_per_token(self, split: str) -> float | None:
        """Return how many bytes of text a token of a held-out split stands for, in the mean over
        the whole split; None if unknown. A loss in nats per token is
        ``loss / log(2) / bytes_per_token`` bits per byte.
        """
        found = self.held_out.get(split)
        return found.size / len(found.tokens) if found and found.size is not None else None

    def keep_tokenizer(self) -> None:
        """Write the tokenizer into the run folder, for all later starts of this run."""
        kind = kind_of(self.settings)
        if kind is not None and self.tokenizer is not None:
            write_kept(self.run.folder, Kept(kind, self.tokenizer, self.vocab_size))

    def close(self) -> None:
        """End the thread that prepares batches, if there is one."""
        for stream in list(self._streams):
            stream.close()  # type: ignore[attr-defined]

    def _depth(self) -> int:
        if self.settings.prefetch is not None:
            return self.settings.prefetch
        # On the CPU a batch takes microseconds, and a thread would only take them elsewhere.
        return AHEAD_ON_CUDA if self.run.device.startswith("cuda") else 0

    def _order(self, length: int) -> Order:
        seed, tokens = self.run.seed_for("data"), len(self.train.tokens)
        if self.settings.has_epochs:
            return EpochWindows(tokens, length, seed)
        return RandomWindows(tokens, length, seed)

    def _order_of_other(self, length: int) -> Order:
        """Return the order of windows that are not as long as those that the run began with."""
        if self.settings.has_epochs:
            raise SettingsError(
                f"text.context_length: cannot go from {self.context_length} to {length} during a "
                'run with sampling = "epochs", where a sample is a window of one length; '
                'take sampling = "random"'
            )
        model = getattr(self.run, "model", None)
        longest = getattr(model, "context_length", self.context_length)
        if not 1 <= length <= longest:
            raise SettingsError(
                f"text.context_length: cannot become {length} during the run: the model was built "
                f"for windows of 1 to {longest} tokens"
            )
        _check_length("training", self.train, length, "more text")
        return self._order(length)

    def _check_lengths(self) -> None:
        _check_length("training", self.train, self.context_length, "more text")
        for name, split in self.held_out.items():
            more = f"more text to validation_splits.{name}"
            if name == MAIN_SPLIT:
                more = "more held-out text (text.validation_fraction = 0 for none)"
            what = "held-out" if name == MAIN_SPLIT else f"held-out {name!r}"
            _check_length(what, split, self.context_length, more)


class HeldOut:
    """The held-out windows as micro-batches: the same ones in every pass, in order."""

    def __init__(self, corpus: Corpus, tokens: Tokens) -> None:
        settings = corpus.settings
        self._corpus = corpus
        self._size = corpus.validation_size
        wanted = settings.validation_batches
        self._order = EvenWindows(
            len(tokens), corpus.context_length, None if wanted is None else wanted * self._size
        )
        self._windows = sliding_window_view(tokens, corpus.context_length + 1)

    def __len__(self) -> int:
        return sum(begin < end for _, _, begin, end in self._shares())

    def __iter__(self) -> Iterator[Batch]:
        parts = (
            Part(first + begin, self._order.starts(first + begin, end - begin), size)
            for first, size, begin, end in self._shares()
            if begin < end
        )
        return feed(self._windows, parts, self._size, self._corpus.run.device, 0)

    def _shares(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield of each micro-batch its first sample, its size, and this process's part of it."""
        run, samples = self._corpus.run, self._order.epoch_samples
        for first in range(0, samples, self._size):
            size = min(self._size, samples - first)
            yield first, size, *share(size, run.rank, run.world_size)


def _check_length(name: str, split: Split, length: int, hint: str) -> None:
    if len(split.tokens) <= length:
        raise DataError(
            f"the {name} text has {len(split.tokens)} tokens; one window of "
            f"text.context_length = {length} needs {length + 1}: shorten it, or give {hint}"
        )


def _report(run: Run, task: str, done: int, total: int | None) -> None:
    """Tell how far a task is, and end it if a signal has asked for the end of the run."""
    run.report(task, done, total)
    if run.signal is not None:
        # There is no safe point before the first step; what is half done is made anew next time.
        raise KeyboardInterrupt
