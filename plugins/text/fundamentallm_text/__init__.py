"""Read text files or token files as batches of tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import field, ge, gt, hookimpl, le, lt, optional, plugin, suggest

if TYPE_CHECKING:
    from attrs import Attribute

    from fundamentallm import Data, Run

TOKEN_FILES = (".npy", ".bin")
TOKENIZERS = ("char", "byte", "bpe")
LARGEST = 10**9
# Other metrics begin with these names.
SECTIONS = ("best", "data", "optim", "perf", "system", "train")


def _check_tokenizer(_: object, attribute: Attribute[Any], value: object) -> None:
    # The host has converted any other word to a path.
    if isinstance(value, Path) and value.suffix != ".json":
        raise ValueError(
            f'\'{attribute.name}\' must be "char", "byte", "bpe" or the path of a '
            f'tokenizer.json, not "{value}"{suggest(str(value), TOKENIZERS)}'
        )


def _check_splits(_: object, __: object, value: dict[str, Path | list[Path]]) -> None:
    for name in value:
        if name == "val":
            raise ValueError('the split "val" is the one of validation_path; use another name')
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in SECTIONS:
            raise ValueError(
                f'"{name}" cannot name a split: metrics begin with the name, so it must consist of '
                f"lower-case letters, digits and _, and be none of {', '.join(SECTIONS)}"
            )


@plugin
class Text:
    """Read text as windows of tokens: inputs, and as targets the inputs shifted by one token."""

    role = "data"

    path: Path | list[Path] | None = None
    """Text files or token files (.npy, .bin): one, several, or a pattern such as "data/*.txt". By
    default ``source`` is read."""
    source: Literal["python-stdlib"] = "python-stdlib"
    """The text to read without a ``path``: "python-stdlib" is the .py files of the running Python's
    standard library."""
    validation_path: Path | list[Path] | None = None
    """Files for validation. By default ``validation_fraction`` of the text is held out."""
    validation_fraction: float = field(default=0.1, validator=[ge(0), lt(1)])
    """The fraction at the end of the text that is held out for validation; 0 for none."""
    validation_splits: dict[str, Path | list[Path]] = field(factory=dict, validator=_check_splits)
    """Additional validation splits, each a name and its files: `code = "code.py"` adds the metric
    ``code/loss``. The two settings above define the split ``val``."""
    max_bytes: int | None = field(default=None, validator=optional(gt(0)))
    """Read only this many bytes from the start of the text, including the held-out part."""
    separator: str = ""
    """Text that is added after every file, such as "<|endoftext|>". A learned tokenizer has one
    token for it."""
    tokenizer: Literal["char", "byte", "bpe"] | Path | None = field(
        default=None, validator=_check_tokenizer
    )
    """How text is encoded: "char" (the default), "byte", "bpe" (learned from the training text), or
    the path of a tokenizer.json."""
    vocab_size: int | None = field(default=None, validator=optional([gt(0), le(LARGEST)]))
    """The number of ids that the model has. With "bpe" this many are learned (default 4096);
    otherwise it is the tokenizer's number, or more, to round it up. Required for token files
    without a tokenizer.json."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """The type of the ids in .bin files, little-endian."""
    context_length: int = field(default=256, validator=[ge(1), le(LARGEST)])
    """Tokens in a window, the longest context of the model."""
    batch_size: int = field(default=16, validator=[ge(1), le(LARGEST)])
    """Windows in a micro-batch, in total over all processes."""
    sampling: Literal["random", "epochs"] = "random"
    """The order of the windows. "random" draws windows at any position, with replacement; "epochs"
    reads each of the adjacent windows once per epoch, in a different order every time."""
    validation_batches: int | None = field(default=None, validator=optional([ge(1), le(LARGEST)]))
    """Micro-batches in a validation, evenly spaced in the held-out text. By default all of it."""
    prefetch: int | None = field(default=None, validator=optional([ge(0), le(LARGEST)]))
    """Micro-batches that a thread prepares ahead; 0 for no thread. By default 2 on CUDA, else 0."""
    cache_dir: Path | None = None
    """The folder of cached tokens. By default fundamentallm/text in the user's cache folder."""

    # Settings that may change during a run; all others are read at its start.
    changeable = ("batch_size", "context_length")
    # Settings that may differ when a run is resumed: where the text is, if its fingerprint is the
    # same, and how it is read.
    free = ("path", "source", "validation_path", "prefetch", "cache_dir")

    _corpus: Any = field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        held_out = [self.validation_path, *self.validation_splits.values()]
        files = [path for paths in (self.path, *held_out) for path in _listed(paths)]
        if self.reads_tokens:
            self._check_tokens(files)
        elif any(path.suffix in TOKEN_FILES for path in files):
            raise ValueError("path: text files and token files cannot be mixed")
        smallest = 256 + bool(self.separator)
        if self.tokenizer == "bpe" and self.vocab_size is not None and self.vocab_size < smallest:
            raise ValueError(f"vocab_size: a learned tokenizer has at least {smallest} tokens")

    def _check_tokens(self, files: list[Path]) -> None:
        if any(path.suffix not in TOKEN_FILES for path in files):
            raise ValueError("path: text files and token files cannot be mixed")
        if self.tokenizer in TOKENIZERS:
            raise ValueError(
                "tokenizer: token files contain ids already; name their tokenizer.json"
            )
        if self.tokenizer is None and self.vocab_size is None:
            raise ValueError(
                "vocab_size: is required for token files, or a tokenizer.json as tokenizer"
            )
        for name in ("separator", "max_bytes"):
            if getattr(self, name):
                raise ValueError(f"{name}: works with text files only, not with token files")

    @property
    def reads_tokens(self) -> bool:
        """Whether ``path`` names token files."""
        return any(path.suffix in TOKEN_FILES for path in _listed(self.path)[:1])

    @property
    def produces(self) -> tuple[str, ...]:
        """The losses of the additional validation splits."""
        return tuple(f"{name}/loss" for name in self.validation_splits)

    @property
    def has_epochs(self) -> bool:
        """Whether the data has epochs, so that periods may be in epochs."""
        return self.sampling == "epochs"

    @hookimpl
    def build_data(self, run: Run) -> Data:
        """Read, encode and cache the text. A loaded run uses the tokenizer in its folder."""
        from fundamentallm_text.corpus import Corpus
        from fundamentallm_text.recorded import recorded_corpus

        recorded = None if run.training else recorded_corpus(self, run)
        self._corpus = recorded or Corpus(self, run)
        data: Data = self._corpus
        return data

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Write the tokenizer into the run folder."""
        # Not earlier: a start that fails before training must not determine the next one.
        if run.rank == 0:
            self._corpus.record_tokenizer()

    @hookimpl
    def on_train_end(self) -> None:
        """End the threads that prepare batches."""
        if self._corpus is not None:
            self._corpus.close()


def _listed(paths: Path | list[Path] | None) -> list[Path]:
    return paths if isinstance(paths, list) else [paths] if paths is not None else []
