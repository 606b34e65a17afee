"""A host of its own: nothing in `fundamentallm.host` depends on what the training core does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import attrs
import pluggy
import pytest

from fundamentallm import host as hosting

README = Path(__file__).parents[2] / "docs" / "host.md"
hookimpl = pluggy.HookimplMarker("cook")
exclusive, vote, event, edit = hosting.markers("cook")


class Burnt(Exception):
    pass


class Hooks:
    @exclusive(since="0.1")
    def taste(self, dish: str) -> str:
        """Exclusive: say what it tastes of."""

    @edit(since="0.1")
    def edit_dish(self, dish: list[str]) -> None:
        """Edit: add to it."""

    @event(since="0.1")
    def on_served(self, dish: str) -> None:
        """Event: it is on the table."""


@hosting.plugin
class Kitchen:
    """The [kitchen] table."""

    stoves: int = hosting.field(default=1, validator=attrs.validators.ge(1))


def host(**more):
    return hosting.Host(
        name="cook",
        hooks=Hooks,
        table=Kitchen,
        error=lambda found: Burnt("\n".join(map(str, found))),
        own="kitchen",
        **more,
    )


def composed(*plugins, settings=None, **more):
    source = hosting.read({"plugins": [], **(settings or {})})
    return hosting.compose(host(**more), source, plugins=plugins)


def frozen(*plugins, around=None, **more):
    made = composed(*plugins, **more)
    registry = hosting.register(made.host, made, {"taste": hookimpl(lambda dish: "nothing")})
    return hosting.freeze(made.host, registry, around)


@hosting.plugin
class Salt:
    """Adds salt."""

    after = ("pepper",)
    grams: float = 1.0

    @hookimpl
    def edit_dish(self, dish):
        dish.append("salt")


@hosting.plugin
class Pepper:
    """Adds pepper."""

    @hookimpl
    def edit_dish(self, dish):
        dish.append("pepper")

    @hookimpl
    def taste(self):
        return "fire"


def test_the_example_of_the_readme_runs(tmp_path):
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "greet.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "greet.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("WORLD?\n" * 3, "")


def test_the_own_table_has_the_name_that_the_host_gives_it():
    made = composed(settings={"kitchen": {"stoves": 3}})
    assert made.own.stoves == 3
    assert made.tables == {"plugins": [], "kitchen": {"stoves": 3}}
    with pytest.raises(Burnt, match=r"kitchen\.stovs: unknown setting \(did you mean 'stoves'"):
        composed(settings={"kitchen": {"stovs": 3}})


def test_a_table_named_run_is_unknown_to_a_host_that_calls_its_own_otherwise():
    with pytest.raises(Burnt, match="run: unknown table"):
        composed(settings={"run": {}})


def test_edits_run_in_their_declared_order_whatever_the_list():
    for plugins in ((Salt(), Pepper()), (Pepper(), Salt())):
        dish = []
        frozen(*plugins).edit_dish(dish=dish)
        assert dish == ["pepper", "salt"]


def test_a_plugin_answers_in_place_of_the_default():
    assert frozen().taste(dish="soup") == "nothing"
    assert frozen(Pepper()).taste(dish="soup") == "fire"


def test_a_hook_without_implementations_is_false_and_can_be_called():
    hooks = frozen()
    assert not hooks.on_served
    assert hooks.on_served(dish="soup") == []


def test_all_missing_required_hooks_are_reported_together():
    with pytest.raises(Burnt, match="no plugin answers taste: list one that does"):
        composed(Salt(), required=("taste",))


def test_the_host_s_own_check_sees_everything_that_was_built():
    seen = {}
    composed(Salt(), check=lambda source, built: seen.update(built))
    assert seen.keys() == {"salt", "kitchen"}
    with pytest.raises(Burnt, match=r"salt\.grams: too much"):
        composed(Salt(), check=lambda source, _: source.blame(("salt", "grams"), "too much"))


def test_an_observer_is_muted_but_for_what_the_host_calls_fatal(caplog):
    @hosting.plugin
    class Critic:
        role = "observer"
        error: type = ValueError
        calls: int = 0

        @hookimpl
        def on_served(self):
            self.calls += 1
            raise self.error("bland")

    critic = Critic()
    hooks = frozen(critic, fatal=lambda _, error: isinstance(error, Burnt))
    hooks.on_served(dish="soup")
    hooks.on_served(dish="soup")
    assert critic.calls == 1
    assert "critic failed and is muted from now on" in caplog.text
    with pytest.raises(Burnt):
        frozen(Critic(error=Burnt), fatal=lambda _, error: isinstance(error, Burnt)).on_served(
            dish="soup"
        )


def test_events_that_the_host_names_reach_every_plugin_even_if_one_fails():
    received = []

    @hosting.plugin
    class Breaks:
        @hookimpl
        def on_served(self):
            raise KeyError("plate")

    @hosting.plugin
    class Receives:
        @hookimpl
        def on_served(self):
            received.append(1)

    with pytest.raises(KeyError):
        frozen(Breaks(), Receives()).on_served(dish="soup")
    assert received == []
    with pytest.raises(KeyError):
        frozen(Breaks(), Receives(), to_the_end=("on_served",)).on_served(dish="soup")
    assert received == [1]


def wrapping(name, *, before=None, after=None, observer=False):
    """Return a plugin whose wrapper of ``taste`` notes what passes, and may raise before or after."""
    seen = []

    def taste(self, dish):
        seen.append(("in", dish))
        if before:
            raise before
        try:
            answer = yield
        except ValueError as error:
            return f"{name} survived {error}"
        if after:
            raise after
        return f"{name}({answer})"

    space = {
        "taste": hookimpl(wrapper=True)(taste),
        "role": "observer" if observer else "control",
        "seen": seen,
    }
    return hosting.plugin(type(name, (), space))()


def test_wrappers_surround_the_answer_the_first_listed_outermost_as_in_pluggy():
    plugins = (wrapping("One"), wrapping("Two"), Pepper())
    assert frozen(*plugins).taste(dish="soup") == "One(Two(fire))"
    made = composed(*plugins)
    assert hosting.register(made.host, made, {}).hook.taste(dish="soup") == "One(Two(fire))"


def test_a_wrapper_may_answer_for_an_error_or_let_it_pass():
    @hosting.plugin
    class Spills:
        error: BaseException = None

        @hookimpl
        def taste(self):
            raise self.error

    assert (
        frozen(wrapping("One"), Spills(error=ValueError("heat"))).taste(dish="soup")
        == "One survived heat"
    )
    for error in (KeyError("spoon"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            frozen(wrapping("One"), Spills(error=error)).taste(dish="soup")


def test_a_wrapper_that_raises_ends_the_call_unless_it_observes(caplog):
    for words in ({"before": KeyError("spoon")}, {"after": KeyError("spoon")}):
        with pytest.raises(KeyError):
            frozen(wrapping("One", **words), Pepper()).taste(dish="soup")
        watching = wrapping("Watching", observer=True, **words)
        hooks = frozen(watching, Pepper(), wrapping("Two"))
        assert hooks.taste(dish="soup") == "Two(fire)"
        assert hooks.taste(dish="soup") == "Two(fire)"
        assert watching.seen == [("in", "soup")]
        assert "watching failed and is muted from now on" in caplog.text


def test_an_observer_s_wrapper_that_works_is_a_wrapper_like_any_other():
    assert frozen(wrapping("One", observer=True), Pepper()).taste(dish="soup") == "One(fire)"


@pytest.mark.parametrize("times", [0, 2])
def test_a_wrapper_that_does_not_yield_exactly_once_is_an_error(times):
    @hosting.plugin
    class Odd:
        @hookimpl(wrapper=True)
        def taste(self):
            for _ in range(times):
                yield

    with pytest.raises(RuntimeError, match="odd: a wrapper (did not yield|yielded twice)"):
        frozen(Odd(), Pepper()).taste(dish="soup")


def test_every_call_can_be_timed_around():
    seen = []

    def around(plugin, hook, call):
        def timed(**given):
            seen.append((plugin, hook))
            return call(**given)

        return timed

    hooks = frozen(Salt(), Pepper(), around=around)
    hooks.edit_dish(dish=[])
    hooks.taste(dish="soup")
    assert seen == [("pepper", "edit_dish"), ("salt", "edit_dish"), ("pepper", "taste")]


def test_an_error_is_blamed_on_the_plugin_that_raised_it():
    @hosting.plugin
    class Drops:
        @hookimpl
        def on_served(self):
            raise KeyError("plate")

    made = composed(Drops())
    registry = hosting.register(made.host, made, {})
    try:
        hosting.freeze(made.host, registry).on_served(dish="soup")
    except KeyError as error:
        said = hosting.blame(error, registry, made.brought)
    assert said.startswith("plugin 'drops' (")
    assert "failed in on_served: KeyError('plate'), at " in said
    assert hosting.blame(KeyError("elsewhere"), registry, made.brought) is None


def test_the_marker_of_a_specification_states_the_kind_of_the_hook():
    cook = host()
    kinds = {name: cook.kind(name) for name in cook.hook_names}
    assert kinds == {"taste": "exclusive", "edit_dish": "edit", "on_served": "event"}


class OldHooks:
    @event(since="0.1", deprecated=hosting.Deprecated(since="0.4", use="on_served"))
    def on_dish(self, dish: str) -> None:
        """Event: the old name."""

    @event(since="0.1", deprecated_arguments={"plate": hosting.Deprecated(since="0.4", use="dish")})
    def on_served(self, dish: str, plate: str) -> None:
        """Event: it is on the table."""


@hosting.plugin
class OldName:
    """Implements a hook under its old name."""

    @hookimpl
    def on_dish(self, dish):
        return dish


@hosting.plugin
class OldArgument:
    """Takes an argument that has another name now."""

    @hookimpl
    def on_served(self, plate):
        return plate


def registered(version, *plugins):
    made = hosting.Host(
        name="cook",
        version=version,
        hooks=OldHooks,
        table=Kitchen,
        error=lambda found: Burnt("\n".join(map(str, found))),
        own="kitchen",
    )
    found = hosting.compose(made, hosting.read({"plugins": []}), plugins=plugins)
    return hosting.freeze(made, hosting.register(made, found, {}))


@pytest.mark.parametrize("version", ["0.4.0", "0.5.2"])
def test_a_deprecated_hook_works_for_two_minor_versions_and_warns_of_its_end(version):
    with pytest.warns(
        FutureWarning,
        match="^hook 'on_dish' is deprecated since 0.4 and is an error from 0.6 on: use on_served$",
    ):
        hooks = registered(version, OldName())
    assert hooks.on_dish(dish="soup") == "soup"


@pytest.mark.parametrize("version", ["0.4.0", "0.5.2"])
def test_a_deprecated_argument_works_for_two_minor_versions_and_warns_of_its_end(version):
    with pytest.warns(
        FutureWarning,
        match="^argument 'plate' of on_served is deprecated since 0.4"
        " and is an error from 0.6 on: use dish$",
    ):
        hooks = registered(version, OldArgument())
    assert hooks.on_served(dish="soup", plate="soup") == "soup"


@pytest.mark.parametrize("version", ["0.6.0", "0.10.1", "1.0"])
def test_after_two_minor_versions_what_was_deprecated_is_a_start_up_error(version):
    with pytest.raises(Burnt) as caught:
        registered(version, OldName(), OldArgument())
    said = str(caught.value)
    assert "the hook 'on_dish' was removed in 0.6: use on_served" in said
    assert "the argument 'plate' of on_served was removed in 0.6: use dish" in said


def test_a_hook_that_is_not_deprecated_warns_of_nothing(recwarn):
    frozen(Salt(), Pepper())
    assert not recwarn.list


def test_the_environment_says_what_a_composition_ran_in():
    around = hosting.environment(composed(Salt()), ("attrs",), stoves=2)
    assert around["versions"].keys() == {"pluggy", "attrs"}
    assert "salt" in around["plugins"]
    assert around["command"] == sys.argv
    assert around["processor"]
    assert around["stoves"] == 2


def test_a_setting_named_as_a_mark_of_order_marks_nothing():
    @hosting.plugin
    class Late:
        after: int = 3

        @hookimpl
        def edit_dish(self, dish):
            dish.append("late")

    assert frozen(Late()).edit_dish(dish=[]) is None
    with pytest.raises(Burnt, match="edit the same thing"):
        composed(Late(), Salt())


@hosting.plugin
class Taster:
    """Tastes, if the setting says so."""

    tastes: bool = True

    def __attrs_post_init__(self) -> None:
        if not self.tastes:
            self.taste = None

    @hookimpl
    def taste(self) -> str:
        return "salt"


def test_a_method_that_an_instance_sets_to_none_is_no_hook_of_that_instance():
    assert frozen(Taster()).taste(dish="soup") == "salt"
    assert frozen(Taster(tastes=False)).taste(dish="soup") == "nothing"

    @hosting.plugin
    class Gourmet:
        @hookimpl
        def taste(self) -> str:
            return "thyme"

    assert frozen(Taster(tastes=False), Gourmet()).taste(dish="soup") == "thyme"
    with pytest.raises(Burnt, match="both answer"):
        composed(Taster(), Gourmet())


# ---------------------------------------------------------------------------------------------
# Roles

ROLES = {"cook": ("taste", "edit_dish"), "guest": (), "observer": ()}


def role(**space):
    """Return the role of a plugin class made of these attributes."""
    made = hosting.plugin(type("Made", (), space))
    return hosting.role_of(host(roles=ROLES), made)


def answer(self):
    return "fire"


def wrap(self):
    return (yield)


def test_a_role_follows_from_the_hooks_where_a_class_declares_none():
    assert role(taste=hookimpl(answer)) == "cook"
    assert role(taste=hookimpl(wrapper=True)(wrap)) == "cook"
    assert role(edit_dish=hookimpl(answer)) == "cook"
    assert role(on_served=hookimpl(answer)) == "guest"


def test_a_declared_role_stands():
    assert role(role="observer", taste=hookimpl(wrapper=True)(wrap)) == "observer"
    assert role(role="observer", on_served=hookimpl(answer)) == "observer"


def test_an_unknown_role_is_refused_at_the_start():
    @hosting.plugin
    class Critic:
        role = "obsrver"

        @hookimpl
        def on_served(self): ...

    with pytest.raises(Burnt, match=r"role: unknown role 'obsrver' \(did you mean 'observer'\?\)"):
        composed(Critic(), roles=ROLES)


@pytest.mark.parametrize("harmless", ["guest", "observer"])
def test_a_plugin_with_a_harmless_role_must_not_answer_what_makes_a_difference(harmless):
    def made(**space):
        return hosting.plugin(type("Made", (), {"role": harmless, **space}))()

    with pytest.raises(Burnt, match=f"taste: a plugin whose role is '{harmless}' must not answer"):
        composed(made(taste=hookimpl(answer)), roles=ROLES)
    composed(made(taste=hookimpl(wrapper=True)(wrap)), roles=ROLES)
    composed(made(edit_dish=hookimpl(answer)), roles=ROLES)


def test_a_setting_named_role_is_no_role():
    @hosting.plugin
    class Guest:
        role: str = "cook"

        @hookimpl
        def on_served(self): ...

    assert hosting.role_of(host(roles=ROLES), Guest) == "guest"
