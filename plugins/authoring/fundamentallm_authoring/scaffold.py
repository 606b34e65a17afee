"""Write a new plugin distribution from the templates, with tests and a README."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from importlib.util import find_spec
from string import Template
from typing import TYPE_CHECKING

from fundamentallm import SettingsError, StorageError, find_plugins

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

# Template -> target. Both may contain $distribution, $module and $cls.
LAYOUT = {
    "pyproject.toml.tmpl": "pyproject.toml",
    "README.md.tmpl": "README.md",
    "gitignore.tmpl": ".gitignore",
    "plugin.py.tmpl": "$module/__init__.py",
    "noise.py.tmpl": "$module/noise.py",
    "py.typed.tmpl": "$module/py.typed",
    "test_plugin.py.tmpl": "tests/test_$module.py",
}


def scaffold(name: str, parent: Path) -> list[Path]:
    """Write the distribution ``name`` into a new folder of that name; return what was written.

    ``acme-noise`` is the distribution, ``acme_noise`` its module and plugin, ``AcmeNoise`` the
    class. Raises ``SettingsError`` for a name that is not valid for all three or is taken, and
    ``StorageError`` if the files cannot be written.
    """
    words = _words(name)
    folder = parent / name
    if folder.exists():
        raise SettingsError(f"{folder} exists already: choose another name, or remove it")
    templates = files("fundamentallm_authoring") / "templates"
    made = {
        folder / Template(target).substitute(words): (templates / template).read_text("utf-8")
        for template, target in LAYOUT.items()
    }
    try:
        for path, text in made.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(text).substitute(words), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}") from error
    return list(made)


def _words(name: str) -> dict[str, str]:
    module = name.replace("-", "_")
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} is no name for a distribution: expected words of small letters and digits "
            "with dashes between, such as acme-noise"
        )
    if keyword.iskeyword(module) or module in ("run", "plugins", "extends"):
        raise SettingsError(f"{module!r} has a meaning already: choose another name")
    if module in find_plugins() or find_spec(module) is not None:
        raise SettingsError(f"{module!r} is installed already: choose another name")
    title = "".join(word.capitalize() for word in name.split("-"))
    return {"distribution": name, "module": module, "cls": title}
