"""``fundamentallm checkpoints``: what a run can go on from."""

from __future__ import annotations

from pathlib import Path

import click

from fundamentallm import StorageError
from fundamentallm_checkpoint.listing import HEADINGS, rows


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every file and compare its SHA-256.")
def checkpoints(run: Path, verify: bool) -> None:
    """List the checkpoints in run folder RUN, and say which are sound.

    Without --verify, that is by their manifests and the sizes of their files. Ends with exit
    code 5 if one is damaged.
    """
    found = rows(run, verify=verify)
    if not found:
        click.echo(f"no checkpoints in {run}")
        return
    table = [HEADINGS, *(row.cells() for row in found)]
    used = [n for n in range(len(HEADINGS)) if any(cells[n] for cells in table[1:])]
    widths = {n: max(len(cells[n]) for cells in table) for n in used}
    for cells in table:
        click.echo("  ".join(cells[n].ljust(widths[n]) for n in used).rstrip())
    damaged = [row.name for row in found if row.problem]
    if damaged:
        raise StorageError(f"{run}: {len(damaged)} of {len(found)} checkpoints are damaged")
