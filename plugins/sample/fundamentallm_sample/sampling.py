"""Continue a prompt as text, with a model and its tokenizer.

The caller puts the model into evaluation mode, with the weights to sample from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fundamentallm import DataError, SettingsError
from fundamentallm_sample.generate import Choice, generate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fundamentallm import Run, Tokenizer
    from fundamentallm_sample import Sample


def random_source(run: Run, seed: int) -> torch.Generator:
    """Return a new random number generator on the run's device."""
    return torch.Generator(device=run.device).manual_seed(seed)


def sample_texts(run: Run, settings: Sample, source: torch.Generator) -> list[str]:
    """Return ``settings.num_samples`` texts, each the prompt and its continuation."""
    prompt = _encode(run, settings.prompt)
    columns = []
    for column in _columns(run, settings, prompt, source):
        columns.append(column)
        run.report("sampling", len(columns), settings.max_tokens)
    # One wait for the device at the end, instead of one per token.
    rows = torch.stack(columns, dim=1).tolist()
    return [_decode(run, prompt + row) for row in rows]


def stream_text(run: Run, settings: Sample, source: torch.Generator) -> Iterator[str]:
    """Yield one text in pieces while it is generated, first the prompt."""
    tokens = _encode(run, settings.prompt)
    shown = _decode(run, tokens)
    yield shown
    text = shown
    for column in _columns(run, settings, list(tokens), source):
        tokens.append(int(column[0]))
        text = _decode(run, tokens)
        # The replacement character stands for the first bytes of an incomplete character.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]


def _columns(
    run: Run, settings: Sample, prompt: list[int], source: torch.Generator
) -> Iterator[torch.Tensor]:
    choice = Choice(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    start = torch.tensor([prompt] * settings.num_samples, device=run.device)
    yield from generate(run.model, start, settings.max_tokens, choice, source)


def _tokenizer(run: Run) -> Tokenizer:
    if run.tokenizer is None:
        raise SettingsError(f"{run.folder}: this run has no tokenizer to encode a prompt with")
    return run.tokenizer


def _encode(run: Run, prompt: str) -> list[int]:
    tokens = _tokenizer(run).encode(prompt)
    if not tokens:
        raise DataError(f"the prompt {prompt!r} has no token to continue")
    return tokens


def _decode(run: Run, tokens: list[int]) -> str:
    return _tokenizer(run).decode(tokens)
