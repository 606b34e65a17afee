"""The hooks of a host as plain callables: what pluggy found, without its cost in every call.

A call through pluggy costs about a microsecond, and an empty one almost as much. Frozen, an
implementation is called directly, and a hook without implementations is false.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import attrs

from fundamentallm.host.host import role_of

if TYPE_CHECKING:
    from pluggy import HookImpl, PluginManager

    from fundamentallm.host.host import Host

Call: TypeAlias = Callable[..., Any]
Around: TypeAlias = Callable[[str, str, Call], Call]
Watch: TypeAlias = Callable[["HookImpl", Call], Call]


@attrs.frozen
class FirstCall:
    """What to check at the first call of a hook. Later calls do not pay for it."""

    before: Callable[[dict[str, Any]], None] | None = None
    """Receives the arguments before the call, and may replace them."""
    after: Callable[[HookImpl, Any, Mapping[str, Any]], bool] | None = None
    """Receives what one implementation returned, and the arguments. Raises if it is wrong; returns
    whether this was the last call to check."""


@attrs.frozen
class Shared:
    """What the namespaces that ``freeze`` makes for one run have in common."""

    muted: set[str] = attrs.field(factory=set)
    """Observers that failed."""
    unchecked: dict[str, FirstCall] = attrs.field(factory=dict)
    """What to check of the hooks whose first call is not over."""
    frozen: list[_Freezing] = attrs.field(factory=list)

    def check_next(self, hook: str, first: FirstCall) -> None:
        """Check the next call of a hook, too, in whatever namespace it is made."""
        self.unchecked[hook] = first
        self.bind(hook)

    def bind(self, hook: str) -> None:
        """Bind a hook in all namespaces: without implementations it is false in each at once."""
        for one in self.frozen:
            setattr(one.hooks, hook, one.caller(hook))


class EmptyHook(tuple[()]):
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
    shared: Shared | None = None,
) -> Any:
    """Return an object with one callable per hook, which takes what the hook specifies.

    An exclusive hook returns its answer, any other the list of the answers. A plugin whose role is
    ``"observer"`` is muted with a warning once it has raised. ``around(plugin, hook, call)``
    may put a call of its own in place of each plugin's, to trace or time it; where wrappers
    surround an answer, also in place of the whole, with ``""`` for the plugin. ``shared`` is what
    all that is frozen for one run has in common.
    """
    around = around or (lambda _plugin, _hook, call: call)
    frozen = _Freezing(host, registry, around, shared or Shared())
    frozen.shared.frozen.append(frozen)
    for hook in host.hook_names:
        setattr(frozen.hooks, hook, frozen.caller(hook))
    return frozen.hooks


@attrs.frozen
class _Freezing:
    host: Host
    registry: PluginManager
    around: Around
    shared: Shared
    hooks: SimpleNamespace = attrs.field(factory=SimpleNamespace)

    def caller(self, hook: str, watch: Watch | None = None) -> Call:
        """Return the calls of a hook as one; ``watch`` may surround that of each implementation."""
        if watch is None and hook in self.shared.unchecked:
            return self.checked(hook, self.shared.unchecked[hook])
        caller = getattr(self.registry.hook, hook)
        spec, impls = caller.spec.argnames, caller.get_hookimpls()
        # pluggy calls the last one registered first.
        answering = [impl for impl in reversed(impls) if not impl.wrapper]
        calls = [self.around(i.plugin_name, hook, self.bound(i, hook, spec)) for i in answering]
        if watch is not None:
            calls = list(map(watch, answering, calls))
        kind = self.host.kind(hook)
        if not calls:
            return cast("Call", EmptyHook())
        # A single event or edit needs no list, since its answer is ignored.
        if kind != "exclusive" and (len(calls) > 1 or kind == "vote"):
            return _each(calls, to_the_end=hook in self.host.to_the_end)
        call = calls[0]
        for impl in (impl for impl in impls if impl.wrapper):  # the last one is the outermost
            observes = self.observes(impl)
            observed = self.observed(call, impl, hook, spec) if observes else None
            call = observed or _surrounded(call, impl, spec)
            call = call if watch is None else watch(impl, call)
        return call if call is calls[0] else self.around("", hook, call)

    def checked(self, hook: str, first: FirstCall) -> Call:
        """Return a call that checks, and puts the plain one in its own place once that is done."""
        before, after, done = first.before, first.after, list[bool]()

        def watch(impl: HookImpl, call: Call) -> Call:
            if after is None:
                return call

            def watched(**given: Any) -> Any:
                answer = call(**given)
                done.append(after(impl, answer, given))
                return answer

            return watched

        def call_first(**given: Any) -> Any:
            if hook not in self.shared.unchecked:  # a plugin kept this call, or bound another one
                setattr(self.hooks, hook, self.caller(hook))
                return getattr(self.hooks, hook)(**given)
            if before is not None:
                before(given)
            done.clear()
            answer = self.caller(hook, watch)(**given)
            if all(done):
                self.shared.unchecked.pop(hook, None)  # a nested call may have been first
                self.shared.bind(hook)
            return answer

        return call_first

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
        muted = self.shared.muted

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
            if plugin in self.shared.muted:
                return call(**given)
            steps = function(**{name: given[name] for name in wanted})
            try:
                next(steps)
            except Exception as error:  # noqa: BLE001 - mute() warns of it
                self.mute(plugin, hook, error)
            answer = call(**given)
            try:
                steps.send(answer)
            except StopIteration as stop:
                # Muted before it began, it has nothing to return.
                return answer if plugin in self.shared.muted else stop.value
            except Exception as error:  # noqa: BLE001 - mute() warns of it
                self.mute(plugin, hook, error)
            return answer

        return observe

    def mute(self, plugin: str, hook: str, error: Exception) -> None:
        """Stop calling an observer; raise an error that the host lets even an observer raise."""
        # The error may be that of another plugin, which an event of the observer reached.
        raiser, _, _ = _raiser(error, self.registry)
        other = self.registry.get_plugin(raiser)
        failed = other is not None and role_of(self.host, type(other)) != "observer"
        if failed or self.host.fatal(hook, error):
            raise error
        self.shared.muted.add(plugin)
        text = "%s failed and is muted from now on: %r"
        logging.getLogger(self.host.name).warning(text, plugin, error, exc_info=error)


def _surrounded(call: Call, impl: HookImpl, spec: tuple[str, ...]) -> Call:
    """Put a wrapper around a call: a generator that yields once, for the answer."""
    function, unwanted = cast("Call", impl.function), [n for n in spec if n not in impl.argnames]

    def surround(**given: Any) -> Any:
        # A copy: the wrapped call needs all arguments.
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


def blame(
    error: BaseException, registry: PluginManager, brought: Mapping[str, object]
) -> str | None:
    """Return which plugin raised an error, in which hook and line; None if none of them did."""
    name, hook, place = _raiser(error, registry)
    who = f"plugin {name!r} ({brought.get(name)})"
    return f"{who} failed in {hook}: {error!r}, at {place}" if name else None


def _raiser(error: BaseException, registry: PluginManager) -> tuple[str, str, str]:
    """Return plugin, hook and line of the innermost hook in a traceback; empty if there is none."""
    # An error that the host's package raises was caused by the line that called it.
    own = f"{Path(__file__).parents[1]}{os.sep}"
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
        file = trace.tb_frame.f_code.co_filename
        if trace.tb_frame.f_code in codes or not file.startswith(own):
            place = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return *found, place
