"""Which checkpoint to load: the one that is asked for, or the newest that can be trusted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import attrs

from fundamentallm import StorageError
from fundamentallm_checkpoint import contents, manifest, retention, store
from fundamentallm_checkpoint.manifest import ALL, Manifest, Newer, TooLarge, Unsound

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fundamentallm import Snapshot
    from fundamentallm_checkpoint.retention import Rules

log = logging.getLogger("fundamentallm")


@attrs.frozen(kw_only=True)
class Wish:
    """What is asked for.

    ``name`` is ``"best"`` or a checkpoint's name: that one and no other. ``"latest"`` or None is
    the newest sound and finite one. Those of other runs than ``run`` are passed over. ``resumes``:
    training is to go on from it, so one of the model alone is of no use. ``unsound`` gets those
    that were tried and are of no use.
    """

    name: str | None = None
    rules: Rules
    run: str = ""
    resumes: bool = True
    unsound: set[Path] = attrs.field(factory=set, eq=False)

    @property
    def open(self) -> bool:
        """Whether an older one will do."""
        return self.name in (None, "latest")


@attrs.frozen
class Loaded:
    """A checkpoint that was verified and read."""

    folder: Path
    manifest: Manifest
    snapshot: Snapshot


def load(homes: Iterable[Path], wish: Wish) -> Loaded | None:
    """Verify and read a checkpoint; None if there is none at all and none is asked for by name.

    Of the newest, each that is not sound or not finite is told as a warning and passed over.
    Raises ``StorageError`` if there are some but none will do.
    """
    there, others = store.parted([f for home in homes for f in store.folders(home)], wish.run)
    if others:
        log.warning(
            "%d checkpoints of another run than %s are ignored, among them %s",
            len(others),
            wish.run,
            others[0],
        )
    problems = []
    for folder in _chosen(there, wish):
        try:
            return _load(folder, wish)
        except (Newer, TooLarge) as error:
            raise StorageError(f"{folder}: {error}") from None
        except Unsound as error:
            wish.unsound.add(folder.absolute())
            problems.append(f"{folder}: {error}")
            if wish.open and not isinstance(error, Useless):
                log.warning("checkpoint %s; trying the next one", problems[-1])
    if not problems:
        return None
    raise StorageError("\n".join(["no sound checkpoint to continue from:", *problems]))


class Useless(Unsound):
    """A sound checkpoint, but not one to go on from."""


def _chosen(there: list[Path], wish: Wish) -> list[Path]:
    """Return the checkpoints to try, the newest first, and of one step those that hold all."""
    known = {folder: _known(folder) for folder in there}
    full = {folder: facts is None or facts.contents == ALL for folder, facts in known.items()}
    there = sorted(there, key=lambda f: (manifest.step_of(f.name) or 0, full[f]), reverse=True)
    if wish.open:
        return there
    if wish.name == "best":
        able = [m for f, m in known.items() if m and (full[f] or not wish.resumes)]
        best = retention.ranked(able, wish.rules)
        chosen = [f for f in there if best and known[f] == best[0]]
        missing = f"no checkpoint tells its {wish.rules.monitor}, so none is the best"
    else:
        name = str(wish.name).removeprefix("step-")
        step = int(name) if name.isdecimal() and len(name) < 20 else None
        chosen = [f for f in there if manifest.step_of(f.name) == step]
        missing = f"there is no checkpoint {wish.name!r}"
    if not chosen:
        listed = ", ".join(dict.fromkeys(f.name for f in there)) or "none"
        raise StorageError(f"{missing} (checkpoints: {listed})")
    return chosen[:1]


def _load(folder: Path, wish: Wish) -> Loaded:
    facts = manifest.read(folder)
    if wish.resumes and facts.contents != ALL:
        raise Useless("it holds the model alone, so no run can go on from it")
    if not facts.finite and wish.open:
        raise Unsound(
            "it holds NaN or infinity in its weights or moments; to take it all the same, ask for"
            f" {folder.name} by its name"
        )
    snapshot = contents.read(folder, facts)
    if not facts.finite:
        log.warning("checkpoint %s holds NaN or infinity in its weights or moments", folder)
    return Loaded(folder, facts, snapshot)


def _known(folder: Path) -> Manifest | None:
    try:
        return manifest.read(folder)
    except Unsound:
        return None
