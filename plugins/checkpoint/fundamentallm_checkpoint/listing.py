"""What checkpoints a run folder has, each with what can be said of it without torch."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import attrs

from fundamentallm import SettingsError, compose
from fundamentallm_checkpoint import identity, manifest, places, retention, store
from fundamentallm_checkpoint.manifest import Manifest, Newer, Unsound
from fundamentallm_checkpoint.retention import BEST, Rules

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_UNITS = ("B", "kB", "MB", "GB", "TB")
_ANY = Rules(keep_last=1, monitor="val/loss")
HEADINGS = ("checkpoint", "saved", "size", "holds", "tags", "metric", "state")


@attrs.frozen(kw_only=True)
class Row:
    """One checkpoint; ``problem`` tells what is wrong with it, if anything is, and ``newer``, why
    this version cannot tell."""

    name: str
    facts: Manifest | None
    rules: Rules
    best: bool = False
    stranger: bool = False
    problem: str = ""
    newer: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the row's cells, one for each heading."""
        facts = self.facts
        if facts is None:
            damaged = f"damaged: {self.problem}"
            said = f"needs a newer version: {self.newer}" if self.newer else damaged
            return (self.name, "", "", "", "", "", said)
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.created))
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
        if self.stranger:
            return f"of another run ({facts.run})"
        return "sound" if facts.finite else "holds NaN or infinity"


def rows(run: Path, *, verify: bool) -> list[Row]:
    """Return the checkpoints of a run folder, those of each instance by their steps; ``verify``
    reads every byte. Raises ``SettingsError`` for a folder that is none of a run."""
    if not (run / "settings.toml").is_file() and not (run / "checkpoints").is_dir():
        raise SettingsError(f"{run}: is not a run folder: it has neither settings nor checkpoints")
    run_id = identity.known(run)
    return [
        row
        for home, (name, rules) in _homes(run, run_id).items()
        for row in _rows(home, "" if name == "checkpoint" else f"{name}/", rules, (run_id, verify))
    ]


def _homes(run: Path, run_id: str) -> dict[Path, tuple[str, Rules]]:
    """Return the folders of all instances, listed or not, with their names and what they keep."""
    found = {run / "checkpoints": ("checkpoint", _ANY)}
    found |= {home: (_name(run, home), _ANY) for home in places.of(run)[1:]}
    return found | _listed(run, run_id)


def _name(run: Path, home: Path) -> str:
    """Return what tells a folder's checkpoints from others: for one outside, its whole path."""
    return home.name if home.is_relative_to(run) else str(home)


def _listed(run: Path, run_id: str) -> dict[Path, tuple[str, Rules]]:
    from fundamentallm_checkpoint import Checkpoint

    try:
        plugins = compose(run / "settings.toml").plugins
    except SettingsError:  # of another version, say: the checkpoints are there all the same
        return {}
    return {
        store.home_of(run, name, one.folder, run_id): (name, one.rules())
        for name, one in plugins.items()
        if isinstance(one, Checkpoint) and (run_id or not one.folder)
    }


def _rows(home: Path, above: str, rules: Rules, how: tuple[str, bool]) -> Iterator[Row]:
    run_id, verify = how
    there = sorted(store.folders(home), key=lambda folder: folder.name)
    newer = {folder: str(error) for folder in there if (error := _newer(folder))}
    kept = {f: (None, "") if f in newer else _read(f, verify=verify) for f in there}
    strangers = set(store.parted(kept, run_id)[1])
    sound = [
        facts
        for folder, (facts, problem) in kept.items()
        if facts is not None and not problem and folder not in strangers
    ]
    best = retention.ranked(sound, rules)[:1]
    for folder, (facts, problem) in kept.items():
        yield Row(
            name=above + folder.name,
            facts=facts,
            rules=rules,
            best=facts in best,
            stranger=folder in strangers,
            problem=problem,
            newer=newer.get(folder, ""),
        )


def _newer(folder: Path) -> Newer | None:
    try:
        manifest.read(folder)
    except Newer as error:
        return error
    except Unsound:
        pass
    return None


def _read(folder: Path, *, verify: bool) -> tuple[Manifest | None, str]:
    facts = None
    try:
        facts = manifest.read(folder)
        if verify:
            manifest.verify(folder, facts)
    except Unsound as error:
        return facts, str(error)
    return facts, ""


def _bytes(size: int) -> str:
    power = min(int(math.log10(max(size, 1)) // 3), len(_UNITS) - 1)
    amount = size / 1000**power
    return f"{amount:.0f} {_UNITS[power]}" if amount >= 100 else f"{amount:.3g} {_UNITS[power]}"
