"""``fundamentallm checkpoints``: list the checkpoints of a run, without torch."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from fundamentallm import SettingsError, StorageError, compose, folder
from fundamentallm_checkpoint import run_id
from fundamentallm_checkpoint.storage import directory, manifest, retention
from fundamentallm_checkpoint.storage.manifest import Manifest, NewerFormatError, UnsoundError
from fundamentallm_checkpoint.storage.retention import BEST, Rules

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADINGS = ("checkpoint", "saved", "size", "holds", "tags", "metric", "state")
_UNITS = ("B", "kB", "MB", "GB", "TB")
# For folders of instances whose settings are unknown.
_DEFAULT_RULES = Rules(keep_last=1, monitor="val/loss")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every file and compare its SHA-256.")
def checkpoints(run: Path, verify: bool) -> None:
    """List the checkpoints in run folder RUN and whether they are sound.

    Without --verify, only the manifests and the sizes of the files are checked. Ends with exit
    code 5 if a checkpoint is damaged.
    """
    found = rows(run, verify=verify)
    if not found:
        click.echo(f"no checkpoints in {run}")
        return
    table = [HEADINGS, *(row.cells() for row in found)]
    # A column that is empty in every row is left out.
    used = [n for n in range(len(HEADINGS)) if any(cells[n] for cells in table[1:])]
    widths = {n: max(len(cells[n]) for cells in table) for n in used}
    for cells in table:
        click.echo("  ".join(cells[n].ljust(widths[n]) for n in used).rstrip())
    damaged = [row.name for row in found if row.problem]
    if damaged:
        raise StorageError(f"{run}: {len(damaged)} of {len(found)} checkpoints are damaged")


@attrs.frozen(kw_only=True)
class Row:
    """One checkpoint. ``problem`` is what is wrong with it, ``newer`` why it cannot be read."""

    name: str
    facts: Manifest | None
    rules: Rules
    best: bool = False
    other_run: bool = False
    problem: str = ""
    newer: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the row's cells, one for each heading."""
        facts = self.facts
        if facts is None:
            damaged = f"damaged: {self.problem}"
            state = f"needs a newer version: {self.newer}" if self.newer else damaged
            return (self.name, "", "", "", "", "", state)
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.created))
        # The tag says what was the best when it was saved; the table says what is the best now.
        tags = [tag for tag in facts.tags if tag != BEST] + [BEST] * self.best
        value = facts.metrics.get(self.rules.monitor)
        metric = "" if value is None else f"{self.rules.monitor} {value:.6g}"
        return (
            self.name,
            saved,
            _bytes(facts.size),
            facts.contents,
            ", ".join(tags),
            metric,
            self._state(facts),
        )

    def _state(self, facts: Manifest) -> str:
        if self.problem:
            return f"damaged: {self.problem}"
        if self.other_run:
            return f"of another run ({facts.run})"
        return "sound" if facts.finite else "holds NaN or infinity"


def rows(run: Path, *, verify: bool) -> list[Row]:
    """Return the checkpoints of a run folder, ordered by instance and step.

    ``verify`` reads every byte. Raises ``SettingsError`` if ``run`` is not a run folder.
    """
    if not folder.is_run(run) and not (run / folder.CHECKPOINTS).is_dir():
        raise SettingsError(f"{run}: is not a run folder: it has neither settings nor checkpoints")
    known = run_id.read_id(run)
    return [
        row
        for home, (name, rules) in _homes(run, known).items()
        for row in _rows(home, "" if name == "checkpoint" else f"{name}/", rules, (known, verify))
    ]


def _homes(run: Path, known: str) -> dict[Path, tuple[str, Rules]]:
    """Return the folders of all instances, listed or not, with their names and rules."""
    found = {run / folder.CHECKPOINTS: ("checkpoint", _DEFAULT_RULES)}
    # Without the first one, which is the folder in the line above.
    found |= {home: (_name(run, home), _DEFAULT_RULES) for home in run_id.homes(run)[1:]}
    # Last, so that the rules of listed instances replace the default ones.
    return found | _listed(run, known)


def _name(run: Path, home: Path) -> str:
    return home.name if home.is_relative_to(run) else str(home)


def _listed(run: Path, known: str) -> dict[Path, tuple[str, Rules]]:
    from fundamentallm_checkpoint import Checkpoint

    try:
        plugins = compose(run / folder.SETTINGS).plugins
    except SettingsError:  # the checkpoints can be listed without them
        return {}
    return {
        directory.home_of(run, name, one.folder, known): (name, one.rules())
        for name, one in plugins.items()
        if isinstance(one, Checkpoint) and (known or not one.folder)
    }


def _rows(home: Path, prefix: str, rules: Rules, how: tuple[str, bool]) -> Iterator[Row]:
    known, verify = how
    there = sorted(directory.folders(home), key=lambda path: path.name)
    newer = {path: str(error) for path in there if (error := _newer(path))}
    read = {p: (None, "") if p in newer else _read(p, verify=verify) for p in there}
    others = set(directory.split_by_owner(read, known)[1])
    sound = [
        facts
        for path, (facts, problem) in read.items()
        if facts is not None and not problem and path not in others
    ]
    best = retention.ranked(sound, rules)[:1]
    for path, (facts, problem) in read.items():
        yield Row(
            name=prefix + path.name,
            facts=facts,
            rules=rules,
            best=facts in best,
            other_run=path in others,
            problem=problem,
            newer=newer.get(path, ""),
        )


def _newer(checkpoint: Path) -> NewerFormatError | None:
    try:
        manifest.read(checkpoint)
    except NewerFormatError as error:
        return error
    except UnsoundError:
        pass
    return None


def _read(checkpoint: Path, *, verify: bool) -> tuple[Manifest | None, str]:
    facts = None
    try:
        facts = manifest.read(checkpoint)
        if verify:
            manifest.verify(checkpoint, facts)
    except UnsoundError as error:
        return facts, str(error)
    return facts, ""


def _bytes(size: int) -> str:
    power = min(int(math.log10(max(size, 1)) // 3), len(_UNITS) - 1)
    amount = size / 1000**power
    return f"{amount:.0f} {_UNITS[power]}" if amount >= 100 else f"{amount:.3g} {_UNITS[power]}"
