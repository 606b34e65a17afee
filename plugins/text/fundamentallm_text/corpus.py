"""The data source of a run: windows of tokens, in an order that is a function of the seed."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING
from weakref import WeakSet

from numpy.lib.stride_tricks import sliding_window_view

from fundamentallm import DataError, SettingsError
from fundamentallm_text.feed import Cut, Part, feed, plan
from fundamentallm_text.kept import Kept, kind_of, read_kept, write_kept
from fundamentallm_text.order import EpochWindows, EvenWindows, RandomWindows, share
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

    ``vocab_size`` ids are what a model must know. ``bytes_per_token`` is the mean number of bytes
    of held-out text that a token stands for (None if unknown): a loss in nats per token is
    ``loss / log(2) / bytes_per_token`` bits per byte.
    """

    def __init__(self, settings: Text, run: Run) -> None:
        reader = TokenReader if settings.reads_tokens else TextReader
        try:
            kept = read_kept(run.folder, settings)
            known = kept.vocabulary if kept else None
            splits = reader(settings, Store(settings.cache_dir), run.report, known).read()
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        self.run = run
        self.settings = settings
        self.context_length = settings.context_length
        self.tokenizer = splits.vocabulary
        self.vocab_size = splits.vocab_size
        self.train = splits.train
        self.held_out = splits.held_out
        self._check_lengths()
        self.order = self._order(len(self.train.tokens))
        self.epoch_samples = self.order.epoch_samples
        identity = self.tokenizer.identity if self.tokenizer else None
        facts = [self.train.digest, identity, repr(self.order)]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self.bytes_per_token = _bytes_per_token(self.held_out)
        self._streams: WeakSet[Iterator[Batch]] = WeakSet()

    def batches(self, progress: Progress) -> Iterator[Batch]:
        """Yield micro-batches without end, from sample ``progress.samples`` on.

        Every process takes its part of each micro-batch. An epoch's last micro-batch goes on into
        the next epoch, so all have one size, and sample ``i`` is the same for every batch size.
        """
        size = self.settings.batch_size
        begin, end = share(size, self.run.rank, self.run.world_size)
        if begin == end:
            raise SettingsError(
                f"text.batch_size: {size} windows cannot be shared by {self.run.world_size} "
                "processes; it counts those of all processes together"
            )
        parts = plan(self.order, Cut(size, begin, end), progress.samples)
        windows = sliding_window_view(self.train.tokens, self.context_length + 1)
        stream = feed(windows, parts, end - begin, self.run.device, self._depth())
        self._streams.add(stream)
        return stream

    def validation(self) -> Mapping[str, HeldOut]:
        """Return the held-out text under ``"val"``, if there is any."""
        return {} if self.held_out is None else {"val": HeldOut(self, self.held_out.tokens)}

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

    def _order(self, tokens: int) -> Order:
        seed = self.run.seed_for("data")
        if self.settings.has_epochs:
            return EpochWindows(tokens, self.context_length, seed)
        return RandomWindows(tokens, self.context_length, seed)

    def _check_lengths(self) -> None:
        length = self.context_length
        more = "more held-out text (text.validation_fraction = 0 for none)"
        for name, split, hint in (
            ("training", self.train, "more text"),
            ("held-out", self.held_out, more),
        ):
            if split is not None and len(split.tokens) <= length:
                raise DataError(
                    f"the {name} text has {len(split.tokens)} tokens; one window of "
                    f"text.context_length = {length} needs {length + 1}: shorten it, or give {hint}"
                )


class HeldOut:
    """The held-out windows as micro-batches: the same ones in every pass, in order."""

    def __init__(self, corpus: Corpus, tokens: Tokens) -> None:
        settings = corpus.settings
        self._corpus = corpus
        self._size = settings.batch_size
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


def _bytes_per_token(held_out: Split | None) -> float | None:
    if held_out is None or held_out.size is None:
        return None
    return held_out.size / len(held_out.tokens)
