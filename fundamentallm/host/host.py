"""The application that plugins belong to, and what a plugin's hooks must be to fit it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import attrs

from fundamentallm.host.mistakes import Mistake, suggest
from fundamentallm.host.sources import Source
from fundamentallm.host.specs import HookFacts, Kind, hook_facts


def _nothing_more(_: Source, __: Mapping[str, Any]) -> None:
    """Check nothing."""


def _never(_: str, __: Exception) -> bool:
    """Let no error of an observer end the application."""
    return False


@attrs.frozen
class Known:
    """A plugin that the application knows of without loading it."""

    distribution: str
    role: str


@attrs.frozen(kw_only=True)
class Host:
    """An application that plugins extend."""

    name: str
    """Of the application, of its entry-point group and of its pluggy markers."""
    hooks: type
    """The class whose methods specify the hooks, each with a marker of ``markers(name)``."""
    table: type
    """The class that describes the application's own table."""
    error: Callable[[list[Mistake]], Exception]
    """Makes the exception that is raised with the mistakes that were found."""
    required: tuple[str, ...] = ()
    """Exclusive hooks that have no default."""
    known: Mapping[str, Known] = attrs.field(factory=dict)
    """The plugins to suggest, by name, whether they are installed or not."""
    check: Callable[[Source, Mapping[str, Any]], None] = _nothing_more
    """Notes in the source what else is wrong with the built plugins and the own table together."""
    to_the_end: tuple[str, ...] = ()
    """Events that reach every plugin even if one before it raised; the first error follows."""
    fatal: Callable[[str, Exception], bool] = _never
    """Whether an error that an observer raised in a hook is raised all the same."""
    roles: Mapping[str, Collection[str]] = attrs.field(
        factory=lambda: {"control": (), "observer": ()}
    )
    """What a plugin is for (see ``role_of``) -> the hooks whose answers are the work of that role.
    Roles without hooks are harmless: their plugins must not answer the hooks of another role. A
    plugin of the role ``"observer"`` is muted when it fails."""
    version: str = "0.0"
    """Of the application: which deprecated hooks it no longer accepts."""
    own: str = "run"
    """The name of the application's own table."""

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hooks, in the order in which their class states them."""
        return tuple(name for name in vars(self.hooks) if not name.startswith("_"))

    def facts(self, hook: str) -> HookFacts:
        """Return what the specification of a hook states about it."""
        return hook_facts(self.hooks, hook)

    def kind(self, hook: str) -> Kind:
        """Return how a hook combines its implementations.

        Of an exclusive hook one plugin answers, and wrappers may surround it; votes are combined;
        an event ignores what is returned; edits change the same thing in a declared order.
        """
        return self.facts(hook).kind

    @property
    def reserved(self) -> tuple[str, ...]:
        """Names that no plugin may have."""
        return (self.own, "plugins", "extends", "core")


def hook_methods(host: Host, cls: type) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield the name, options and function of every method marked as a hook."""
    for name, function in inspect.getmembers(cls, inspect.isroutine):
        if options := getattr(function, f"{host.name}_impl", None):
            yield options.get("specname") or name, options, function


def role_of(host: Host, cls: type) -> str:
    """Return the role of a plugin class: the one that it declares, else one that its hooks imply.

    A class that answers a hook of a role has the first such role. One that only wraps or edits has
    the last role with hooks, and one with none of these hooks the first role without hooks.
    """
    declared = getattr(cls, "role", None)
    if isinstance(declared, str):
        return declared
    working = [role for role, hooks in host.roles.items() if hooks]
    for role in working:
        if _answered(host, cls, host.roles[role]):
            return role
    methods = {hook for hook, _, _ in hook_methods(host, cls)}
    if any(methods & {*host.roles[role]} for role in working):
        return working[-1]
    return next(role for role, hooks in host.roles.items() if not hooks)


def _answered(host: Host, cls: type, hooks: Collection[str]) -> list[str]:
    """Return which of some hooks a class answers or votes in: more than wrapping or editing."""
    return [
        hook
        for hook, options, _ in hook_methods(host, cls)
        if hook in hooks and not options["wrapper"] and host.kind(hook) != "edit"
    ]


def answering(host: Host, plugins: Mapping[str, object]) -> dict[str, list[str]]:
    """Return for each hook the names of the plugins that answer it, wrappers aside."""
    answers: dict[str, list[str]] = {}
    for name, instance in plugins.items():
        for hook, options, function in hook_methods(host, type(instance)):
            # A method that an instance hides behind None is no hook of it, for pluggy neither.
            hidden = getattr(instance, function.__name__, None) is None
            if hook in host.hook_names and not options["wrapper"] and not hidden:
                answers.setdefault(hook, []).append(name)
    return answers


def class_problems(host: Host, cls: type) -> Iterator[str]:
    """Yield what is wrong with the hooks of one plugin class."""
    hooks = host.hook_names
    yield from _role_problems(host, cls)
    methods = {name: method for name, *method in hook_methods(host, cls)}
    if not methods:
        yield f"class {cls.__name__} has no method that is marked with @hookimpl"
    # pluggy ignores a method without the marker, and gives no warning.
    for name in (hook for hook in hooks if hasattr(cls, hook) and hook not in methods):
        yield f"method {name} is named like a hook but lacks @hookimpl"
    for name, (options, function) in methods.items():
        if name in hooks:
            known = list(inspect.signature(getattr(host.hooks, name)).parameters)
            yield from _wrapper_problems(name, host.kind(name), options, function)
            yield from _argument_problems(name, function, known)
            taken = tuple(inspect.signature(function).parameters)
            yield from host.facts(name).removed(name, taken, host.version)
        else:
            yield f"there is no hook {name!r}{suggest(name, hooks)}"


def _role_problems(host: Host, cls: type) -> Iterator[str]:
    role = role_of(host, cls)
    working = [name for name, hooks in host.roles.items() if hooks]
    if role not in host.roles:
        yield f"role: unknown role {role!r}{suggest(role, host.roles)}"
    elif role not in working:
        hooks = {hook for name in working for hook in host.roles[name]}
        for hook in _answered(host, cls, hooks):
            wanted = " or ".join(map(repr, working))
            yield f"{hook}: a plugin whose role is {role!r} must not answer it; expected {wanted}"


def _wrapper_problems(
    name: str, kind: Kind, options: Mapping[str, Any], function: Any
) -> Iterator[str]:
    if options["wrapper"] and kind != "exclusive":
        yield f"{name} cannot be wrapped: only exclusive hooks can"
    if options["wrapper"] != inspect.isgeneratorfunction(function):
        yield f"{name}: a wrapper, hookimpl(wrapper=True), must yield, and only a wrapper may"


def _argument_problems(name: str, function: Any, known: list[str]) -> Iterator[str]:
    for word, parameter in inspect.signature(function).parameters.items():
        if word not in known:
            yield f"{name} has no argument {word!r}; known: {', '.join(known[1:])}"
        # pluggy passes only what can be given by position and has no default.
        elif parameter.default is not parameter.empty or parameter.kind.name == "KEYWORD_ONLY":
            yield f"{name} would never get {word!r}: take it by position and without default"
