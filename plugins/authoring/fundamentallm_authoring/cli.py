"""The commands ``schema``, ``init``, ``new`` and ``reference``."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import click

from fundamentallm import (
    FundamentalError,
    SettingsError,
    StorageError,
    command_line,
    compose,
    find_plugins,
)
from fundamentallm_authoring.reference import filled, hooks_page, settings_page
from fundamentallm_authoring.scaffold import scaffold
from fundamentallm_authoring.schema import settings_schema
from fundamentallm_authoring.sheet import STARTER, sheet

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("settings", required=False, type=_FILE)
@click.option("-o", "--output", type=_FILE, help="Write to this file instead of the terminal.")
def schema(settings: Path | None, output: Path | None) -> None:
    """Print the JSON Schema of settings files, for editors.

    With SETTINGS, the schema has exactly the plugins of that file; without, every installed plugin.
    An editor with Taplo (Even Better TOML) uses the schema if the first line of a settings file is

        #:schema ./fundamentallm.schema.json
    """
    if settings is None:
        made = settings_schema(_installed(), closed=False)
    else:
        listed = compose(settings).plugins
        made = settings_schema({name: type(each) for name, each in listed.items()}, closed=True)
    text = json.dumps(made, indent=2, ensure_ascii=False) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        _write(output, text)


@click.command()
@click.argument("settings", type=_FILE)
@click.option("--plugins", help=f"Names, with commas between. [default: {','.join(STARTER)}]")
def init(settings: Path, plugins: str | None) -> None:
    """Write a settings file with every setting of the chosen plugins, with defaults and meaning."""
    if settings.exists():
        raise SettingsError(f"{settings} exists already: choose another name, or remove it")
    names = [name.strip() for name in (plugins or ",".join(STARTER)).split(",") if name.strip()]
    _write(settings, sheet({name: _wanted(name) for name in names}, settings.name))
    try:
        compose(settings)
    except SettingsError as error:
        click.echo(f"{settings} is written. Before you can train with it, correct:\n{error}")
    else:
        click.echo(f"{settings} is written. Train with: {command_line('train', settings)}")


@click.command()
@click.argument("name")
def new(name: str) -> None:
    """Create a plugin distribution NAME (such as acme-noise) in a new folder of that name."""
    written = scaffold(name, Path.cwd())
    for path in written:
        click.echo(path.relative_to(Path.cwd()))
    listed = name.replace("-", "_")
    click.echo(f'\nInstall and test it:\n  pip install -e "{name}[test]"\n  pytest {name}')
    click.echo(f'Use it: add "{listed}" to the plugins of a settings file.')


@click.command()
@click.option(
    "--readme", "readmes", multiple=True, type=_FILE, help="Update the tables in a README."
)
@click.option("--settings", "settings", type=_FILE, help="Write the page of all settings.")
@click.option("--hooks", "hooks", type=_FILE, help="Write the page of all hooks.")
@click.option("--check", is_flag=True, help="Write nothing; fail if anything is out of date.")
def reference(
    readmes: tuple[Path, ...], settings: Path | None, hooks: Path | None, *, check: bool
) -> None:
    """Generate the reference of settings and hooks from the plugins' classes.

    In a README the tables are between <!-- settings --> and <!-- /settings -->, and between
    <!-- hooks --> and <!-- /hooks -->. The pages show the installed plugins whose distribution is
    named fundamentallm-….
    """
    made = {path: filled(_read(path), _own_plugins(path), str(path)) for path in readmes}
    if settings is not None:
        made[settings] = settings_page(_first_party())
    if hooks is not None:
        made[hooks] = hooks_page(_first_party())
    stale = [path for path, text in made.items() if not path.exists() or _read(path) != text]
    if check and stale:
        names = ", ".join(map(str, stale))
        raise FundamentalError(
            f"not up to date: {names}; run `{command_line('reference')}` without --check"
        )
    for path in stale:
        _write(path, made[path])
        click.echo(path)


def _installed() -> dict[str, type]:
    """Return the class of each installed plugin; a plugin that cannot be loaded is left out."""
    found: dict[str, type] = {}
    for name in find_plugins():
        try:
            found[name] = _load(name)
        except Exception as error:  # noqa: BLE001 - a third party's module may raise anything
            reason = f"{type(error).__name__}: {error}"
            click.echo(f"{name}: left out, it cannot be loaded: {reason}", err=True)
    return found


def _wanted(name: str) -> type:
    """Return the class of a plugin; ``SettingsError`` says which distribution has a broken one."""
    try:
        return _load(name)
    except FundamentalError:
        raise
    except Exception:  # a third party's module may raise anything
        compose({"plugins": [name], "run": {"length": 1}})
        raise


def _load(name: str) -> type:
    offers = find_plugins().get(name, [])
    if len(offers) != 1:
        # The core raises the error, with advice on what to install.
        compose({"plugins": [name], "run": {"length": 1}})
    cls: type = offers[0].load()
    return cls


def _own_plugins(readme: Path) -> dict[str, type]:
    """Return the plugins of the distribution whose pyproject.toml is next to a README."""
    project = tomllib.loads(_read(readme.parent / "pyproject.toml")).get("project", {})
    names = project.get("entry-points", {}).get("fundamentallm", {})
    return {name: _load(name) for name in names}


def _first_party() -> dict[str, tuple[str, type]]:
    return {
        name: (offers[0].distribution, offers[0].load())
        for name, offers in find_plugins().items()
        if offers[0].distribution.startswith("fundamentallm-")
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
