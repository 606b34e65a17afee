"""A plugin that fails in any hook: an observer is muted, any other ends the run and is named."""

from __future__ import annotations

import re
from functools import partial, wraps

import layer
import pytest
import tiny
from draws import often
from hypothesis import strategies as st
from tiny import EVERY

from fundamentallm import HOOKS as CONTRACT
from fundamentallm import Period, PluginError, compose, hookimpl, kind, plugin, role_of, train
from fundamentallm.testing import assert_same_weights, compose_tiny
from fundamentallm_checkpoint import Checkpoint

OTHERS = ("agree", "spread", "on_histogram", "finish_model")
HOOKS = [hook for hook in CONTRACT if hook not in OTHERS]
"""The hooks that every run emits; the others belong to several processes, to `grad_stats` and to
commands."""
BEFORE = HOOKS[: HOOKS.index("on_train_start")]
"""The hooks of a start: a failure there is one before the first step."""
ONCE = {*BEFORE, "read_checkpoint", "on_train_start", "on_train_end"}
CALLS = {"on_epoch_start": 3, "on_epoch_end": 2}
"""How often a run of `tiny` emits the hooks that it emits seldom."""
EXCLUSIVE = {name for name in HOOKS if kind(name) == "exclusive"}
NEUTRAL = {"lr_factor": "1.0"}

FAILING = '''
from fundamentallm import hookimpl, plugin

@plugin
class Failing:
    """Fails in one hook, at one of its calls."""

    at: int = 1
    """Which call fails."""

    role = "{role}"
    calls = 0

    @hookimpl(wrapper={wrapper})
    def {hook}(self):
        self.calls += 1
        if self.calls == self.at:
            raise ValueError("out of order")
        {rest}
'''


def source(hook, observer):
    """Write a plugin that fails in a hook: where one plugin answers, it surrounds the answer."""
    wrapper = hook in EXCLUSIVE
    rest = "return (yield)" if wrapper else f"return {NEUTRAL.get(hook)}"
    role = "observer" if observer else "training"
    return FAILING.format(hook=hook, role=role, wrapper=wrapper, rest=rest)


def failing(hook, *, observer, at):
    space: dict = {"__name__": "failing"}
    exec(source(hook, observer), space)
    return space["Failing"](at=at)


@plugin
class Rewinds:
    """Goes back once, so that there is a rewind to fail in."""

    done: bool = False

    @hookimpl
    def on_step_end(self, run):
        if run.progress.step == 5 and not self.done:
            self.done = True
            run.rewind("latest")


def parts(hook):
    # A run that is resumed without a plugin of the role "training" needs this permission.
    saver = Checkpoint(
        every=Period(2),
        asynchronous=hook != "on_checkpoint_saved",
        allow_changes=["failing"],
    )
    return [saver, *([Rewinds()] if hook == "on_rewind" else [])]


# A plugin that votes on the learning rate changes the run, so it is no observer.
OBSERVED = [hook for hook in HOOKS if hook not in ("lr_factor", "judge_step")]
SETTINGS = {"length": 8, "validate_every": 3, "log_every": 1}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The run without the plugin that fails: one that goes back, and one that does not."""
    made = {}
    for hook in ("on_rewind", "on_log"):
        composed = compose_tiny(*parts(hook), **SETTINGS)
        made[hook] = train(composed, run_dir=tmp_path_factory.mktemp("whole") / "run")
    return lambda hook: made["on_rewind" if hook == "on_rewind" else "on_log"]


@pytest.mark.parametrize("hook", OBSERVED)
def test_an_observer_that_fails_is_muted_with_one_warning(hook, wholes, tiny_run, tmp_path, caplog):
    run = tiny_run(
        *parts(hook), failing(hook, observer=True, at=1), run_dir=tmp_path / "run", **SETTINGS
    )
    warnings = [r.getMessage() for r in caplog.records if "failed and is muted" in r.getMessage()]
    assert warnings == ["failing failed and is muted from now on: ValueError('out of order')"]
    assert run.outcome == "finished"
    assert_same_weights(run, wholes(hook))


@pytest.mark.parametrize("hook", HOOKS)
def test_any_other_plugin_that_fails_ends_the_run_and_is_named(hook, wholes, tiny_run, tmp_path):
    folder = tmp_path / "run"
    once = hook in ONCE or hook == "on_rewind"
    with pytest.raises(PluginError, match=rf"plugin 'failing' \(.*\) failed in {hook}: ValueError"):
        tiny_run(
            *parts(hook),
            failing(hook, observer=False, at=1 if once else 2),
            run_dir=folder,
            **SETTINGS,
        )
    assert tiny.unsound(folder) == []
    kept = folder / "checkpoints"
    assert once or hook in ("on_checkpoint_saved", "validate", "on_validation_end") or kept.exists()
    resumed = tiny_run(*parts(hook), run_dir=folder, **SETTINGS)
    assert_same_weights(resumed, wholes(hook))


class Failing(Exception):
    """What the plugins of a run may raise here."""


def raises(plugin, hook, step):
    """Let one of the run's own plugins raise in a hook, at its first call after so many steps."""
    cls = CLASSES[plugin]
    original = getattr(cls, hook)

    @wraps(original)
    def fails(self, *words, **named):
        run = layer.running[0]
        due = run.progress.step >= step or not hasattr(run, "stream")
        if due and not hasattr(run, "has_failed"):
            run.has_failed = True
            print("failed in step", run.progress.step, flush=True)
            raise Failing("out of order")
        return original(self, *words, **named)

    setattr(cls, hook, fails)
    layer.prepared()


CLASSES = {name: type(instance) for name, instance in compose(tiny.TABLES).plugins.items()}
PAIRS = [
    (name, hook)
    for name, cls in CLASSES.items()
    for hook in HOOKS
    if getattr(getattr(cls, hook, None), "fundamentallm_impl", None) and hook != "on_rewind"
]
"""Whose hooks are called: no run here goes back."""


def own_plugin_fails(uninterrupted, drawn, folder):
    """Let a plugin of the run fail, and see that it goes on, or is resumed, to the same bits; False
    if that hook was not called any more."""
    (name, hook), step = drawn
    started = tiny.start(
        "train",
        uninterrupted.settings,
        "--run-dir",
        folder,
        before=partial(raises, name, hook, step),
    )
    code, said = started.wait(), started.said
    if "failed in step" not in said:
        assert code == 0, said
        return False
    muted = said.count(f"{name} failed and is muted from now on")
    if role_of(CLASSES[name]) == "observer":
        assert (code, muted) == (0, 1), said
    else:
        failure = rf"plugin '{name}' \(fundamentallm-[a-z-]+ [^)]+\) failed in {hook}: Failing"
        assert code == 7, said
        assert re.search(failure, said), said
        assert "Traceback" not in said
        check_newest(folder)
        tiny.end(tiny.start("train", uninterrupted.settings, "--run-dir", folder))
        assert tiny.rows(folder) == uninterrupted.rows
    assert tiny.unsound(folder) == []
    assert tiny.digest(folder) == uninterrupted.digest
    return True


def check_newest(folder):
    """See that all checkpoints are sound, and the newest that of the last save that was due."""
    assert tiny.unsound(folder) == []
    due = [step for step in tiny.SAVES if step < tiny.reached(folder)]
    assert max([0, *tiny.steps(folder)]) >= max([0, *due])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted({name for name, _ in PAIRS}))
def test_any_plugin_of_a_run_may_fail_in_any_of_its_hooks(name, uninterrupted, tmp_path):
    own = [pair for pair in PAIRS if pair[0] == name]
    drawn = st.sampled_from(own).flatmap(
        lambda pair: st.tuples(st.just(pair), st.integers(0, 0 if pair[1] in ONCE else tiny.LAST))
    )
    count = sum(1 if hook in ONCE else 8 for _, hook in own)
    often(count, drawn, partial(own_plugin_fails, uninterrupted), tmp_path)


@pytest.mark.parametrize("pair", [("ema", "settle_step"), ("jsonl", "on_log")])
def test_a_plugin_of_a_run_that_fails_is_named(pair, uninterrupted, tmp_path):
    assert own_plugin_fails(uninterrupted, (pair, 10), tmp_path / "run")


def in_a_process(hook, observer, at, uninterrupted, folder):
    folder.mkdir()
    (folder / "failing.py").write_text(source(hook, observer))
    settings = tiny.write_settings(folder)
    plain = settings.read_text()
    settings.write_text(
        plain.replace('"checkpoint",', '"checkpoint", "./failing.py",')
        + f"\n[failing]\nat = {at}\n"
    )
    started = tiny.start("train", settings, "--run-dir", folder / "run")
    code, said = started.wait(), started.said
    muted = said.count("failing failed and is muted from now on")
    if observer:
        assert (code, muted) in ((0, 1), (0, 0)), said
    else:
        assert code in (0, 7), said
        assert not code or re.search(
            rf"plugin 'failing' \(.*failing\.py\) failed in {hook}: ValueError", said
        )
        assert not code or "Traceback" not in said
    check_newest(folder / "run")
    if code:
        settings.write_text(plain)
        allowed = 'checkpoint.allow_changes=["failing"]'
        tiny.end(tiny.start("train", settings, "--run-dir", folder / "run", "--set", allowed))
    assert tiny.digest(folder / "run") == uninterrupted.digest
    assert tiny.rows(folder / "run") == uninterrupted.rows
    return code or muted


@pytest.mark.parametrize(
    ("hook", "observer"), [("on_log", True), ("forward", False), ("on_safe_point", False)]
)
def test_a_run_whose_plugin_has_failed_ends_with_the_same_bits_without_it(
    hook, observer, uninterrupted, tmp_path
):
    assert in_a_process(hook, observer, 9, uninterrupted, tmp_path / "it")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != "on_rewind"])
def test_a_plugin_may_fail_in_any_hook_at_any_step(hook, uninterrupted, tmp_path):
    once = hook in ONCE
    calls = 1 if once else CALLS.get(hook, tiny.LAST // EVERY)
    observes = st.booleans() if hook in OBSERVED else st.sampled_from([False])
    drawn = st.tuples(observes, st.integers(1, calls))
    often(
        2 if once and hook in OBSERVED else 1 if once else 4,
        drawn,
        lambda one, folder: in_a_process(hook, *one, uninterrupted, folder),
        tmp_path,
    )
