"""The hooks of a run as plain callables: what pluggy found, without its cost in every step.

A call through pluggy costs about a microsecond, and an empty one almost as much. Frozen, an
implementation is called directly, and a hook that nobody hears is false.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from fundamentallm.hookspecs import HOOKS, Hooks, kind

if TYPE_CHECKING:
    from pluggy import HookImpl, PluginManager

Trace: TypeAlias = Callable[[str, dict[str, Any]], None]
log = logging.getLogger("fundamentallm")


class Nothing(tuple[()]):
    """A hook without implementations: callable, and false, so that a loop can pass it by."""

    def __call__(self, **_: Any) -> list[Any]:
        return []


class Frozen:
    """One callable per hook, under its name; see ``Hooks`` for their arguments."""


def freeze(registry: PluginManager, trace: Trace | None = None) -> Hooks:
    """Bind every hook. Call again after registering more plugins; ``trace`` sees every call."""
    frozen = Frozen()
    muted: set[str] = set()
    for name in HOOKS:
        call = _caller(registry, name, muted)
        setattr(frozen, name, call if trace is None else _traced(name, call, trace))
    return cast("Hooks", frozen)


def _caller(registry: PluginManager, name: str, muted: set[str]) -> Callable[..., Any]:
    caller = getattr(registry.hook, name)
    impls = caller.get_hookimpls()
    if any(impl.wrapper or impl.hookwrapper for impl in impls):
        return cast("Callable[..., Any]", caller)  # wrappers are pluggy's business
    # pluggy calls the last one registered first.
    calls = [_bound(impl, muted, caller.spec.argnames) for impl in reversed(impls)]
    if not calls:
        return Nothing()
    if name == "on_train_end":
        return _all_of(calls)
    if kind(name) == "exclusive" or (len(calls) == 1 and kind(name) != "vote"):
        return calls[0]
    return lambda **given: [call(**given) for call in calls]


def _bound(impl: HookImpl, muted: set[str], spec: tuple[str, ...]) -> Callable[..., Any]:
    function, names = cast("Callable[..., Any]", impl.function), impl.argnames
    call = function
    if len(names) < len(spec):
        call = lambda **given: function(**{name: given[name] for name in names})  # noqa: E731
    if getattr(impl.plugin, "observer", False):
        return _observed(call, impl.plugin_name, muted)
    return call


def _observed(call: Callable[..., Any], name: str, muted: set[str]) -> Callable[..., Any]:
    def observe(**given: Any) -> None:
        if name not in muted:
            try:
                call(**given)
            except Exception as error:
                muted.add(name)
                log.warning("%s failed and is muted from now on: %r", name, error, exc_info=error)

    return observe


def _all_of(calls: list[Callable[..., Any]]) -> Callable[..., Any]:
    """Call every one, whatever the others do, and raise the first error at the end."""

    def call_all(**given: Any) -> None:
        errors = []
        for call in calls:
            try:
                call(**given)
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)
        if errors:
            raise errors[0]

    return call_all


def _traced(name: str, call: Callable[..., Any], trace: Trace) -> Callable[..., Any]:
    def traced(**given: Any) -> Any:
        trace(name, given)
        return call(**given)

    return traced
