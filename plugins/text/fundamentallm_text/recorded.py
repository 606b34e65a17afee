"""The data of a loaded run: what its folder records, and the text only if it is asked for."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from fundamentallm_text.corpus import Corpus
from fundamentallm_text.run_tokenizer import read_run_tokenizer, tokenizer_kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fundamentallm import Batch, Progress, Run
    from fundamentallm_text import Text
    from fundamentallm_text.corpus import ValidationBatches
    from fundamentallm_text.tokenizers import TextTokenizer


def recorded_corpus(settings: Text, run: Run) -> RecordedCorpus | None:
    """Return the data of a run that is loaded from its folder; None if the text must be read.

    The text must be read if the run never started training, so that its folder has no tokenizer.
    """
    recorded = read_run_tokenizer(run.folder, settings)
    if recorded is not None:
        return RecordedCorpus(settings, run, recorded.tokenizer, recorded.vocab_size)
    if tokenizer_kind(settings) is None and settings.vocab_size is not None:
        # Token files without a tokenizer: the settings say everything that a model needs.
        return RecordedCorpus(settings, run, None, settings.vocab_size)
    return None


class RecordedCorpus:
    """The core's ``Data`` of a loaded run, which works without the text as long as none is needed.

    ``batches``, ``validation``, ``fingerprint`` and ``bytes_per_token`` read the text at their
    first use, and raise ``DataError`` if it is missing.
    """

    epoch_samples: int | None = None
    """None, since the number of samples is unknown until the text is read."""

    def __init__(
        self, settings: Text, run: Run, tokenizer: TextTokenizer | None, vocab_size: int
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.context_length = settings.context_length
        self._settings = settings
        self._run = run

    @cached_property
    def corpus(self) -> Corpus:
        """The text, read at the first use."""
        return Corpus(self._settings, self._run)

    @property
    def fingerprint(self) -> str:
        """Changes exactly if the samples or their order would."""
        return self.corpus.fingerprint

    def batches(self, progress: Progress) -> Iterator[Batch]:
        """Yield micro-batches; see ``Corpus.batches``."""
        return self.corpus.batches(progress)

    def validation(self) -> Mapping[str, ValidationBatches]:
        """Return the held-out splits by name; see ``Corpus.validation``."""
        return self.corpus.validation()

    def bytes_per_token(self, split: str) -> float | None:
        """Return the bytes of text per token; see ``Corpus.bytes_per_token``."""
        return self.corpus.bytes_per_token(split)

    def close(self) -> None:
        """End the threads that prepare batches, if the text was read."""
        if "corpus" in vars(self):
            self.corpus.close()
