"""Text files, or token files made by others, as batches of tokens."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import field, ge, gt, hookimpl, le, lt, optional, plugin

if TYPE_CHECKING:
    from attrs import Attribute

    from fundamentallm import Data, Run

TOKEN_FILES = (".npy", ".bin")
TOKENIZERS = ("char", "byte", "bpe")
LARGEST = 10**9
# What the names of other metrics begin with.
SECTIONS = ("best", "data", "optim", "perf", "system", "train")


def _check_tokenizer(_: object, attribute: Attribute[Any], value: object) -> None:
    # Whatever is none of the words has become a path.
    if isinstance(value, Path) and value.suffix != ".json":
        close = get_close_matches(str(value), TOKENIZERS, n=1)
        meant = f' (did you mean "{close[0]}"?)' if close else ""
        raise ValueError(
            f'\'{attribute.name}\' must be "char", "byte", "bpe" or the path of a '
            f'tokenizer.json: "{value}"{meant}'
        )


def _check_splits(_: object, __: object, value: dict[str, Path | list[Path]]) -> None:
    for name in value:
        if name == "val":
            raise ValueError('the split "val" is what validation_path names')
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in SECTIONS:
            raise ValueError(
                f'"{name}" cannot name a split: its metrics begin with it, so it is of lower-case '
                f"letters, digits and _, and none of {', '.join(SECTIONS)}"
            )


@plugin
class Text:
    """Read a corpus as windows of tokens: inputs, and as targets the same one token further on."""

    role = "data"

    path: Path | list[Path] | None = None
    """Text files, or token files (.npy, .bin): one, several, or a pattern such as "data/*.txt".
    Without it, ``source`` is read."""
    source: Literal["python-stdlib"] = "python-stdlib"
    """What to read where ``path`` is not given: "python-stdlib" is the .py files of the running
    Python's standard library."""
    validation_path: Path | list[Path] | None = None
    """Files to hold out for validation; without it, ``validation_fraction`` is held out."""
    validation_fraction: float = field(default=0.1, validator=[ge(0), lt(1)])
    """How much of the end of the text to hold out; 0 for none of it."""
    validation_splits: dict[str, Path | list[Path]] = field(factory=dict, validator=_check_splits)
    """More splits to validate on, each a name and its files: `code = "code.py"` is validated as
    ``code/loss``, beside the ``val/loss`` of the two settings above."""
    max_bytes: int | None = field(default=None, validator=optional(gt(0)))
    """Read only the first so many bytes of the text, the held-out part included."""
    separator: str = ""
    """Text that is put after every file, such as "<|endoftext|>"; one token of its own in a
    tokenizer that is learned."""
    tokenizer: Literal["char", "byte", "bpe"] | Path | None = field(
        default=None, validator=_check_tokenizer
    )
    """How text becomes tokens: "char" (the default), "byte", "bpe" (learned from the training
    text), or the path of a tokenizer.json."""
    vocab_size: int | None = field(default=None, validator=optional([gt(0), le(LARGEST)]))
    """Ids a model must know. With "bpe" so many are learned (default 4096); otherwise those of the
    tokenizer, or more, to round up. Token files need it, or a tokenizer.json."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """The type of the tokens in .bin files, little-endian."""
    context_length: int = field(default=256, validator=[ge(1), le(LARGEST)])
    """Tokens in a window: how far the model can look back."""
    batch_size: int = field(default=16, validator=[ge(1), le(LARGEST)])
    """Windows in a micro-batch, over all processes together."""
    sampling: Literal["random", "epochs"] = "random"
    """Order of the windows. "random": any window, with replacement; "epochs": each of those that
    lie side by side once, in another order in every epoch."""
    validation_batches: int | None = field(default=None, validator=optional([ge(1), le(LARGEST)]))
    """Micro-batches in a validation, spread over the held-out text; all of it by default."""
    prefetch: int | None = field(default=None, validator=optional([ge(0), le(LARGEST)]))
    """Micro-batches that a thread prepares ahead; 0: no thread. By default 2 with CUDA, else 0."""
    cache_dir: Path | None = None
    """Where tokens are kept for the next run; by default fundamentallm/text in the user's cache."""

    # What may be set anew while a run goes on; all else is read at its start.
    changeable = ("batch_size", "context_length")
    # What may be another when a run is resumed: where the text is, as long as its fingerprint is
    # the same, and how it is read.
    free = ("path", "source", "validation_path", "prefetch", "cache_dir")

    _corpus: Any = field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        held_out = [self.validation_path, *self.validation_splits.values()]
        files = [path for paths in (self.path, *held_out) for path in _listed(paths)]
        if self.reads_tokens:
            self._check_tokens(files)
        elif any(path.suffix in TOKEN_FILES for path in files):
            raise ValueError("path: text files and token files cannot be read as one")
        smallest = 256 + bool(self.separator)
        if self.tokenizer == "bpe" and self.vocab_size is not None and self.vocab_size < smallest:
            raise ValueError(f"vocab_size: a learned tokenizer has at least {smallest} tokens")

    def _check_tokens(self, files: list[Path]) -> None:
        if any(path.suffix not in TOKEN_FILES for path in files):
            raise ValueError("path: text files and token files cannot be read as one")
        if self.tokenizer in TOKENIZERS:
            raise ValueError("tokenizer: token files are tokens already; name their tokenizer.json")
        if self.tokenizer is None and self.vocab_size is None:
            raise ValueError("vocab_size: token files need it, or a tokenizer.json as tokenizer")
        for name in ("separator", "max_bytes"):
            if getattr(self, name):
                raise ValueError(f"{name}: is for text, not for token files")

    @property
    def reads_tokens(self) -> bool:
        """Whether ``path`` names token files."""
        return any(path.suffix in TOKEN_FILES for path in _listed(self.path)[:1])

    @property
    def produces(self) -> tuple[str, ...]:
        """The losses of the splits that have a name of their own."""
        return tuple(f"{name}/loss" for name in self.validation_splits)

    @property
    def has_epochs(self) -> bool:
        """Whether a period in epochs means anything."""
        return self.sampling == "epochs"

    @hookimpl
    def build_data(self, run: Run) -> Data:
        from fundamentallm_text.corpus import Corpus

        self._corpus = corpus = Corpus(self, run)
        return corpus

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Keep the tokenizer in the run folder."""
        # Not earlier: a start that fails before any training must not bind the next one.
        if run.rank == 0:
            self._corpus.keep_tokenizer()

    @hookimpl
    def on_train_end(self) -> None:
        if self._corpus is not None:
            self._corpus.close()


def _listed(paths: Path | list[Path] | None) -> list[Path]:
    return paths if isinstance(paths, list) else [paths] if paths is not None else []
