"""``fundamentallm lora-merge``: the trained model without adapters."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from fundamentallm import StorageError


@click.command(name="lora-merge")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--at", default="latest", help='Checkpoint: "latest", "best" or "step-00000500".')
@click.option("--averaged", is_flag=True, help="Merge the averaged weights, not the trained ones.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
def lora_merge(run: Path, out: Path, at: str, averaged: bool, overwrite: bool) -> None:
    """Merge the adapters that run folder RUN trained into the weights they are beside.

    Writes the safetensors file OUT, which fits the model without adapters and computes the same.
    With --averaged it is the model that the run's validations and samples are made with.
    """
    if out.exists() and not overwrite:
        raise StorageError(f"{out}: is there already; --overwrite replaces it")
    from fundamentallm import load_run
    from fundamentallm_lora.merging import averaged_weights, merged_state, write

    loaded = load_run(run, at=at)
    with averaged_weights(loaded) if averaged else nullcontext():
        write(merged_state(loaded.model), out)
    click.echo(f"written: {out}")
