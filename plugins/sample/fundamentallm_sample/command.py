"""``fundamentallm sample``: let a trained model continue a prompt."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fundamentallm import FundamentalError, SettingsError, attribute_docs, setting_fields
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
def sample(run: Path, seed: int | None, at: str, interactive: bool, **given: Any) -> None:
    """Let the model in run folder RUN continue a prompt.

    What is not given is as in the run's settings for the plugin 'sample', or else that plugin's
    default. Without a seed every call writes another text; the seed it took is told on stderr.
    """
    from fundamentallm import load_run  # imports torch, which --help can do without
    from fundamentallm_sample.generate import check_model
    from fundamentallm_sample.texts import random_source, texts

    changed(Sample(), given)  # mistakes show before a model is loaded
    loaded = load_run(run, at=at)
    check_model(loaded.model)
    mine = [instance for instance in loaded.plugins.values() if isinstance(instance, Sample)]
    how = changed(mine[0] if mine else Sample(), given)
    if seed is None:
        seed = secrets.randbelow(2**31)
        click.echo(f"seed {seed}", err=True)
    source = random_source(loaded, seed)
    if interactive:
        converse(loaded, how, source)
    else:
        click.echo(BETWEEN.join(texts(loaded, how, source)))


def changed(settings: Sample, given: dict[str, Any]) -> Sample:
    """Return the settings with what was given on the command line in their place."""
    kept = {name: getattr(settings, name) for name in setting_fields(Sample)}
    try:
        return Sample(**kept | {name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise SettingsError(str(error.args[0])) from None


def converse(run: Run, how: Sample, source: Generator) -> None:
    """Continue one prompt after the other, showing the text as it is written."""
    from fundamentallm_sample.texts import stream

    while True:
        try:
            prompt = input("> ")
        except EOFError:
            click.echo()
            return
        # An empty line asks for the prompt of the settings.
        asked = changed(how, {"prompt": prompt or None, "num_samples": 1})
        try:
            for piece in stream(run, asked, source):
                click.echo(piece, nl=False)
        except FundamentalError as error:
            click.echo(f"error: {error}", err=True, nl=False)
        click.echo()
