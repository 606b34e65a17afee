"""Write texts with the model, during training and after it."""

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

    The texts go to the log and to ``samples/step-00000500.txt`` in the run folder. Sampling does
    not change the training: weights, module modes and random numbers are restored afterwards.
    """

    role = "observer"

    every: Period = Period(500)
    """How often to write samples. The end of the run writes samples too."""

    prompt: str = "\n"
    """The text to continue, at least one token. If it is too long, the model gets its end."""

    max_tokens: int = field(default=200, validator=ge(1))
    """The number of tokens to add to the prompt."""

    num_samples: int = field(default=1, validator=ge(1))
    """The number of texts, generated in one batch."""

    temperature: float = field(default=0.8, validator=ge(0))
    """The divisor of the logits. Below 1, likely tokens become likelier; 0 always takes the
    likeliest token."""

    top_k: int | None = field(default=None, validator=optional(ge(1)))
    """Choose only among this many of the likeliest tokens."""

    top_p: float | None = field(default=None, validator=optional([gt(0), le(1)]))
    """Choose only among the fewest likeliest tokens whose total probability is at least this."""

    def __attrs_post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt: is empty; it needs a token to continue, for example '\\n'")

    @hookimpl(wrapper=True)
    def build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        """Refuse a start without a tokenizer, or with a model that cannot be sampled from."""
        # Not in an event, where an error would only mute this observer.
        from fundamentallm_sample.generate import check_model

        if run.tokenizer is None:
            raise SettingsError(
                f"sample: needs a tokenizer, but the data ({type(run.data).__name__}) has none: "
                f"remove 'sample' from the plugins, or list data with a tokenizer, such as 'text'"
            )
        model = yield
        check_model(model)
        return model

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        """Write samples when they are due, and at the end of the run."""
        # After a signal there may be only seconds left, which saving needs.
        if run.signal is not None:
            return
        if run.ending or self.every.due(run.progress):
            self._write(run)

    def _write(self, run: Run) -> None:
        from fundamentallm_sample.sampling import random_source, sample_texts

        step = run.progress.step
        # Seeded by the step, so that a resumed run writes the same texts as an uninterrupted one.
        source = random_source(run, run.seed_for(f"sample/{step}"))
        # In all processes: each may hold a part of the model.
        with run.evaluating():
            text = BETWEEN.join(sample_texts(run, self, source))
        # An error must mute this observer in all processes: they would wait for one that is muted.
        run.from_first(lambda: self._keep(run, text))

    def _keep(self, run: Run, text: str) -> None:
        step = run.progress.step
        logger.info("sample at step %d:\n%s", step, text)
        path = self._folder(run) / f"step-{step:08d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error

    def _folder(self, run: Run) -> Path:
        """Return the folder for samples. An instance with another name has its own subfolder."""
        name = run.name_of(self)
        return run.folder / "samples" / ("" if name == "sample" else name)
