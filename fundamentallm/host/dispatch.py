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

from fundamentallm.host.host import role_of

if TYPE_CHECKING:
    from pluggy import HookImpl, PluginManager

    from fundamentallm.host.host import Host

Call: TypeAlias = Callable[..., Any]
Around: TypeAlias = Callable[[str, str, Call], Call]


class Nothing(tuple[()]):
    """A hook without implementations: callable, and false, so that a loop can pass it by."""

    __slots__ = ()

    def __call__(self, **_: Any) -> list[Any]:
        """Return no answers."""
        return []


def freeze(
    host: Host,
    registry: PluginManager,
    around: Around | None = None,
    *,
    muted: set[str] | None = None,
) -> Any:
    """Return an object with one callable per hook, which takes what the hook specifies.

    An exclusive hook returns its answer, any other the list of the answers. A plugin whose role is
    ``"observer"`` is muted with a warning once it has raised. ``around(plugin, hook, call)``
    may put a call of its own in place of each plugin's, to trace or time it; where wrappers
    surround an answer, also in place of the whole, with ``""`` for the plugin. ``muted`` are the
    observers that have been muted, shared by all that one has frozen with it.
    """
    around = around or (lambda _plugin, _hook, call: call)
    frozen = _Freezing(host, registry, around, set() if muted is None else muted)
    return SimpleNamespace(**{hook: frozen.caller(hook) for hook in host.hook_names})


@attrs.frozen
class _Freezing:
    host: Host
    registry: PluginManager
    around: Around
    muted: set[str]

    def caller(self, hook: str) -> Call:
        caller = getattr(self.registry.hook, hook)
        spec, impls = caller.spec.argnames, caller.get_hookimpls()
        # pluggy calls the last one registered first.
        calls = [
            self.around(impl.plugin_name, hook, self.bound(impl, hook, spec))
            for impl in reversed(impls)
            if not impl.wrapper
        ]
        kind = self.host.kind(hook)
        if not calls:
            return cast("Call", Nothing())
        if kind != "exclusive" and (len(calls) > 1 or kind == "vote"):
            return _each(calls, to_the_end=hook in self.host.to_the_end)
        call = calls[0]
        for impl in (impl for impl in impls if impl.wrapper):  # the last one is the outermost
            observes = self.observes(impl)
            observed = self.observed(call, impl, hook, spec) if observes else None
            call = observed or _surrounded(call, impl, spec)
        return call if call is calls[0] else self.around("", hook, call)

    def observes(self, impl: HookImpl) -> bool:
        """Return whether a failure of this implementation only mutes its plugin."""
        # The object with the host's own answers is no plugin, and has no role.
        return impl.plugin_name != "core" and role_of(self.host, type(impl.plugin)) == "observer"

    def bound(self, impl: HookImpl, hook: str, spec: tuple[str, ...]) -> Call:
        call, names, plugin = cast("Call", impl.function), impl.argnames, impl.plugin_name
        observes = self.observes(impl)
        unwanted = [name for name in spec if name not in names]
        if not unwanted and not observes:
            return call
        muted = self.muted

        def select(**given: Any) -> Any:
            if observes and plugin in muted:
                return None
            for name in unwanted:
                del given[name]
            try:
                return call(**given)
            except Exception as error:
                if not observes:
                    raise
                self.mute(plugin, hook, error)

        return select

    def observed(self, call: Call, impl: HookImpl, hook: str, spec: tuple[str, ...]) -> Call:
        """Put an observer's wrapper around a call: if it raises, the call is made without it."""
        plugin, function = impl.plugin_name, cast("Call", impl.function)
        wanted = [name for name in spec if name in impl.argnames]

        def observe(**given: Any) -> Any:
            if plugin in self.muted:
                return call(**given)
            steps = function(**{name: given[name] for name in wanted})
            try:
                next(steps)
            except Exception as error:  # noqa: BLE001 - what it is, is told
                self.mute(plugin, hook, error)
            answer = call(**given)
            try:
                steps.send(answer)
            except StopIteration as stop:
                # Muted before it began, it has nothing to return.
                return answer if plugin in self.muted else stop.value
            except Exception as error:  # noqa: BLE001 - what it is, is told
                self.mute(plugin, hook, error)
            return answer

        return observe

    def mute(self, plugin: str, hook: str, error: Exception) -> None:
        """Call an observer no more; raise an error that the host lets even an observer raise."""
        if self.host.fatal(hook, error):
            raise error
        self.muted.add(plugin)
        text = "%s failed and is muted from now on: %r"
        logging.getLogger(self.host.name).warning(text, plugin, error, exc_info=error)


def _surrounded(call: Call, impl: HookImpl, spec: tuple[str, ...]) -> Call:
    """Put a wrapper around a call: a generator that yields once, for the answer."""
    function, unwanted = cast("Call", impl.function), [n for n in spec if n not in impl.argnames]

    def surround(**given: Any) -> Any:
        wanted = dict(given)
        for name in unwanted:
            del wanted[name]
        steps = function(**wanted)
        try:
            next(steps)
        except StopIteration:
            raise RuntimeError(f"{impl.plugin_name}: a wrapper did not yield") from None
        try:
            answer = call(**given)
        except BaseException as error:  # noqa: BLE001 - the wrapper's to leave with, or to answer
            resume, sent = steps.throw, error
        else:
            resume, sent = steps.send, answer
        try:
            resume(sent)
        except StopIteration as stop:
            return stop.value
        raise RuntimeError(f"{impl.plugin_name}: a wrapper yielded twice")

    return surround


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


def blame(error: BaseException, registry: PluginManager, brought: Mapping[str, str]) -> str | None:
    """Tell which plugin raised an error, in which hook and line; None if it was none of them."""
    codes = {
        impl.function.__code__: (name, caller.name)
        for name, plugin in registry.list_name_plugin()
        if name != "core"
        for caller in registry.get_hookcallers(plugin) or ()
        for impl in caller.get_hookimpls()
        if impl.plugin is plugin
    }
    found, place, trace = ("", ""), "", error.__traceback__
    while trace is not None:
        found = codes.get(trace.tb_frame.f_code, found)
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    name, hook = found
    who = f"plugin {name!r} ({brought.get(name)})"
    return f"{who} failed in {hook}: {error!r}, at {place}" if name else None
