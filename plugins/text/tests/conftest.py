"""A model for text that is small enough for any test, and corpora made of a string."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from fundamentallm import Run, hookimpl, plugin
from fundamentallm.testing import TinyRun
from fundamentallm_text import Text
from fundamentallm_text.corpus import Corpus

VERSE = "The quick brown fox jumps over the lazy dog.\n" * 40


@plugin
class Bigram:
    """Predicts each token from the one before."""

    @hookimpl
    def build_model(self, run: Run) -> nn.Module:
        class Table(nn.Module):
            def __init__(self, vocab_size: int) -> None:
                super().__init__()
                self.scores = nn.Embedding(vocab_size, vocab_size)

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                scores = self.scores(inputs).flatten(0, 1)
                return nn.functional.cross_entropy(scores, targets.flatten())

        return Table(run.data.vocab_size)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def text_run(tiny_run: TinyRun, tmp_path: Path) -> Callable[..., Run]:
    """Train a bigram model for a step (or ``length``) on what the settings say."""

    def start(length: int = 1, seed: int = 1337, **settings: Any) -> Run:
        beside = settings.pop("beside", [])
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        parts = [Text(**settings), Bigram(), *beside]
        return tiny_run(*parts, run_dir=folder, length=length, seed=seed)

    return start


@pytest.fixture
def corpus(text_run: Callable[..., Run], tmp_path: Path) -> Callable[..., Corpus]:
    """Return the data of a run on one file with this content."""

    def read(content: str | bytes = VERSE, **settings: Any) -> Corpus:
        path = tmp_path / "corpus.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        data = text_run(**{"path": path, "context_length": 8, "batch_size": 4} | settings).data
        assert isinstance(data, Corpus)
        return data

    return read
