"""Every hook of the contract is emitted when, how often and with what the contract says."""

from __future__ import annotations

import copy
import inspect
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from fundamentallm import (
    HOOKS,
    Batch,
    Hooks,
    PluginError,
    Rejection,
    SettingsError,
    StorageError,
    about_hook,
    field,
    hookimpl,
    kind,
    plugin,
)
from fundamentallm.testing import Recorder, TinyData, TinySamples, assert_same_weights

EMITTED_BY_PLUGINS = {"on_checkpoint_saved", "on_histogram", "on_rewind"}
BETWEEN = {"agree", "gather", "spread"}  # of several processes: see test_processes.py
STEP = [
    "on_step_start",
    "collect_batches",
    "weigh_window",
    "train_microbatch",
    "forward",
    "backward",
    "finish_gradients",
    "judge_step",
    "edit_gradients",
    "lr_factor",
    "optimizer_step",
    "settle_step",
    "on_step_end",
    "stop_agreed",
]


def test_a_run_emits_its_hooks_in_the_documented_order(tiny_run):
    recorder = Recorder()
    tiny_run(length=2, log_every=1, trace=recorder)
    assert recorder.names == [
        "build_data",
        "build_tokenizer",
        "build_model",
        "adapt_model",
        "checkpoint_activations",
        "compile_model",
        "distribute_model",
        "build_optimizer",
        "read_checkpoint",
        "on_train_start",
        "on_epoch_start",
        *STEP,
        "reduce_metrics",
        "on_log",
        "on_safe_point",
        *STEP,
        "validate",
        "evaluation_weights",
        "forward",
        "on_progress",
        "measure_split",
        "reduce_metrics",
        "on_validation_end",
        "reduce_metrics",
        "on_log",
        "on_safe_point",
        "on_train_end",
    ]


def test_an_epoch_ends_between_its_last_step_and_what_follows_it(tiny_run):
    recorder = Recorder()
    tiny_run(length=4, trace=recorder)
    end = recorder.names.index("on_epoch_end")
    assert recorder.names[end - 1 : end + 2] == ["on_step_end", "on_epoch_end", "stop_agreed"]
    assert recorder.names.count("on_epoch_start") == 1


def test_hooks_are_emitted_with_exactly_the_arguments_of_their_specification(tiny_run):
    recorder = Recorder()
    tiny_run(trace=recorder)
    for hook, given in recorder.calls:
        expected = set(inspect.signature(getattr(Hooks, hook)).parameters) - {"self", "run"}
        assert set(given) == expected, hook


def test_the_hooks_stand_in_the_contract_in_the_order_of_a_run():
    order = [HOOKS.index(name) for name in STEP]
    assert order == sorted(order)
    assert HOOKS[0] == "join_processes"
    assert HOOKS[-1] == "on_train_end"


def test_every_hook_has_a_kind_a_docstring_and_a_place_in_the_pseudocode():
    from fundamentallm import hookspecs

    for hook in HOOKS:
        assert kind(hook) in ("exclusive", "vote", "event", "edit")
        assert about_hook(hook).since == "0.1"
        assert about_hook(hook).stability in ("stable", "provisional")
        assert (getattr(Hooks, hook).__doc__ or "").strip(), hook
        assert hook in (hookspecs.__doc__ or ""), hook


def answering(hook: str, answer):
    """Make a plugin that answers one hook, counting its calls."""
    parameters = inspect.signature(getattr(Hooks, hook)).parameters
    words = ", ".join(parameters)
    space = {"answer": answer, "calls": []}
    given = ", ".join(f"{name}={name}" for name in parameters if name != "self")
    code = f"def {hook}({words}):\n    calls.append(1)\n    return answer({given})\n"
    exec(code, space)
    made = plugin(type("Answering", (), {hook: hookimpl(space[hook])}))()
    return made, space["calls"]


class Upper:
    vocab_size = 1

    def encode(self, text):
        return [0 for _ in text]

    def decode(self, tokens):
        return "A" * len(tokens)


def own_microbatch(run, batch, share, is_last):
    loss = run.hook.forward(run=run, batch=batch)
    run.losses.append(loss.detach())
    run.hook.backward(run=run, loss=loss * share)


def own_validation(run):
    return {"val/loss": 7.0}


ANSWERS = {
    "build_tokenizer": (lambda run: Upper(), lambda run: isinstance(run.tokenizer, Upper)),
    "join_processes": (lambda run: nullcontext(), None),
    "checkpoint_activations": (
        lambda run, model: torch.nn.Sequential(model).forward and Doubled(model),
        lambda run: isinstance(run.module, Doubled),
    ),
    "compile_model": (
        lambda run, model: Doubled(model),
        lambda run: isinstance(run.module, Doubled),
    ),
    "distribute_model": (
        lambda run, model: Doubled(model),
        lambda run: isinstance(run.module, Doubled),
    ),
    "read_checkpoint": (lambda run: None, lambda run: run.progress.step == 4),
    "collect_batches": (
        lambda run, stream: [next(stream), next(stream)],
        lambda run: run.progress.microbatches == 8,
    ),
    "weigh_window": (lambda run, window: 2.0 * sum(b.weight for b in window), None),
    "train_microbatch": (own_microbatch, None),
    "forward": (lambda run, batch: run.module(*batch.data) * 0.5, None),
    "backward": (lambda run, loss: (loss * 0.5).backward(), None),
    "optimizer_step": (lambda run: None, lambda run: run.progress.applied == 4),
    "evaluation_weights": (lambda run: nullcontext(), None),
    "validate": (own_validation, lambda run: run.history[-1]["val/loss"] == 7.0),
    "reduce_metrics": (
        lambda run, metrics, scope: dict.fromkeys(metrics, 3.0),
        lambda run: run.history[-1]["train/loss"] == 3.0,
    ),
    "stop_agreed": (
        lambda run, stopping: run.progress.step == 3,
        lambda run: run.progress.step == 3,
    ),
}


class Doubled(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *data):
        return self.inner(*data) * 2


@pytest.mark.parametrize("hook", sorted(ANSWERS))
def test_a_plugin_answers_an_exclusive_hook_in_place_of_the_core(hook, tiny_run):
    answer, shown = ANSWERS[hook]
    one, calls = answering(hook, answer)
    run = tiny_run(one)
    assert calls
    assert run.outcome in ("finished", "stopped")
    assert shown is None or shown(run)
    assert not any(key.startswith("inner") for key in run.snapshot()["model"]), (
        "keys must not change"
    )


def test_the_exclusive_hooks_with_a_default_are_all_proven_here():
    required = {"build_data", "build_model", "build_optimizer"}  # by every tiny run
    exclusive = {hook for hook in HOOKS if kind(hook) == "exclusive"}
    assert set(ANSWERS) | required | BETWEEN == exclusive


def test_every_event_reaches_every_plugin_that_implements_it(tiny_run, tmp_path):
    events = [hook for hook in HOOKS if kind(hook) == "event" and hook not in EMITTED_BY_PLUGINS]
    for hook in events:
        one, calls = answering(hook, lambda **_: None)
        other, other_calls = answering(hook, lambda **_: None)
        type(other).__name__ = "Other"
        tiny_run(one, other, run_dir=tmp_path / hook)
        assert calls and len(calls) == len(other_calls), hook


def test_a_saver_announces_its_checkpoint_to_all(tiny_run, tmp_path):
    @plugin
    class Saver:
        @hookimpl
        def on_safe_point(self, run):
            run.hook.on_checkpoint_saved(run=run, folder=tmp_path)

    listener, calls = answering("on_checkpoint_saved", lambda run, folder: None)
    tiny_run(Saver(), listener)
    assert len(calls) == 4


def test_a_plugin_that_counts_emits_a_histogram_to_every_other(tiny_run):
    @plugin
    class Counts:
        @hookimpl
        def on_log(self, run):
            given = {"name": "sizes/a", "step": run.progress.step, "edges": (0, 1), "counts": (3,)}
            run.hook.on_histogram(run=run, **given)

    received = []

    @plugin
    class Shows:
        @hookimpl
        def on_histogram(self, name, step, edges, counts):
            received.append((name, step, edges, counts))

    tiny_run(Shows(), Counts(), length=4, log_every=2)
    assert received == [("sizes/a", 2, (0, 1), (3,)), ("sizes/a", 4, (0, 1), (3,))]


def test_an_error_that_an_observer_s_event_reaches_is_that_of_the_plugin_that_raised_it(tiny_run):
    @plugin
    class Counts:
        role = "observer"

        @hookimpl
        def on_log(self, run):
            given = {"name": "sizes/a", "step": run.progress.step, "edges": (0, 1), "counts": (3,)}
            run.hook.on_histogram(run=run, **given)

    @plugin
    class Needs:
        role = "control"

        @hookimpl
        def on_histogram(self, name):
            raise ValueError(name)

    with pytest.raises(PluginError, match=r"plugin 'needs' .* failed in on_histogram: ValueError"):
        tiny_run(Needs(), Counts())


def test_a_row_states_whether_it_holds_the_metrics_of_a_validation(tiny_run):
    rows = []

    @plugin
    class Watches:
        @hookimpl
        def on_log(self, run, metrics, validated):
            assert validated == ("val/loss" in metrics)
            rows.append((run.progress.step, validated))

    tiny_run(Watches(), length=5, log_every=1, validate_every=2, validate_first=True)
    assert rows == [(0, True), (1, False), (2, True), (3, False), (4, True), (5, True)]


def test_finish_model_is_no_part_of_a_training_run(tiny_run):
    finishing, calls = answering("finish_model", lambda run: None)
    run = tiny_run(finishing)
    assert not calls
    run.hook.finish_model(run=run)
    assert calls == [1]


def test_a_run_is_in_a_step_until_the_step_is_counted(tiny_run):
    seen = {}

    @plugin
    class Watches:
        @hookimpl
        def on_train_start(self, run):
            seen["on_train_start"] = run.in_step

        @hookimpl
        def on_step_start(self, run):
            seen["on_step_start"] = run.in_step

        @hookimpl
        def judge_step(self, run):
            seen["judge_step"] = run.in_step

        @hookimpl
        def settle_step(self, run):
            seen["settle_step"] = run.in_step

        @hookimpl
        def on_safe_point(self, run):
            seen["on_safe_point"] = run.in_step

    tiny_run(Watches())
    assert [hook for hook, in_step in seen.items() if in_step] == ["on_step_start", "judge_step"]
    assert len(seen) == 5


@plugin
class GoesBack:
    """Keep the state after step 2, and go back to it once, after step 3."""

    kept: Any = None
    seen: list[Any] = field(factory=list)

    @hookimpl
    def read_checkpoint(self, run):
        return self.kept

    @hookimpl
    def on_safe_point(self, run):
        if run.progress.step == 2:
            self.kept = copy.deepcopy(run.snapshot())

    @hookimpl
    def judge_step(self, run):
        self.seen.append((run.progress.step + 1, run.window[0].first))
        if run.progress.step == 2 and len(self.seen) == 3:
            run.rewind("latest")
            return Rejection("other", "a spike")
        return None


def test_a_rewound_run_repeats_the_steps_with_the_data_that_follows(tiny_run):
    listener, calls = answering("on_rewind", lambda run, left: None)
    run = tiny_run(goes := GoesBack(), listener, length=5, log_every=1)
    steps, firsts = zip(*goes.seen, strict=True)
    size = firsts[1]
    assert steps == (1, 2, 3, 3, 4, 5)
    assert firsts == tuple(n * size for n in range(6))
    assert [row["step"] for row in run.history] == [1, 2, 3, 4, 5]
    assert run.progress.samples == 6 * size
    assert calls == [1]


def test_a_rewound_run_ends_like_one_whose_data_never_held_the_spike(tiny_run, tmp_path):
    class Lacking(TinySamples):
        def batches(self, progress):
            for batch in super().batches(progress):
                if batch.first != self.lacks:
                    yield batch

    class LackingData(TinyData):
        @hookimpl
        def build_data(self, run):
            data = super().build_data(run=run)
            data.__class__, data.lacks = Lacking, 2 * goes.seen[1][1]
            return data

    rewound = tiny_run(goes := GoesBack(), run_dir=tmp_path / "one")
    without = tiny_run(LackingData(), run_dir=tmp_path / "other")
    assert_same_weights(rewound, without)


def test_validation_uses_the_weights_of_the_plugin_that_answers_for_them(tiny_run):
    @plugin
    class Zeroed:
        @hookimpl
        def evaluation_weights(self, run):
            return self.swapped(run)

        @contextmanager
        def swapped(self, run):
            kept = [p.detach().clone() for p in run.parameters]
            with torch.no_grad():
                for parameter in run.parameters:
                    parameter.zero_()
            yield
            with torch.no_grad():
                for parameter, value in zip(run.parameters, kept, strict=True):
                    parameter.copy_(value)

    plain, zeroed = tiny_run(), tiny_run(Zeroed())
    assert_same_weights(plain, zeroed)
    assert plain.history[-1]["val/loss"] != zeroed.history[-1]["val/loss"]


def test_hooks_that_are_bound_again_can_be_timed_for_each_plugin(tiny_run):
    seen = []

    @plugin
    class Times:
        @hookimpl
        def on_train_start(self, run):
            def around(plugin, hook, call):
                def timed(**given):
                    seen.append((plugin, hook))
                    return call(**given)

                return timed

            run.hook = run.bind(around)

        @hookimpl
        def on_step_end(self, run):
            pass

    plain, timed = tiny_run(), tiny_run(Times())
    assert_same_weights(plain, timed)
    assert seen.count(("times", "on_step_end")) == timed.progress.step
    assert ("core", "forward") in seen


def test_an_observer_stays_muted_when_the_hooks_are_bound_again(tiny_run, caplog):
    received = []

    @plugin
    class Broken:
        role = "observer"

        @hookimpl
        def on_step_end(self, run):
            received.append(run.progress.step)
            run.hook = run.bind()
            raise ValueError("no more")

    tiny_run(Broken())
    assert received == [1]
    assert caplog.text.count("broken failed and is muted") == 1


def test_the_first_validation_may_come_before_the_first_step(tiny_run):
    run = tiny_run(length=2, validate_first=True)
    assert run.history[0]["step"] == 0
    assert run.history[0]["val/loss"] > 0
    assert_same_weights(run, tiny_run(length=2))


def test_an_edit_of_the_model_comes_before_everything_that_wraps_it(tiny_run):
    @plugin
    class Freeze:
        @hookimpl
        def adapt_model(self, run):
            run.model.hidden.requires_grad_(requires_grad=False)

    run = tiny_run(Freeze())
    assert not run.snapshot()["optimizer"].keys() & {"hidden.weight", "hidden.bias"}


def test_edits_change_the_gradients_before_the_update(tiny_run, tmp_path):
    @plugin
    class Halve:
        @hookimpl
        def edit_gradients(self, run):
            for parameter in run.parameters:
                parameter.grad *= 0

    @plugin
    class Finish:
        @hookimpl
        def finish_gradients(self, run):
            for parameter in run.parameters:
                parameter.grad *= 0

    edited = tiny_run(Halve(), run_dir=tmp_path / "a")
    assert_same_weights(edited, tiny_run(Finish(), run_dir=tmp_path / "b"))


def test_one_reason_against_a_step_rejects_it(tiny_run):
    @plugin
    class Judge:
        settled = ()

        @hookimpl
        def judge_step(self, run):
            return Rejection("other", "odd") if run.progress.step % 2 else None

        @hookimpl
        def settle_step(self, run, applied):
            self.settled = (*self.settled, (run.progress.step, applied))

    @plugin
    class Content:
        @hookimpl
        def judge_step(self):
            return None

    judge = Judge()
    run = tiny_run(judge, Content(), length=6)
    assert judge.settled == ((1, True), (2, False), (3, True), (4, False), (5, True), (6, False))
    assert (run.progress.step, run.progress.applied) == (6, 3)


def test_the_learning_rate_is_the_base_times_every_factor(tiny_run):
    @plugin
    class Half:
        @hookimpl
        def lr_factor(self):
            return 0.5

    @plugin
    class Falling:
        @hookimpl
        def lr_factor(self, run):
            return 1 / (1 + run.progress.applied)

    run = tiny_run(Half(), Falling(), log_every=1)
    assert [row["optim/lr"] for row in run.history] == [
        0.01 * (0.5 * (1 / n)) for n in (1, 2, 3, 4)
    ]


def test_a_wrapper_surrounds_the_action_and_sees_its_result(tiny_run, tmp_path):
    seen = []

    @plugin
    class Wraps:
        @hookimpl(wrapper=True)
        def forward(self, run, batch):
            loss = yield
            seen.append((type(batch), loss.shape))
            return loss

    plain = tiny_run(run_dir=tmp_path / "plain")
    assert_same_weights(plain, tiny_run(Wraps(), run_dir=tmp_path / "wrapped"))
    assert seen[0] == (Batch, torch.Size([]))
    assert len(seen) == 5


def test_a_failing_observer_is_muted_with_one_warning(tiny_run, tmp_path, caplog):
    @plugin
    class Shaky:
        role = "observer"
        calls = 0

        @hookimpl
        def on_step_end(self, run):
            self.calls += 1
            raise ValueError("no ink")

        @hookimpl
        def on_log(self, run):
            self.calls += 100

    shaky = Shaky()
    assert_same_weights(tiny_run(run_dir=tmp_path / "a"), tiny_run(shaky, run_dir=tmp_path / "b"))
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warnings == ["shaky failed and is muted from now on: ValueError('no ink')"]
    assert shaky.calls == 1


@pytest.mark.parametrize(
    "hook",
    [
        hook
        for hook in HOOKS
        if hook not in {*EMITTED_BY_PLUGINS, *BETWEEN, "finish_model", "read_checkpoint"}
    ],
)
def test_an_error_names_the_plugin_and_the_hook_that_raised_it(hook, tiny_run):
    def fail(**_):
        raise RuntimeError("it broke")

    broken, _ = answering(hook, fail)
    with pytest.raises(PluginError, match=rf"'answering' \(.*\) failed in {hook}: .*it broke"):
        tiny_run(broken)


def test_the_end_of_a_failed_run_reaches_all_plugins(tiny_run, caplog):
    received = []

    @plugin
    class Breaks:
        @hookimpl
        def on_step_end(self, run):
            raise RuntimeError("it broke")

        @hookimpl
        def on_train_end(self, run):
            raise RuntimeError("and again")

    @plugin
    class Closes:
        @hookimpl
        def on_train_end(self, run, outcome):
            received.append((outcome, str(run.error)))

    with pytest.raises(PluginError, match="it broke"):
        tiny_run(Breaks(), Closes())
    assert "and again" in caplog.text
    assert received[0][0] == "failed"
    assert "it broke" in received[0][1]


@pytest.mark.parametrize("hook", ["on_run_start", "on_train_start"])
def test_an_observer_may_end_the_run_before_the_first_step_with_an_error_to_act_on(tiny_run, hook):
    space = {"role": "observer", hook: hookimpl(lambda self: full())}

    def full():
        raise StorageError("the disk is full")

    with pytest.raises(StorageError):
        tiny_run(plugin(type("Logs", (), space))())


def test_an_observer_is_muted_by_any_error_in_a_step_except_wrong_settings(tiny_run, tmp_path):
    @plugin
    class Logs:
        role = "observer"
        error: Any = StorageError

        @hookimpl
        def on_step_end(self):
            raise self.error("the disk is full")

    assert tiny_run(Logs(), run_dir=tmp_path / "muted").outcome == "finished"
    with pytest.raises(SettingsError):
        tiny_run(Logs(error=SettingsError), run_dir=tmp_path / "ended")
