"""From the settings to the tokens of text: which bytes, which tokenizer, which tokens."""

from __future__ import annotations

from concurrent.futures import Future
from itertools import chain
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

import tokenizers

from fundamentallm import DataError
from fundamentallm_text import files, vocabularies
from fundamentallm_text.pieces import decoded, grouped, pieces
from fundamentallm_text.splits import MAIN_SPLIT, Split, Splits, find_held_out, key_of, padded
from fundamentallm_text.store import stamp_of
from fundamentallm_text.vocabularies import UnknownCharacterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fundamentallm_text import Text
    from fundamentallm_text.files import Extent
    from fundamentallm_text.splits import Report
    from fundamentallm_text.store import Store, Tokens
    from fundamentallm_text.vocabularies import Vocabulary

BPE_SIZE = 4096
T = TypeVar("T")


class TextReader:
    """Reads the text that the settings name; what was done before is taken from the store."""

    def __init__(
        self, settings: Text, store: Store, report: Report, kept: Vocabulary | None = None
    ) -> None:
        self.settings = settings
        self.store = store
        self.report = report
        self.kept = kept
        """The vocabulary to encode with; None for the one that the settings name."""

    def read(self) -> Splits:
        """Return the tokens of every split."""
        train, held_out = self._divide()
        texts = [train, *held_out.values()]
        stamps = {extent.path: stamp_of(extent.path) for text in texts for extent in text}
        digests = {path: self.store.digest(path) for path in stamps}
        contents = [
            [[digests[part.path], part.start, part.stop, part.ends] for part in text]
            for text in texts
        ]
        vocabulary = self.kept or self._vocabulary(texts, contents)
        vocab_size = padded(vocabulary.vocab_size, self.settings.vocab_size)
        first, *others = (
            self._tokenize(text, content, vocabulary)
            for text, content in zip(texts, contents, strict=True)
        )
        for path, stamp in stamps.items():
            if stamp_of(path) != stamp:
                raise DataError(f"{path} was changed while it was read")
        return Splits(first, dict(zip(held_out, others, strict=True)), vocabulary, vocab_size)

    def _divide(self) -> tuple[list[Extent], dict[str, list[Extent]]]:
        """Return the text to train on, and what is held out, by the name of its split."""
        settings = self.settings
        if settings.path is None:
            paths = files.standard_library()
        else:
            paths = files.find(settings.path, "text.path")
        text = files.extents(paths)
        if settings.max_bytes is not None:
            text, _ = files.cut(text, settings.max_bytes)
        end: list[Extent] = []
        if settings.validation_path is None:
            size = sum(part.size for part in text)
            text, end = files.cut(text, int(size * (1 - settings.validation_fraction)))
        found = find_held_out(settings, paths)
        named = {name: files.extents(others) for name, others in found.items()}
        return text, ({MAIN_SPLIT: end} if end else {}) | named

    def _vocabulary(self, texts: list[list[Extent]], contents: list[Any]) -> Vocabulary:
        settings, separator = self.settings, self.settings.separator
        match settings.tokenizer or "char":
            case "byte":
                return vocabularies.Bytes()
            case "char":
                # Held-out text may have characters of its own, and each needs an id.
                key = key_of("alphabet", contents, separator)
                text = list(chain.from_iterable(texts))
                return vocabularies.Characters(self.store.text(key, lambda: self._alphabet(text)))
            case "bpe":
                size = settings.vocab_size or BPE_SIZE
                key = key_of("bpe", contents[0], separator, size, tokenizers.__version__)
                kept = self.store.text(key, lambda: self._learn(texts[0], size).to_json())
                return vocabularies.parse_pairs(kept)
            case path:
                return vocabularies.load_pairs(path)

    def _alphabet(self, text: list[Extent]) -> str:
        groups = self._groups("reading the alphabet", text, vocabularies.Characters.errors)
        return vocabularies.collect_alphabet("".join(group) for group in groups)

    def _learn(self, text: list[Extent], vocab_size: int) -> vocabularies.Pairs:
        separator = self.settings.separator
        groups = self._groups("learning the tokenizer", text, vocabularies.Pairs.errors)

        def learned() -> Iterator[str]:
            for group in groups:
                yield from (piece for piece in group if piece != separator)
            self.report("merging pairs", 0, None)

        size = _size(text, "")
        pairs = beside(lambda: vocabularies.learn_pairs(learned(), size, vocab_size, separator))
        self.report("merging pairs", 1, 1)
        return pairs

    def _tokenize(self, text: list[Extent], content: Any, vocabulary: Vocabulary) -> Split:
        separator = self.settings.separator
        key = key_of("tokens", content, separator, vocabulary.identity)
        dtype = "uint16" if vocabulary.vocab_size <= 1 << 16 else "uint32"
        stored = self.store.tokens(key, dtype, lambda: self._encoded(text, vocabulary))
        return Split(stored.tokens, stored.digest, _size(text, separator))

    def _encoded(self, text: list[Extent], vocabulary: Vocabulary) -> Iterator[Tokens]:
        for group in self._groups("tokenizing", text, vocabulary.errors):
            try:
                yield vocabulary.encode_pieces(group)
            except UnknownCharacterError as error:
                raise DataError(self._told(text, error.character)) from None

    def _told(self, text: list[Extent], unknown: str) -> str:
        """Say where a character is that the vocabulary does not know."""
        files = (e.path for e in text if any(unknown in block for block in decoded(e, "strict")))
        place = next(map(str, files), "text.separator")
        return (
            f"{place}: the character {unknown!r} is none of those that this run was begun with; "
            "put back the text as it was then, or start a new run"
        )

    def _groups(self, task: str, text: list[Extent], errors: str) -> Iterator[list[str]]:
        """Yield the pieces of text in groups, and report how many bytes are done."""
        separator = self.settings.separator
        done, total = 0, _size(text, separator)
        for group in grouped(pieces(text, separator, errors)):
            yield group
            done += sum(len(piece.encode("utf-8", errors)) for piece in group)
            self.report(task, done, total)


def beside(work: Callable[[], T]) -> T:
    """Return what ``work`` returns, done by a thread of its own while this one waits.

    Python handles signals in the main thread, and there only once a call of compiled code is over:
    from here, it handles them at once, and the work can ask whether there was one.
    """
    done: Future[T] = Future()

    def do() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            done.set_exception(error)

    Thread(target=do, name="fundamentallm-text", daemon=True).start()
    return done.result()


def _size(text: Sequence[Extent], separator: str) -> int:
    """Bytes of text, with what is put between files."""
    ends = sum(part.ends for part in text)
    return sum(part.size for part in text) + ends * len(separator.encode())
