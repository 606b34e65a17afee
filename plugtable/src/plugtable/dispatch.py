"""The hooks of a host as plain callables: what pluggy found, without its cost in every call.

A call through pluggy costs about a microsecond, and an empty one almost as much. Frozen, an
implementation is called directly, and a hook that nobody hears is false.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import attrs

if TYPE_CHECKING:
    from pluggy import HookImpl, PluginManager

    from plugtable.hosts import Host

Call: TypeAlias = Callable[..., Any]
Around: TypeAlias = Callable[[str, str, Call], Call]


class Nothing(tuple[()]):
    """A hook without implementations: callable, and false, so that a loop can pass it by."""

    __slots__ = ()

    def __call__(self, **_: Any) -> list[Any]:
        """Return no answers."""
        return []


def freeze(host: Host, registry: PluginManager, around: Around | None = None) -> Any:
    """Return an object with one callable per hook, which takes what the hook specifies.

    An exclusive hook returns its answer, any other the list of the answers. A plugin that declares
    ``observer = True`` is muted with a warning once it has raised. ``around(plugin, hook, call)``
    may put a call of its own in place of each plugin's, to trace or time it; a hook that wrappers
    surround is one call to it, with ``""`` for the plugin.
    """
    frozen = _Freezing(host, registry, around or (lambda _plugin, _hook, call: call))
    return SimpleNamespace(**{hook: frozen.caller(hook) for hook in host.hook_names})


@attrs.frozen
class _Freezing:
    host: Host
    registry: PluginManager
    around: Around
    muted: set[str] = attrs.field(factory=set)

    def caller(self, hook: str) -> Call:
        caller = getattr(self.registry.hook, hook)
        impls = caller.get_hookimpls()
        if any(impl.wrapper or impl.hookwrapper for impl in impls):
            return self.around("", hook, caller)  # wrappers are pluggy's business
        # pluggy calls the last one registered first.
        calls = [self.around(impl.plugin_name, hook, self.bound(impl, caller.spec.argnames))
                 for impl in reversed(impls)]  # fmt: skip
        kind = self.host.kind(hook)
        if not calls:
            return cast("Call", Nothing())
        if kind == "exclusive" or (len(calls) == 1 and kind != "vote"):
            return calls[0]
        return _each(calls, to_the_end=hook in self.host.to_the_end)

    def bound(self, impl: HookImpl, spec: tuple[str, ...]) -> Call:
        call, names, plugin = cast("Call", impl.function), impl.argnames, impl.plugin_name
        observes = getattr(impl.plugin, "observer", False)
        unwanted = [name for name in spec if name not in names]
        if not unwanted and not observes:
            return call
        muted, host = self.muted, self.host

        def select(**given: Any) -> Any:
            if observes and plugin in muted:
                return None
            for name in unwanted:
                del given[name]
            try:
                return call(**given)
            except Exception as error:
                if not observes or isinstance(error, host.fatal):
                    raise
                muted.add(plugin)
                text = "%s failed and is muted from now on: %r"
                logging.getLogger(host.name).warning(text, plugin, error, exc_info=error)

        return select


def _each(calls: list[Call], to_the_end: bool) -> Callable[..., list[Any]]:
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


def blame(
    error: BaseException, registry: PluginManager, brought: Mapping[str, str]
) -> str | None:
    """Tell which plugin raised an error, in which hook and line; None if it was none of them."""
    codes = {impl.function.__code__: (name, caller.name)
             for name, plugin in registry.list_name_plugin() if name != "core"
             for caller in registry.get_hookcallers(plugin) or ()
             for impl in caller.get_hookimpls() if impl.plugin is plugin}  # fmt: skip
    found, place, trace = ("", ""), "", error.__traceback__
    while trace is not None:
        found = codes.get(trace.tb_frame.f_code, found)
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    name, hook = found
    who = f"plugin {name!r} ({brought.get(name)})"
    return f"{who} failed in {hook}: {error!r}, at {place}" if name else None
