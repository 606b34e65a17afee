"""From a prompt to texts: a run's tokenizer and model, and nothing of its training touched.

What writes are the weights that the run is validated with.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from fundamentallm import DataError, SettingsError
from fundamentallm_sample.generate import Choice, generate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from fundamentallm import Run, Tokenizer
    from fundamentallm_sample import Sample


def random_source(run: Run, seed: int) -> torch.Generator:
    """Return a random number generator of its own on the run's device."""
    return torch.Generator(device=run.device).manual_seed(seed)


def texts(run: Run, how: Sample, source: torch.Generator) -> list[str]:
    """Return ``how.num_samples`` texts, each the prompt and its continuation."""
    prompt = _encode(run, how.prompt)
    columns = []
    for column in _columns(run, how, prompt, source):
        columns.append(column)
        run.report("sampling", len(columns), how.max_tokens)
    # One wait for the device, at the end, instead of one per token.
    rows = torch.stack(columns, dim=1).tolist()
    return [_decode(run, prompt + row) for row in rows]


def stream(run: Run, how: Sample, source: torch.Generator) -> Iterator[str]:
    """Yield one text piece by piece as it is written, first the prompt."""
    tokens = _encode(run, how.prompt)
    shown = _decode(run, tokens)
    yield shown
    text = shown
    for column in _columns(run, how, list(tokens), source):
        tokens.append(int(column[0]))
        text = _decode(run, tokens)
        # The replacement character stands for the first bytes of a character not yet complete.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]


def _columns(
    run: Run, how: Sample, prompt: list[int], source: torch.Generator
) -> Iterator[torch.Tensor]:
    choice = Choice(temperature=how.temperature, top_k=how.top_k, top_p=how.top_p)
    start = torch.tensor([prompt] * how.num_samples, device=run.device)
    with run.hook.evaluation_weights(run=run), evaluating(run.model):
        yield from generate(run.model, start, how.max_tokens, choice, source)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout and the like off, and afterwards every module back to the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _tokenizer(run: Run) -> Tokenizer:
    if run.tokenizer is None:
        raise SettingsError(f"{run.folder}: this run has no tokenizer to read a prompt with")
    return run.tokenizer


def _encode(run: Run, prompt: str) -> list[int]:
    tokens = _tokenizer(run).encode(prompt)
    if not tokens:
        raise DataError(f"the prompt {prompt!r} has no token to continue")
    return tokens


def _decode(run: Run, tokens: list[int]) -> str:
    return _tokenizer(run).decode(tokens)
