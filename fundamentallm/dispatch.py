"""The hooks of a run as plain callables: what pluggy found, without its cost in every step.

A call through pluggy costs about a microsecond, and an empty one almost as much. Frozen, an
implementation is called directly, and a hook that nobody hears is false.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from fundamentallm.errors import SettingsError
from fundamentallm.hookspecs import HOOKS, Hooks, kind

if TYPE_CHECKING:
    from pluggy import HookImpl, PluginManager

log = logging.getLogger("fundamentallm")


class Nothing(tuple[()]):
    """A hook without implementations: callable, and false, so that a loop can pass it by."""

    __slots__ = ()

    def __call__(self, **_: Any) -> list[Any]:  # noqa: D102
        return []


Around: TypeAlias = Callable[[str, str, Callable[..., Any]], Callable[..., Any]]


def freeze(registry: PluginManager, around: Around | None = None) -> Hooks:
    """Return an object with one callable per hook; see ``Hooks`` for their arguments.

    ``around(plugin, hook, call)`` may put a call of its own in place of each plugin's, to trace or
    time it. A hook that wrappers surround is one call to it, with ``""`` for the plugin.
    """
    muted: set[str] = set()
    around = around or (lambda _plugin, _hook, call: call)
    return cast("Hooks", SimpleNamespace(**{h: _caller(registry, h, muted, around) for h in HOOKS}))


def _caller(
    registry: PluginManager, hook: str, muted: set[str], around: Around
) -> Callable[..., Any]:
    caller = getattr(registry.hook, hook)
    impls = caller.get_hookimpls()
    if any(impl.wrapper or impl.hookwrapper for impl in impls):
        return around("", hook, caller)  # wrappers are pluggy's business
    # pluggy calls the last one registered first.
    calls = [around(impl.plugin_name, hook, _bound(impl, muted, caller.spec.argnames))
             for impl in reversed(impls)]  # fmt: skip
    if not calls:
        return cast("Callable[..., Any]", Nothing())
    if kind(hook) == "exclusive" or (len(calls) == 1 and kind(hook) != "vote"):
        return calls[0]
    return _each(calls, to_the_end=hook == "on_train_end")


def _bound(impl: HookImpl, muted: set[str], spec: tuple[str, ...]) -> Callable[..., Any]:
    call, names, plugin = cast("Callable[..., Any]", impl.function), impl.argnames, impl.plugin_name
    observes = getattr(impl.plugin, "observer", False)
    unwanted = [name for name in spec if name not in names]
    if not unwanted and not observes:
        return call

    def select(**given: Any) -> Any:
        if observes and plugin in muted:
            return None
        for name in unwanted:
            del given[name]
        try:
            return call(**given)
        except Exception as error:
            if not observes or isinstance(error, SettingsError):
                raise
            muted.add(plugin)
            log.warning("%s failed and is muted from now on: %r", plugin, error, exc_info=error)

    return select


def _each(calls: list[Callable[..., Any]], to_the_end: bool) -> Callable[..., list[Any]]:
    def call_each(**given: Any) -> list[Any]:
        answers: list[Any] = []
        errors: list[Exception] = []
        for call in calls:  # a comprehension would be one more call in every step
            try:
                answers.append(call(**given))
            except Exception as error:
                if not to_the_end:
                    raise
                errors.append(error)
        if errors:
            raise errors[0]
        return answers

    return call_each
