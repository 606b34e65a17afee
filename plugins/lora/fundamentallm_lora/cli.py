"""``fundamentallm lora-merge``: write the trained model without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fundamentallm import StorageError, choice_options


@click.command(name="lora-merge")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--at", default="latest", help='Checkpoint: "latest", "best" or "step-00000500".')
@click.option("--averaged", is_flag=True, help="Merge the averaged weights, not the trained ones.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@choice_options
def lora_merge(run: Path, out: Path, averaged: bool, overwrite: bool, **chosen: Any) -> None:
    """Merge the adapters that run folder RUN trained into the base weights.

    Writes the safetensors file OUT, which fits the model without adapters and computes the same.
    With --averaged it contains the weights that the run is validated and sampled with.
    """
    if out.exists() and not overwrite:
        raise StorageError(f"{out}: exists already; --overwrite replaces it")
    from fundamentallm import load_run
    from fundamentallm_lora.merge import check_adapters, take_averaged_weights, write_weights

    loaded = load_run(run, **chosen)
    check_adapters(loaded)
    if averaged:
        take_averaged_weights(loaded)
    loaded.hook.finish_model(run=loaded)
    write_weights(loaded.model.state_dict(), out)
    click.echo(f"written: {out}")
