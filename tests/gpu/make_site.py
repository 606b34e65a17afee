"""Make a folder for PYTHONPATH that stands for an installation: ``make_site.py WHEELS SITE``.

It gets the content of the wheels in the folder WHEELS, and for the core and each plugin the metadata
that an installation would have, so that its entry points are found. The code itself is imported from
where it is. Needs Python alone: no pip, no network.
"""

from __future__ import annotations

import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def make_site(wheels: Path, site: Path) -> None:
    """Unpack the wheels and describe the distributions of this repository."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        print(f"no wheels in {wheels}: only what Python has can be imported", file=sys.stderr)
    for wheel in found:
        unpack(wheel, site)
    for settings in [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]:
        describe(tomllib.loads(settings.read_text())["project"], site)


def unpack(wheel: Path, site: Path) -> None:
    """Put a wheel's modules into ``site``; its programs and headers are not needed."""
    data = f"{'-'.join(wheel.name.split('-')[:2])}.data/"
    with zipfile.ZipFile(wheel) as file:
        for name in file.namelist():
            if not name.startswith(data):
                file.extract(name, site)
                continue
            # A wheel may state for a part of its modules where they go.
            kind, _, rest = name.removeprefix(data).partition("/")
            if kind in ("purelib", "platlib") and rest and not rest.endswith("/"):
                target = site / rest
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read(name))


def describe(project: dict[str, Any], site: Path) -> None:
    """Write the metadata of a distribution as far as programs read them: name, version, needs, and
    entry points."""
    name, version = project["name"], project["version"]
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    needs = [f"Requires-Dist: {need}" for need in project.get("dependencies", [])]
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *needs]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    groups = dict(project.get("entry-points", {}))
    if "scripts" in project:
        groups["console_scripts"] = project["scripts"]
    text = "".join(
        f"[{group}]\n" + "".join(f"{one} = {target}\n" for one, target in entries.items()) + "\n"
        for group, entries in groups.items()
    )
    (folder / "entry_points.txt").write_text(text)


if __name__ == "__main__":
    make_site(Path(sys.argv[1]), Path(sys.argv[2]))
