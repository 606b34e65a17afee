"""Text that the model writes, during training and after it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fundamentallm import (
    Period,
    SettingsError,
    StorageError,
    field,
    ge,
    gt,
    hookimpl,
    le,
    optional,
    plugin,
)

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from torch import nn

    from fundamentallm import Run

__all__ = ["Sample"]

logger = logging.getLogger("fundamentallm")

BETWEEN = "\n" + 15 * "-" + "\n"


@plugin
class Sample:
    """Let the model continue a prompt every period and at the end of the run.

    The texts go to the log and to ``samples/step-00000500.txt`` in the run folder. Training does
    not notice: weights, modes and random numbers are afterwards what they were before.
    """

    role = "observer"

    every: Period = Period(500)
    """How often to write samples; the end of the run brings some in any case."""

    prompt: str = "\n"
    """The text to continue; at least one token long. The model sees as much of its end as fits."""

    max_tokens: int = field(default=200, validator=ge(1))
    """Tokens to add to the prompt."""

    num_samples: int = field(default=1, validator=ge(1))
    """Texts to write, side by side in one batch."""

    temperature: float = field(default=0.8, validator=ge(0))
    """What the logits are divided by: below 1 the likely becomes likelier; 0 always takes the
    likeliest token."""

    top_k: int | None = field(default=None, validator=optional(ge(1)))
    """Choose among this many of the likeliest tokens only."""

    top_p: float | None = field(default=None, validator=optional([gt(0), le(1)]))
    """Choose among the fewest likeliest tokens that have this probability together."""

    def __attrs_post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt: is empty; there must be a token to continue, '\\n' say")

    @hookimpl(wrapper=True)
    def build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        """Refuse to start without a tokenizer, or with a model that cannot be sampled from."""
        # Here and not in an event: there the failure of an observer would only silence it.
        from fundamentallm_sample.generate import check_model

        if run.tokenizer is None:
            raise SettingsError(
                f"sample: needs a tokenizer, but the data ({type(run.data).__name__}) has none: "
                f"take 'sample' out of the plugins, or list data with a tokenizer ('text', say)"
            )
        model = yield
        check_model(model)
        return model

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        """Write samples, if a period or the run is over."""
        # After a signal there may be seconds left, and they belong to whoever saves.
        if run.rank or run.signal is not None:
            return
        if run.ending or self.every.due(run.progress):
            self._write(run)

    def _write(self, run: Run) -> None:
        from fundamentallm_sample.texts import random_source, texts

        step = run.progress.step
        # Seeded by the step: a resumed run writes what the uninterrupted one would have written.
        source = random_source(run, run.seed_for(f"sample/{step}"))
        text = BETWEEN.join(texts(run, self, source))
        logger.info("sample at step %d:\n%s", step, text)
        path = self._folder(run) / f"step-{step:08d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error

    def _folder(self, run: Run) -> Path:
        """Return where samples go; a second instance under another name has a folder of its own."""
        name = next((n for n, instance in run.plugins.items() if instance is self), "sample")
        return run.folder / "samples" / ("" if name == "sample" else name)
