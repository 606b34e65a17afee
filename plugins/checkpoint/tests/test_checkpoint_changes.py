"""Changed settings are logged, and refused where they make the run another one."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fundamentallm import Period, SettingsError, field, hookimpl, plugin, table
from fundamentallm.testing import Recorder, TinyData, TinyModel, TinyOptimizer, TinyRun
from fundamentallm_checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fundamentallm import Data, Run

TWO = Period(2)


@table
class Inner:
    depth: int = 1
    """How deep."""
    pace: Period = Period(3)
    """How fast."""


@plugin
class Layers(TinyModel):
    """A model with settings of all kinds, of which two are free."""

    free = ("dropout", "notes")

    width: int = 4
    """How wide."""
    shape: Inner = Inner()
    """A table of its own."""
    names: list[str] = field(factory=list)
    """A list."""
    notes: str | None = None
    """What nothing depends on."""
    given: Any = None
    """An object that was given in Python."""


def lines(caplog: pytest.LogCaptureFixture) -> dict[str, int]:
    return {r.getMessage(): r.levelno for r in caplog.records if "→" in r.getMessage()}


def test_allowed_changes_are_logged_line_by_line(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_run(Checkpoint(every=TWO), Layers(), length=4)
    caplog.set_level(logging.INFO)
    changed = Layers(dropout=0.5, notes="more")
    tiny_run(Checkpoint(every=Period(3), keep_best=1), changed, length=6, log_every=1)
    assert lines(caplog) == dict.fromkeys(
        [
            'checkpoint.every: "2 steps" → "3 steps"',
            "checkpoint.keep_best: 0 → 1",
            "layers.dropout: 0.1 → 0.5",
            'layers.notes: (not set) → "more"',
            'run.length: "4 steps" → "6 steps"',
            'run.log_every: "2 steps" → "1 step"',
        ],
        logging.INFO,
    )


def test_nothing_is_logged_where_nothing_has_changed(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):  # the objects are others, and elsewhere in memory
        tiny_run(Checkpoint(every=TWO), Layers(given=object()), length=4)
    assert lines(caplog) == {}


CHANGES = [
    ("layers.width: 4 → 5", {"width": 5}),
    ("layers.shape.depth: 1 → 2", {"shape": Inner(depth=2)}),
    ('layers.shape.pace: "3 steps" → "4 steps"', {"shape": Inner(pace=Period(4))}),
    ('layers.names: [] → ["a"]', {"names": ["a"]}),
]


@pytest.mark.parametrize(("said", "changed"), CHANGES, ids=[said for said, _ in CHANGES])
def test_another_model_is_refused_with_the_override_that_allows_it(
    said: str, changed: dict[str, Any], tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(Checkpoint(every=TWO), Layers(), length=4)
    before, trace = (run.folder / "settings.toml").read_text(), Recorder()
    with pytest.raises(SettingsError) as caught:
        tiny_run(Checkpoint(every=TWO), Layers(**changed), length=6, trace=trace)
    key = said.partition(":")[0]
    assert caught.value.problems[0] == said
    assert f"--set 'checkpoint.allow_changes=[\"{key}\"]'" in caught.value.problems[-1]
    assert "on_train_start" not in trace.names
    assert (run.folder / "settings.toml").read_text() == before
    allowing = Checkpoint(every=TWO, allow_changes=[key])
    assert tiny_run(allowing, Layers(**changed), length=6).progress.step == 6
    assert lines(caplog)[said] == logging.WARNING


def test_another_seed_is_refused_and_one_message_has_every_refusal(tiny_run: TinyRun) -> None:
    tiny_run(Checkpoint(every=TWO), Layers(), length=4)
    with pytest.raises(SettingsError) as caught:
        tiny_run(Checkpoint(every=TWO), Layers(width=9), length=6, seed=7)
    assert caught.value.problems[:2] == ["layers.width: 4 → 9", "run.seed: 1337 → 7"]
    assert '["layers.width", "run.seed"]' in caught.value.problems[-1]


def test_patterns_allow_many_changes_at_once(tiny_run: TinyRun) -> None:
    tiny_run(Checkpoint(every=TWO), Layers(), length=4)
    allowing = Checkpoint(every=TWO, allow_changes=["layers.*", "run.seed"])
    changed = Layers(width=9, names=["b"], shape=Inner(depth=7))
    assert tiny_run(allowing, changed, length=6, seed=7).progress.step == 6


def test_a_model_of_another_class_is_refused(tiny_run: TinyRun) -> None:
    def layers(base: type) -> Any:
        return plugin(type("Layers", (base,), {"__module__": __name__, "__doc__": "Another."}))()

    tiny_run(Checkpoint(every=TWO), Layers(), length=4)
    with pytest.raises(SettingsError, match=r"layers\.class: .*Layers.* → .*Another"):
        other = layers(Layers)
        type(other).__qualname__ = "Another"
        tiny_run(Checkpoint(every=TWO), other, length=6)


def test_a_plugin_that_adapts_the_model_must_stay(tiny_run: TinyRun) -> None:
    @plugin
    class Freezes:
        """Freezes some."""

        rank: int = 4
        """How many."""

        @hookimpl
        def adapt_model(self, run: Run) -> None:
            pass

    tiny_run(Checkpoint(every=TWO), Freezes(), length=4)
    with pytest.raises(SettingsError, match=r"^freezes: listed → not listed\n"):
        tiny_run(Checkpoint(every=TWO), length=6)
    with pytest.raises(SettingsError, match=r"^freezes\.rank: 4 → 5\n"):
        tiny_run(Checkpoint(every=TWO), Freezes(rank=5), length=6)


@plugin
class Halves:
    """Halve the gradients: a plugin whose hooks imply the role "training"."""

    by: float = 2.0
    """What to divide by."""

    @hookimpl
    def edit_gradients(self, run: Run) -> None:
        for parameter in run.parameters:
            if parameter.grad is not None:
                parameter.grad /= self.by


@plugin
class Waits(Halves):
    """Act on a step that goes wrong only, so that it may come and go."""

    free = ("*",)


@plugin
class Watches:
    """Surround the model's forward pass without changing it."""

    role = "observer"

    often: int = 4
    """How often."""

    @hookimpl(wrapper=True)
    def build_model(self) -> Iterator[None]:
        return (yield)

    @hookimpl(wrapper=True)
    def forward(self) -> Iterator[None]:
        return (yield)


@pytest.mark.parametrize("added", [Watches, Waits])
def test_a_plugin_that_changes_no_weights_may_be_added_changed_and_removed(
    added: type, tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    name = added.__name__.lower()
    caplog.set_level(logging.INFO)
    tiny_run(Checkpoint(every=TWO), length=4)
    tiny_run(Checkpoint(every=TWO), added(), length=5)
    setting = "often" if added is Watches else "by"
    tiny_run(Checkpoint(every=TWO), added(**{setting: 8}), length=6)
    tiny_run(Checkpoint(every=TWO), length=7)
    found = {text: level for text, level in lines(caplog).items() if text.startswith(name)}
    assert set(found.values()) == {logging.INFO}
    assert {f"{name}: not listed → listed", f"{name}: listed → not listed"} < found.keys()
    assert any(text.startswith(f"{name}.{setting}: ") for text in found)


@pytest.mark.parametrize("change", ["added", "removed", "changed"])
def test_a_plugin_that_changes_gradients_is_refused_until_its_change_is_allowed(
    change: str, tiny_run: TinyRun
) -> None:
    before = [] if change == "added" else [Halves()]
    after = {"added": [Halves()], "removed": [], "changed": [Halves(by=4.0)]}[change]
    tiny_run(Checkpoint(every=TWO), *before, length=4)
    with pytest.raises(SettingsError, match=r"^halves") as caught:
        tiny_run(Checkpoint(every=TWO), *after, length=6)
    key = "halves.by" if change == "changed" else "halves"
    assert f"--set 'checkpoint.allow_changes=[\"{key}\"]'" in caught.value.problems[-1]
    allowing = Checkpoint(every=TWO, allow_changes=[key])
    assert tiny_run(allowing, *after, length=6).progress.step == 6


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        (TinyData(batch_size=4), TinyData(batch_size=2), "tiny_data.batch_size: 4 → 2"),
        (Layers(width=4), Layers(width=5), "layers.width: 4 → 5"),
        (TinyOptimizer(lr=0.5), TinyOptimizer(lr=0.25), "tiny_optimizer.lr: 0.5 → 0.25"),
        (Halves(by=2.0), Halves(by=4.0), "halves.by: 2.0 → 4.0"),
    ],
    ids=["data", "model", "optimizer", "training"],
)
def test_a_changed_setting_of_each_role_that_makes_the_weights_is_refused(
    before: Any, after: Any, change: str, tiny_run: TinyRun
) -> None:
    tiny_run(Checkpoint(every=TWO), before, length=4)
    with pytest.raises(SettingsError) as caught:
        tiny_run(Checkpoint(every=TWO), after, length=6)
    assert caught.value.problems[0] == change


@plugin
class Wide(TinyModel):
    """A model whose weights have the shape that a setting says."""

    width: int = 4
    """The width of the layer that is added."""

    @hookimpl
    def build_model(self) -> torch.nn.Module:
        model = super().build_model()
        model.register_parameter("more", torch.nn.Parameter(torch.zeros(self.width)))
        return model


@pytest.mark.parametrize("allowed", [[], ["wide.*", "run.seed"]])
def test_no_override_is_advised_where_the_weights_cannot_fit(
    allowed: list[str], tiny_run: TinyRun
) -> None:
    tiny_run(Checkpoint(every=TWO), Wide(), length=4)
    with pytest.raises(SettingsError) as caught:
        tiny_run(Checkpoint(every=TWO, allow_changes=allowed), Wide(width=5), length=6, seed=7)
    *changes, reason = caught.value.problems
    assert changes == ["run.seed: 1337 → 7", "wide.width: 4 → 5"]
    assert "more has shape [4] in the checkpoint and shape [5] in the model" in reason
    assert reason.endswith("undo the changes above, or start a new run")
    assert "allow_changes" not in reason


def test_no_override_is_advised_for_an_optimizer_that_cannot_load_the_state(
    tiny_run: TinyRun,
) -> None:
    @plugin
    class Other(TinyOptimizer):
        """Another class of optimizer."""

        @hookimpl
        def build_optimizer(self, run: Run) -> torch.optim.Optimizer:
            return torch.optim.SGD(run.parameters, lr=0.1)

    tiny_run(Checkpoint(every=TWO), length=4)
    with pytest.raises(SettingsError) as caught:
        tiny_run(Checkpoint(every=TWO), Other(), length=6)
    assert "has the state of <class 'torch.optim.adamw.AdamW'>" in caught.value.problems[-1]
    assert "allow_changes" not in str(caught.value)


def test_other_data_are_refused(tiny_run: TinyRun) -> None:
    def data(fingerprint: str) -> Any:
        class Other(TinyData):
            """Data of another content under the same settings."""

            @hookimpl
            def build_data(self, run: Run) -> Data:
                made = super().build_data(run)
                made.fingerprint = fingerprint  # type: ignore[misc]
                return made

        return Other()

    tiny_run(Checkpoint(every=TWO), data("a" * 40), length=4)
    with pytest.raises(SettingsError, match=rf"^data: {'a' * 12} → {'b' * 12}\n.*\[\"data\"\]"):
        tiny_run(Checkpoint(every=TWO), data("b" * 40), length=6)
    allowing = Checkpoint(every=TWO, allow_changes=["data"])
    assert tiny_run(allowing, data("b" * 40), length=6).progress.step == 6


def test_a_setting_that_only_a_later_version_of_a_plugin_has_changes_nothing(
    tiny_run: TinyRun,
) -> None:
    def version(number: int) -> Any:
        body: dict[str, Any] = {
            "__annotations__": {"old": "int"},
            "old": 1,
            "__module__": __name__,
            "__qualname__": "Grows",
            "__doc__": "Grows.",
        }
        if number == 2:
            body["__annotations__"] |= {"new": "str", "more": "float"}
            body |= {"new": "as before", "more": 0.5}
        return plugin(type("Grows", (TinyModel,), body))

    tiny_run(Checkpoint(every=TWO), version(1)(), length=4)
    assert tiny_run(Checkpoint(every=TWO), version(2)(), length=6).progress.step == 6
    tiny_run(Checkpoint(every=TWO), version(2)(), length=6)
    with pytest.raises(SettingsError, match=re.escape('grows.new: "as before" → "otherwise"')):
        tiny_run(Checkpoint(every=TWO), version(2)(new="otherwise"), length=8)


def test_the_settings_that_allow_changes_are_no_change(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tiny_run(Checkpoint(every=TWO), length=4)
    tiny_run(Checkpoint(every=TWO, allow_changes=["run.seed"]), length=4)
    assert lines(caplog) == {}
