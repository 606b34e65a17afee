"""The commands ``plugins`` and ``hooks``: installed plugins, and the hooks that each implements."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fundamentallm import (
    HOOKS,
    Found,
    SettingsError,
    about_hook,
    compose,
    find_plugins,
    hook_methods,
    kind,
    order,
    suggest,
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def plugins(as_json: bool) -> None:
    """List the installed plugins."""
    rows = [
        {
            "name": found.name,
            "distribution": found.distribution,
            "version": found.version,
            "about": _about(found),
        }
        for offers in find_plugins().values()
        for found in offers
    ]
    width = max((len(row["name"]) for row in rows), default=0)
    lines = [
        f"{row['name']:<{width}}  {row['distribution']} {row['version']}\n    {row['about']}"
        for row in rows
    ]
    click.echo(json.dumps(rows, indent=2) if as_json else "\n".join(lines))


@click.command()
@click.argument("settings", type=click.Path(path_type=Path), required=False)
@click.option("--docs", "plugin", metavar="PLUGIN", help="Print what a plugin does in its hooks.")
def hooks(settings: Path | None, plugin: str | None) -> None:
    """Print the hooks in the order of a run; with SETTINGS, the plugins that implement each.

    A line has the hook, its kind, its first version, and whether it is stable. Where no plugin
    implements an exclusive hook, the core's default answers.
    """
    if plugin is not None:
        click.echo("\n".join(_documented(plugin)))
        return
    listed = compose(settings).plugins if settings else {}
    implemented = [
        (hook, f"{name} (wraps)" if options["wrapper"] else name)
        for name in order(listed)
        for hook, options, _ in hook_methods(type(listed[name]))
    ]
    for hook in HOOKS:
        names = [name for one, name in implemented if one == hook]
        facts = about_hook(hook)
        line = f"{hook:<24}{facts.kind:<11}{facts.since:<6}{facts.stability:<13}{', '.join(names)}"
        click.echo(line.rstrip())


def _documented(name: str) -> list[str]:
    """Return a line for each hook of an installed plugin: hook, kind, and what it does there."""
    from fundamentallm_authoring.reference import answers

    offers = find_plugins()
    if name not in offers:
        raise SettingsError(f"{name}: is no installed plugin{suggest(name, offers)}")
    rows = [(hook + note, kind(hook), text) for hook, note, text in answers(offers[name][0].load())]
    width = max((len(hook) for hook, _, _ in rows), default=0)
    return [f"{hook:<{width}}  {sort:<9}  {text}" for hook, sort, text in rows] or ["no hooks"]


def _about(found: Found) -> str:
    try:
        return (found.load().__doc__ or "").partition("\n")[0]
    except Exception as error:  # noqa: BLE001 - a third party's module may raise anything
        return f"cannot be loaded: {type(error).__name__}: {error}"
