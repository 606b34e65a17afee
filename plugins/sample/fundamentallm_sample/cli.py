"""``fundamentallm sample``: let a trained model continue a prompt."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fundamentallm import (
    FundamentalError,
    SettingsError,
    attribute_docs,
    choice_options,
    setting_fields,
)
from fundamentallm_sample import BETWEEN, Sample

if TYPE_CHECKING:
    from torch import Generator

    from fundamentallm import Run

DOCS = attribute_docs(Sample)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", help=DOCS.get("prompt"))
@click.option("--max-tokens", type=int, help=DOCS.get("max_tokens"))
@click.option("--num-samples", type=int, help=DOCS.get("num_samples"))
@click.option("--temperature", type=float, help=DOCS.get("temperature"))
@click.option("--top-k", type=int, help=DOCS.get("top_k"))
@click.option("--top-p", type=float, help=DOCS.get("top_p"))
@click.option("--seed", type=click.IntRange(0), help="The same seed gives the same text.")
@click.option("--at", default="latest", help='Checkpoint: "latest", "best" or "step-00000500".')
@click.option("--interactive", is_flag=True, help="Ask for prompts until the input ends.")
@choice_options
def sample(run: Path, seed: int | None, interactive: bool, **given: Any) -> None:
    """Let the model in run folder RUN continue a prompt.

    Options that are not given are those of the run's plugin 'sample', or else the defaults. Without
    a seed every call writes another text, and prints its seed on stderr. The training data is not
    needed.
    """
    how = {name: given[name] for name in setting_fields(Sample) if name in given}
    with_options(Sample(), how)  # reports mistakes before a model is loaded
    loaded = load(run, given)
    listed = [plugin for plugin in loaded.plugins.values() if isinstance(plugin, Sample)]
    settings = with_options(listed[0] if listed else Sample(), how)
    from fundamentallm_sample.sampling import random_source, sample_texts

    if seed is None:
        seed = secrets.randbelow(2**31)
        click.echo(f"seed {seed}", err=True)
    source = random_source(loaded, seed)
    if interactive:
        converse(loaded, settings, source)
    else:
        click.echo(BETWEEN.join(sample_texts(loaded, settings, source)))


def load(folder: Path, given: dict[str, Any]) -> Run:
    """Load a run with the weights that it is validated with, finished, in evaluation mode."""
    from fundamentallm import load_run  # imports torch, which --help does not need
    from fundamentallm_sample.generate import check_model

    run = load_run(
        folder,
        at=given["at"],
        overrides=given["overrides"],
        add=given["add"],
        remove=given["remove"],
    )
    check_model(run.model)
    # For good, because a plugin may keep other weights for parameters that finish_model removes.
    with run.hook.evaluation_weights(run=run):
        weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.model.load_state_dict(weights, strict=False)
    run.hook.finish_model(run=run)
    run.model.eval()
    return run


def with_options(settings: Sample, given: dict[str, Any]) -> Sample:
    """Return the settings with the options that were given on the command line."""
    values = {name: getattr(settings, name) for name in setting_fields(Sample)}
    try:
        return Sample(**values | {name: v for name, v in given.items() if v is not None})
    except ValueError as error:
        raise SettingsError(str(error.args[0])) from None


def converse(run: Run, settings: Sample, source: Generator) -> None:
    """Continue one prompt after the other, showing each text while it is generated."""
    from fundamentallm_sample.sampling import stream_text

    while True:
        try:
            prompt = input("> ")
        except EOFError:
            click.echo()
            return
        # An empty line stands for the prompt of the settings.
        asked = with_options(settings, {"prompt": prompt or None, "num_samples": 1})
        try:
            for piece in stream_text(run, asked, source):
                click.echo(piece, nl=False)
        except FundamentalError as error:
            click.echo(f"error: {error}", err=True, nl=False)
        click.echo()
