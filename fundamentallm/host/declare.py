"""What a plugin's author writes: ``@plugin`` classes with ``field()`` settings and ``state()``."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from itertools import pairwise
from typing import Any, Literal, TypeVar, cast, dataclass_transform

import attrs

C = TypeVar("C", bound=type)

field = attrs.field


def state(default: Any = None, *, factory: Any = None, init: Literal[False] = False) -> Any:
    """Declare a field that is not a setting but state, which the application keeps and gives back
    under the plugin's instance name: in a training run, in every checkpoint. Tensors and JSON
    values only."""
    chosen = attrs.Factory(factory) if factory is not None else default
    return attrs.field(init=init, default=chosen, metadata={"state": True})


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(attrs.field, state))
def plugin(cls: C) -> C:
    """Make a class a plugin: its fields are its TOML table, its ``@hookimpl`` methods its part.

    Class attributes the core knows, all optional:

    - ``role``: what the plugin is for. ``"data"``, ``"model"`` and ``"optimizer"`` build these;
      ``"training"`` changes how the weights are updated (clipping, schedules, mixed precision);
      ``"control"`` decides about the run but changes no weights (early stopping, validation);
      ``"saver"`` writes checkpoints; ``"observer"`` shows or records (loggers, bars, profilers).
      An observer that fails is muted with a warning, and the run goes on. The last three must not
      answer a hook that changes data or weights: a start-up check refuses it. Without a
      declaration the hooks imply the role, never ``"saver"`` or ``"observer"``.
    - ``before`` / ``after``: names of plugins that its edits come before or after.
    - ``produces``: metric names (or ``*`` patterns) it logs, so that a ``monitor`` finds them.
    - ``has_epochs``: whether the data it builds has epochs; a property may answer by the settings.
    - ``changeable``: settings that may be given another value while a run goes on.
    - ``free``: of a plugin that changes data or weights, the settings (names or patterns) that
      may still differ when a run is resumed; ``("*",)``: it may also be added and removed.
    - ``speaks_for_all``: exclusive hooks that one instance answers for all instances of the class.
    """
    # Equality by value would make pluggy take two equal instances for one.
    # Checked when they are read, and not again at every `self.count += 1` in a step.
    unchecked = attrs.setters.NO_OP
    return attrs.define(eq=False, kw_only=True, slots=False, on_setattr=unchecked)(cls)


@dataclass_transform(kw_only_default=True, field_specifiers=(attrs.field,))
def table(cls: C) -> C:
    """Make a class that describes a table inside a plugin's table, by its fields."""
    return attrs.frozen(kw_only=True)(cls)


def plugin_name(cls: type) -> str:
    """``EarlyStopping`` -> ``early_stopping``, the name of a class that nothing else names."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()


def setting_fields(cls: type) -> dict[str, attrs.Attribute[Any]]:
    """Return the fields of a plugin or table that a TOML table may set, with types resolved."""
    settings = [a for a in attrs.fields(cls) if a.init]
    attrs.resolve_types(cls, attribs=settings, include_extras=True)
    return {a.name: a for a in settings}


def state_fields(cls: type) -> list[str]:
    """Return the names of the ``state()`` fields of a plugin class."""
    return [a.name for a in attrs.fields(cls) if a.metadata.get("state")]


def attribute_docs(cls: type) -> dict[str, str]:
    """Return the docstrings under the fields of a class, in one line each; {} without source."""
    # From the source code: Python does not keep the texts under fields.
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    lines = body.body if isinstance(body, ast.ClassDef) else []
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in pairwise(lines)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def get_state(instance: object) -> dict[str, Any]:
    """Return the state of a plugin: its ``get_state()``, or its ``state()`` fields."""
    own = getattr(instance, "get_state", None)
    if own is not None:
        return cast("dict[str, Any]", own())
    return {name: getattr(instance, name) for name in state_fields(type(instance))}


def renew(instance: Any) -> None:
    """Give an object the state with which it was made, and keep its settings.

    The fields that are no settings get their defaults; what the class derives in
    ``__attrs_post_init__`` is derived again. A field with the metadata ``{"lasting": True}``
    keeps its value: an object that carries something from one run to another needs one.
    """
    if not attrs.has(type(instance)):
        return
    fields = attrs.fields(type(instance))
    given = {field.name: getattr(instance, field.name) for field in fields if field.init}
    for field in fields:
        default: Any = field.default
        if field.init or default is attrs.NOTHING or field.metadata.get("lasting"):
            continue
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory(instance) if default.takes_self else default.factory()
        setattr(instance, field.name, default)
    derive = getattr(instance, "__attrs_post_init__", None)
    if derive is not None:
        derive()
        # It may change settings (`self.lr *= 2`), and had done so before the first run.
        for name, value in given.items():
            setattr(instance, name, value)


def set_state(instance: object, kept: dict[str, Any]) -> None:
    """Give a plugin its state back."""
    own = getattr(instance, "set_state", None)
    if own is not None:
        own(kept)
        return
    # Another version may have saved more fields or fewer.
    for name in set(state_fields(type(instance))) & set(kept):
        setattr(instance, name, kept[name])
