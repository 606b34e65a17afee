"""What a hook's specification states about it: its kind, its age, and its replacement.

A host marks the methods of its class of hooks::

    exclusive, vote, event, edit = markers("cook")

    class Hooks:
        @event(since="0.1")
        def on_served(self, dish: str) -> None: ...

        @event(since="0.1", deprecated=Deprecated(since="0.4", use="on_served"))
        def on_dish(self, dish: str) -> None: ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

import attrs
import pluggy

Kind: TypeAlias = Literal["exclusive", "vote", "event", "edit"]
Stability: TypeAlias = Literal["stable", "provisional"]
F = TypeVar("F", bound=Callable[..., Any])

WARNED_VERSIONS = 2
"""Minor versions in which a deprecated hook still works, with a warning."""


@attrs.frozen
class Deprecated:
    """A hook, or an argument of one, that a later version removes."""

    since: str
    """The first version that warns."""
    use: str
    """The replacement, as an author would write it."""

    @property
    def removed_in(self) -> str:
        """The first version in which it is an error."""
        major, minor = _version(self.since)
        return f"{major}.{minor + WARNED_VERSIONS}"

    def is_removed(self, version: str) -> bool:
        """Return whether ``version`` of the host no longer accepts it."""
        return _version(version) >= _version(self.removed_in)

    def warning(self, what: str) -> FutureWarning:
        """Return what pluggy shows where a plugin implements it."""
        # A FutureWarning is shown by default: a DeprecationWarning of a plugin is not.
        since, gone = self.since, self.removed_in
        return FutureWarning(
            f"{what} is deprecated since {since} and is an error from {gone} on: use {self.use}"
        )


@attrs.frozen
class HookFacts:
    """What a marker states about a hook."""

    kind: Kind
    since: str
    """The first version that had the hook."""
    stability: Stability = "stable"
    """A ``stable`` hook changes only by deprecation, a ``provisional`` one in any version."""
    deprecated: Deprecated | None = None
    deprecated_arguments: Mapping[str, Deprecated] = attrs.field(factory=dict)

    def removed(self, hook: str, arguments: tuple[str, ...], version: str) -> list[str]:
        """Return an error for everything in an implementation that ``version`` has removed."""
        stated = {
            f"argument {name!r} of {hook}": self.deprecated_arguments.get(name)
            for name in arguments
        }
        stated = {f"hook {hook!r}": self.deprecated, **stated}
        return [
            f"the {what} was removed in {one.removed_in}: use {one.use}"
            for what, one in stated.items()
            if one is not None and one.is_removed(version)
        ]


@attrs.frozen
class Marker:
    """Marks the specification of a hook with its kind; made by ``markers``."""

    project: str
    kind: Kind

    def __call__(
        self,
        *,
        since: str,
        stability: Stability = "stable",
        deprecated: Deprecated | None = None,
        deprecated_arguments: Mapping[str, Deprecated] | None = None,
    ) -> Callable[[F], F]:
        """Return the decorator for a hook that exists since a version."""
        old = dict(deprecated_arguments or {})
        facts = HookFacts(self.kind, since, stability, deprecated, old)

        def mark(function: F) -> F:
            hook = function.__name__
            warnings = {
                name: one.warning(f"argument {name!r} of {hook}") for name, one in old.items()
            }
            specify = pluggy.HookspecMarker(self.project)(
                firstresult=self.kind == "exclusive",
                warn_on_impl=deprecated.warning(f"hook {hook!r}") if deprecated else None,
                warn_on_impl_args=warnings or None,
            )
            # On the function itself, since pluggy's marker has no place for them.
            function.hook_facts = facts  # type: ignore[attr-defined]
            return specify(function)

        return mark


def markers(project: str) -> tuple[Marker, Marker, Marker, Marker]:
    """Return the markers of a host's hooks: ``exclusive``, ``vote``, ``event`` and ``edit``."""
    kinds: tuple[Kind, ...] = ("exclusive", "vote", "event", "edit")
    exclusive, vote, event, edit = (Marker(project, kind) for kind in kinds)
    return exclusive, vote, event, edit


def hook_facts(hooks: type, name: str) -> HookFacts:
    """Return what the specification of a hook states about it."""
    facts: HookFacts = getattr(hooks, name).hook_facts
    return facts


def _version(text: str) -> tuple[int, int]:
    major, minor, *_ = [*text.split("."), "0"]
    return int(major), int(minor)
