"""Read text files: choose the tokenizer, and encode the text of every split."""

from __future__ import annotations

from concurrent.futures import Future
from itertools import chain
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from tokenizers import __version__ as library_version

from fundamentallm import DataError
from fundamentallm_text import files
from fundamentallm_text.chunking import chunks, decode_file, group_chunks
from fundamentallm_text.splits import (
    MAIN_SPLIT,
    CorpusReader,
    Split,
    Splits,
    cache_key,
    find_held_out,
    padded_vocab_size,
)
from fundamentallm_text.token_cache import file_stamp
from fundamentallm_text.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    LibraryTokenizer,
    UnknownCharacterError,
    collect_alphabet,
    learn_bpe,
    load_tokenizer,
    parse_tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fundamentallm_text.files import FileRange
    from fundamentallm_text.token_cache import Tokens
    from fundamentallm_text.tokenizers import TextTokenizer

BPE_SIZE = 4096
T = TypeVar("T")


class TextReader(CorpusReader):
    """Reads the text that the settings name, and caches tokenizers and tokens."""

    def read(self) -> Splits:
        """Return the tokens of every split."""
        train, held_out = self._divide()
        texts = [train, *held_out.values()]
        stamps = {extent.path: file_stamp(extent.path) for text in texts for extent in text}
        digests = {path: self.cache.digest(path) for path in stamps}
        contents = [
            [[digests[part.path], part.start, part.stop, part.ends] for part in text]
            for text in texts
        ]
        tokenizer = self.tokenizer or self._make_tokenizer(texts, contents)
        vocab_size = padded_vocab_size(tokenizer.vocab_size, self.settings.vocab_size)
        first, *others = (
            self._tokenize(text, content, tokenizer)
            for text, content in zip(texts, contents, strict=True)
        )
        for path, stamp in stamps.items():
            if file_stamp(path) != stamp:
                raise DataError(f"{path} changed while it was read")
        return Splits(first, dict(zip(held_out, others, strict=True)), tokenizer, vocab_size)

    def _divide(self) -> tuple[list[FileRange], dict[str, list[FileRange]]]:
        """Return the training text, and the held-out texts by the name of their split."""
        settings = self.settings
        if settings.path is None:
            paths = files.standard_library()
        else:
            paths = files.find(settings.path, "text.path")
        text = files.whole_files(paths)
        if settings.max_bytes is not None:
            text, _ = files.split_files(text, settings.max_bytes)
        end: list[FileRange] = []
        if settings.validation_path is None:
            size = sum(part.size for part in text)
            text, end = files.split_files(text, int(size * (1 - settings.validation_fraction)))
        found = find_held_out(settings, paths)
        named = {name: files.whole_files(others) for name, others in found.items()}
        return text, ({MAIN_SPLIT: end} if end else {}) | named

    def _make_tokenizer(self, texts: list[list[FileRange]], contents: list[Any]) -> TextTokenizer:
        settings, separator = self.settings, self.settings.separator
        match settings.tokenizer or "char":
            case "byte":
                return ByteTokenizer(separator)
            case "char":
                # Held-out text may have other characters, and each needs an id.
                key = cache_key("alphabet", contents, separator)
                text = list(chain.from_iterable(texts))
                alphabet = self.cache.text(key, lambda: self._alphabet(text))
                return CharTokenizer(alphabet, separator)
            case "bpe":
                size = settings.vocab_size or BPE_SIZE
                key = cache_key("bpe", contents[0], separator, size, library_version)
                learned = self.cache.text(key, lambda: self._learn(texts[0], size).to_json())
                return parse_tokenizer(learned, separator)
            case path:
                return load_tokenizer(path, separator)

    def _alphabet(self, text: list[FileRange]) -> str:
        groups = self._groups("reading the alphabet", text, CharTokenizer.errors)
        return collect_alphabet("".join(group) for group in groups)

    def _learn(self, text: list[FileRange], vocab_size: int) -> LibraryTokenizer:
        separator = self.settings.separator
        groups = self._groups("learning the tokenizer", text, LibraryTokenizer.errors)

        def learned() -> Iterator[str]:
            for group in groups:
                yield from (chunk for chunk in group if chunk != separator)
            self.report("merging pairs", 0, None)

        size = _size(text, "")
        learned_bpe = in_thread(lambda: learn_bpe(learned(), size, vocab_size, separator))
        self.report("merging pairs", 1, 1)
        return learned_bpe

    def _tokenize(self, text: list[FileRange], content: Any, tokenizer: TextTokenizer) -> Split:
        separator = self.settings.separator
        key = cache_key("tokens", content, separator, tokenizer.identity)
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        stored = self.cache.tokens(key, dtype, lambda: self._encode(text, tokenizer))
        return Split(stored.tokens, stored.digest, _size(text, separator))

    def _encode(self, text: list[FileRange], tokenizer: TextTokenizer) -> Iterator[Tokens]:
        for group in self._groups("tokenizing", text, tokenizer.errors):
            try:
                yield tokenizer.encode_chunks(group)
            except UnknownCharacterError as error:
                raise DataError(self._describe_unknown(text, error.character)) from None

    def _describe_unknown(self, text: list[FileRange], unknown: str) -> str:
        """Return an error with the file that contains an unknown character."""
        found = (
            e.path for e in text if any(unknown in block for block in decode_file(e, "strict"))
        )
        place = next(map(str, found), "text.separator")
        return (
            f"{place}: the character {unknown!r} is not in the alphabet that this run was started "
            "with; restore the text, or start a new run"
        )

    def _groups(self, task: str, text: list[FileRange], errors: str) -> Iterator[list[str]]:
        """Yield the chunks of text in groups, and report how many bytes are done."""
        separator = self.settings.separator
        done, total = 0, _size(text, separator)
        for group in group_chunks(chunks(text, separator, errors)):
            yield group
            done += sum(len(chunk.encode("utf-8", errors)) for chunk in group)
            self.report(task, done, total)


def in_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread, and return its result.

    Python handles signals in the main thread between its own instructions, so not during a long
    call of compiled code. While the main thread only waits here, signals are handled at once, and
    the work can check for them.
    """
    done: Future[T] = Future()

    def do() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised in the waiting thread
            done.set_exception(error)

    Thread(target=do, name="fundamentallm-text", daemon=True).start()
    return done.result()


def _size(text: Sequence[FileRange], separator: str) -> int:
    """Return the bytes of text, separators included."""
    ends = sum(part.ends for part in text)
    return sum(part.size for part in text) + ends * len(separator.encode())
