"""The plugin in real runs, against handwritten computations; equal means equal to the last bit."""

from __future__ import annotations

import copy
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fundamentallm import (
    Batch,
    Data,
    Progress,
    Run,
    SettingsError,
    compose,
    field,
    hookimpl,
    plugin,
)
from fundamentallm.testing import PluginContract, TinyData, TinyRun, assert_same_weights, weights
from fundamentallm_validation import LARGER, Validation, perplexity_of
from fundamentallm_validation.accuracy import accuracies

VERSE = "The quick brown fox jumps over the lazy dog.\n" * 20
OTHER = "Größe über alles, çela, a dog.\n" * 9


class TestContract(PluginContract):
    plugin = Validation


CLASSES = 5
SIZES = {"val": (3, 3, 1), "code": (2, 5)}  # rows of the batches: uneven ones


@plugin
class Tokens:
    """Random tokens; some targets are -100, and a split's last batch has nothing else."""

    as_dict: bool = False
    """Whether batches are dicts."""
    knows_bytes: bool = True
    """Whether it knows the bytes of a token."""

    @hookimpl
    def build_data(self, run: Run) -> Data:
        return TokenBatches(self, run)


class TokenBatches:
    epoch_samples = None
    fingerprint = "tokens"
    vocab_size = CLASSES
    context_length = 4

    def __init__(self, settings: Tokens, run: Run) -> None:
        self.as_dict = settings.as_dict
        if settings.knows_bytes:
            self.bytes_per_token = {"val": 3.7, "code": 1.25}.get
        source = torch.Generator().manual_seed(5)
        self.splits = {
            name: [self.batch(rows, source) for rows in (*sizes, 0)]
            for name, sizes in SIZES.items()
        }

    def batch(self, rows: int, source: torch.Generator) -> Batch:
        inputs = torch.randint(CLASSES, (rows or 2, 4), generator=source)
        targets = torch.randint(CLASSES, inputs.shape, generator=source)
        targets[torch.rand(targets.shape, generator=source) < 0.3] = -100
        if not rows:
            targets[:] = -100
        weight = float((targets != -100).sum())
        data = {"inputs": inputs, "targets": targets} if self.as_dict else (inputs, targets)
        return Batch(data, weight, len(inputs), targets.numel())

    def batches(self, progress: Progress) -> Iterator[Batch]:
        for step in count(progress.step):
            yield self.batch(3, torch.Generator().manual_seed(100 + step))

    def validation(self) -> Mapping[str, list[Batch]]:
        return self.splits


@plugin
class Scorer:
    """A model of a table, with dropout, that has ``logits``."""

    @hookimpl
    def build_model(self) -> nn.Module:
        return Table()


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, CLASSES)
        self.dropout = nn.Dropout(0.5)
        self.passes = 0

    def logits(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        return self.dropout(self.table(inputs))  # type: ignore[no-any-return]

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        scores = self.logits(inputs).view(-1, CLASSES)
        return nn.functional.cross_entropy(scores, targets.flatten())


class TestContractOfAccuracy(PluginContract):
    plugin = Validation
    needs: ClassVar[dict[str, Any]] = {"accuracy": True, "bits_per_byte": True}
    companions = (Tokens, Scorer)


@plugin
class Rows:
    """Keeps the metrics of validations and rows."""

    def __attrs_post_init__(self) -> None:
        self.validations: list[dict[str, float]] = []
        self.rows: list[dict[str, float]] = []

    @hookimpl
    def on_validation_end(self, metrics: dict[str, float]) -> None:
        self.validations.append(dict(metrics))

    @hookimpl
    def on_log(self, metrics: dict[str, float]) -> None:
        self.rows.append(dict(metrics))


@torch.no_grad()
def _accuracy(run: Run, split: str) -> float:
    """Count by hand, in a loop over single targets."""
    right = total = 0
    model: Any = run.model.eval()
    for batch in run.data.validation()[split]:
        inputs, targets = batch.data.values() if isinstance(batch.data, dict) else batch.data
        scores = model.logits(inputs)
        for row in range(len(targets)):
            for place in range(targets.shape[1]):
                wanted = int(targets[row, place])
                if wanted == -100:
                    continue
                total += 1
                right += max(range(CLASSES), key=scores[row, place].tolist().__getitem__) == wanted
    return right / total


@torch.no_grad()
def _loss(run: Run, split: str) -> float:
    """Work out the mean loss over all targets of a split, from the means of its batches."""
    run.model.eval()
    parts = [
        (run.model(*batch.data).item(), batch.weight)
        for batch in run.data.validation()[split]
        if batch.weight
    ]
    return math.fsum(loss * weight for loss, weight in parts) / math.fsum(w for _, w in parts)


def test_every_metric_of_every_split_is_what_a_handwritten_loop_finds(tiny_run: TinyRun) -> None:
    run = tiny_run(Tokens(), Scorer(), Validation(bits_per_byte=True, accuracy=True), length=5)
    row = run.history[-1]
    for split, size in (("val", 3.7), ("code", 1.25)):
        loss = _loss(run, split)
        assert row[f"{split}/loss"] == loss
        assert row[f"{split}/perplexity"] == math.exp(loss)
        assert row[f"{split}/bits_per_byte"] == loss / math.log(2) / size
        assert row[f"{split}/accuracy"] == _accuracy(run, split)
    assert 0 < row["val/accuracy"] < 1


def test_batches_that_are_dicts_are_measured_the_same(tiny_run: TinyRun, tmp_path: Path) -> None:
    one, other = (
        tiny_run(
            Tokens(as_dict=as_dict),
            Scorer(),
            Validation(accuracy=True),
            run_dir=tmp_path / str(as_dict),
        )
        for as_dict in (False, True)
    )
    assert one.history == other.history


def test_a_language_model_on_text_has_all_metrics_of_a_validation(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    for name, content in (("verse", VERSE), ("other", OTHER)):
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")
    text = {
        "path": str(tmp_path / "verse.txt"),
        "context_length": 8,
        "batch_size": 4,
        "validation_splits": {"other": str(tmp_path / "other.txt")},
        "cache_dir": str(tmp_path / "cache"),
    }
    gpt = {"num_layers": 1, "d_model": 16, "num_heads": 2, "pad_vocab_to_multiple_of": 64}
    measured = Validation(bits_per_byte=True, accuracy=True)
    run = tiny_run("text", "gpt", measured, settings={"text": text, "gpt": gpt}, length=30)
    row, model = run.history[-1], run.model
    assert run.tokenizer is not None
    tokens = torch.tensor(run.tokenizer.encode(OTHER))
    windows = (len(tokens) - 1) // 8
    inputs, targets = (tokens[i : i + 8 * windows].view(windows, 8) for i in (0, 1))
    with torch.no_grad():
        right = (model.eval().logits(inputs).argmax(-1) == targets).sum()  # type: ignore[operator]
    assert row["other/accuracy"] == int(right) / targets.numel() > 0
    bits = row["other/loss"] / math.log(2)
    assert row["other/bits_per_byte"] == bits / (len(OTHER.encode()) / len(OTHER))
    assert row["val/bits_per_byte"] == row["val/loss"] / math.log(2)
    assert row["val/perplexity"] == math.exp(row["val/loss"])


@plugin
class Half:
    """Computes every forward in bf16, as autocast does."""

    @hookimpl(wrapper=True)
    def forward(self) -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16):
            return (yield)


@plugin
class Linear:
    """A model whose scores differ in bf16, and that says in what it computes."""

    @hookimpl
    def build_model(self) -> nn.Module:
        class Model(Table):
            def __init__(self) -> None:
                super().__init__()
                self.out = nn.Linear(CLASSES, CLASSES)
                self.kinds: set[torch.dtype] = set()

            def logits(self, inputs: Tensor) -> Tensor:
                found: Tensor = self.out(self.table(inputs))
                self.kinds.add(found.dtype)
                return found

        return Model()


def test_scores_are_computed_as_those_of_the_loss_in_any_list_order(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    histories = []
    for order in (1, -1):
        parts = [Tokens(), Linear(), Half(), Validation(accuracy=True)][::order]
        run = tiny_run(*parts, run_dir=tmp_path / str(order), length=6)
        assert run.model.kinds == {torch.bfloat16}  # type: ignore[comparison-overlap]
        histories.append(run.history)
        with torch.autocast("cpu", torch.bfloat16):
            assert run.history[-1]["val/accuracy"] == _accuracy(run, "val")
    assert histories[0] == histories[1]


@plugin
class Zeros:
    """Validates with weights of zero, as an average of weights would with its own."""

    @hookimpl
    def evaluation_weights(self, run: Run) -> Any:
        @contextmanager
        def zeros() -> Iterator[None]:
            kept = weights(run)
            for parameter in run.model.parameters():
                parameter.data.zero_()
            yield
            run.model.load_state_dict(kept)

        return zeros()


def test_the_accuracy_is_that_of_the_evaluation_weights(tiny_run: TinyRun) -> None:
    run = tiny_run(Tokens(), Scorer(), Zeros(), Validation(accuracy=True))
    # All scores are equal, so class 0 is the guess.
    targets = torch.cat([batch.data[1].flatten() for batch in run.data.validation()["val"]])
    expected = int((targets == 0).sum()) / int((targets != -100).sum())
    assert run.history[-1]["val/accuracy"] == expected


@plugin
class Replaces:
    """Puts another module in place for the whole validation, as a plugin that compiles may."""

    @hookimpl(wrapper=True)
    def validate(self, run: Run) -> Iterator[None]:
        module, run.module = run.module, run.model
        try:
            return (yield)
        finally:
            run.module = module


@pytest.mark.parametrize("order", [1, -1])
def test_a_plugin_that_replaces_the_module_in_validation_does_no_harm(
    tiny_run: TinyRun, order: int
) -> None:
    run = tiny_run(*[Tokens(), Scorer(), Replaces(), Validation(accuracy=True)][::order])
    assert run.history[-1]["val/accuracy"] == _accuracy(run, "val")
    assert run.module is run.model


@plugin
class Chatty:
    """Logs in forward, and draws random numbers there."""

    def __attrs_post_init__(self) -> None:
        self.phases: list[tuple[str, float]] = []

    @hookimpl(wrapper=True)
    def forward(self, run: Run) -> Iterator[None]:
        self.phases.append((run.phase, run.weight))
        run.log(f"{run.phase}/calls", 1.0, weight=1.0)
        torch.rand(3)
        return (yield)


def test_training_does_not_notice_and_nothing_is_logged_twice(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    runs = []
    for measured in (Validation(accuracy=True), Validation(perplexity=False, best=False)):
        parts = (Tokens(), Scorer(), Chatty(), measured)
        run = tiny_run(*parts, run_dir=tmp_path / str(len(runs)), length=6, validate_every=2)
        runs.append(run)
    assert_same_weights(*runs)
    assert all(module.training for module in runs[0].model.modules())
    with_it, without = (run.history for run in runs)
    for row, plain in zip(with_it, without, strict=True):
        assert {name: row[name] for name in plain} == plain


def test_the_accuracy_calls_forward_like_the_loss_and_restores_the_state_of_the_run(
    tiny_run: TinyRun,
) -> None:
    chatty = Chatty()
    run = tiny_run(Tokens(), Scorer(), chatty, Validation(accuracy=True), length=1)
    held_out = [
        (split, batch.weight)
        for split, batches in run.data.validation().items()
        for batch in batches
        if batch.weight
    ]
    assert chatty.phases[1:] == held_out * 2
    found, module = accuracies(run), run.module
    assert found == {f"{split}/accuracy": _accuracy(run, split) for split in SIZES}
    assert (run.phase, run.weight, run.take_logged()) == ("train", 1.0, {})
    assert run.module is module is run.model


def test_validation_costs_one_more_forward_pass_only_if_accuracy_is_set(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    passes = []
    for accuracy in (False, True):
        measured = Validation(accuracy=accuracy, bits_per_byte=True)
        run = tiny_run(Tokens(), Scorer(), measured, run_dir=tmp_path / str(accuracy), length=3)
        passes.append(run.model.passes)
    held_out = sum(map(len, SIZES.values()))
    assert passes == [3 + held_out, 3 + 2 * held_out]


def test_a_signal_during_the_accuracy_leaves_the_validation_for_the_resumed_run(
    tiny_run: TinyRun,
) -> None:
    @plugin
    class Interrupts:
        @hookimpl
        def on_progress(self, run: Run, task: str) -> None:
            if task == "accuracy" and run.signal is None:
                run.signal = signal.SIGTERM
                run.model.passes_then = run.model.passes  # type: ignore[assignment]

    rows = Rows()
    run = tiny_run(Tokens(), Scorer(), Interrupts(), rows, Validation(accuracy=True))
    assert run.model.passes == run.model.passes_then
    assert (run.outcome, rows.validations, run.phase) == ("interrupted", [], "train")
    assert not run.progress.closed


def test_perplexity_is_finite_where_the_loss_is() -> None:
    assert perplexity_of(0.0) == 1.0
    assert perplexity_of(2.5) == math.exp(2.5)
    assert perplexity_of(1e4) == sys.float_info.max
    assert perplexity_of(math.inf) == math.inf
    assert math.isnan(perplexity_of(math.nan))


def test_metrics_of_several_processes_are_combined_before_the_best_is_updated(
    tiny_run: TinyRun,
) -> None:
    @plugin
    class Reduces:
        """Stands for other processes, whose losses are higher by 1."""

        @hookimpl
        def reduce_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
            return {name: v + 0.5 if name == "val/loss" else v for name, v in metrics.items()}

    run = tiny_run(Validation(), Reduces())
    row = run.history[-1]
    assert row["val/perplexity"] == math.exp(row["val/loss"])


@plugin
class Losses:
    """Makes up the metrics of the validations."""

    made: list[float]
    """The loss at each."""
    kind: str = "loss"
    """The metric."""

    calls: int = field(init=False, default=0)

    @hookimpl
    def validate(self) -> dict[str, float]:
        self.calls += 1
        return {f"val/{self.kind}": self.made[self.calls - 1], "val/other": 1.0}


@pytest.mark.parametrize(
    ("kind", "values", "best", "step"),
    [
        ("loss", [3.0, 2.0, 2.5, 2.0], [3.0, 2.0, 2.0, 2.0], 2),
        ("loss", [1.0, 2.0, 3.0, 4.0], [1.0] * 4, 1),
        ("accuracy", [0.1, 0.3, 0.2, 0.4], [0.1, 0.3, 0.3, 0.4], 4),
        ("accuracy", [0.5, 0.5, 0.5, 0.5], [0.5] * 4, 1),
    ],
)
def test_the_best_is_logged_at_every_validation(
    tiny_run: TinyRun, caplog: Any, kind: str, values: list[float], best: list[float], step: int
) -> None:
    caplog.set_level(logging.INFO, "fundamentallm")
    measured, rows = Validation(), Rows()
    tiny_run(measured, rows, Losses(made=values, kind=kind), length=4, validate_every=1)
    assert [row[f"best/val_{kind}"] for row in rows.rows] == best
    assert measured.found[f"val/{kind}"] == [best[-1], step]
    assert not [name for name in rows.rows[-1] if "other" in name and name != "val/other"]
    assert f"best val/{kind}: {best[-1]:.6g} at step {step}" in caplog.messages


def test_the_best_is_in_a_row_of_its_validation_only(tiny_run: TinyRun) -> None:
    rows = Rows()
    tiny_run(Validation(), rows, length=4, log_every=1, validate_every=2)
    assert ["best/val_loss" in row for row in rows.rows] == [False, True, False, True]


@plugin
class Keeps:
    """Keeps a copy of every snapshot, and lets a run go on from one."""

    start: Any = None
    """The snapshot to go on from."""

    def __attrs_post_init__(self) -> None:
        self.kept: list[Any] = []

    @hookimpl
    def read_checkpoint(self) -> Any:
        return copy.deepcopy(self.start)

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        self.kept.append(copy.deepcopy(run.snapshot()))


def test_a_run_resumed_at_any_step_ends_as_one_that_was_never_interrupted(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    def run(keeps: Keeps) -> Run:
        parts = (Tokens(), Scorer(), Validation(accuracy=True), keeps)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return tiny_run(*parts, length=6, validate_every=2, log_every=3, run_dir=folder)

    whole = Keeps()
    end = run(whole)
    assert len(whole.kept) == 6
    for snapshot in whole.kept[:-1]:
        resumed = run(Keeps(start=snapshot))
        step = snapshot["progress"]["step"]
        assert resumed.history == [row for row in end.history if row["step"] > step]
        assert resumed.plugins["validation"].found == end.plugins["validation"].found
        assert_same_weights(end, resumed)


def test_the_best_value_in_a_snapshot_does_not_change_later(tiny_run: TinyRun) -> None:
    kept: list[Any] = []

    @plugin
    class Holds:
        @hookimpl
        def on_safe_point(self, run: Run) -> None:
            kept.append(run.snapshot()["plugins"]["validation"])

    made = Losses(made=[3.0, 2.0, 1.0])
    tiny_run(Validation(), Holds(), made, length=3, validate_every=1)
    assert [state["found"]["val/loss"] for state in kept] == [[3.0, 1], [2.0, 2], [1.0, 3]]


def test_a_second_instance_changes_nothing(tiny_run: TinyRun, tmp_path: Path) -> None:
    settings = {"more": {"plugin": "validation"}}
    one = tiny_run(Tokens(), Scorer(), "validation", run_dir=tmp_path / "one")
    two = tiny_run(
        Tokens(), Scorer(), "validation", "more", settings=settings, run_dir=tmp_path / "two"
    )
    assert one.history == two.history


def test_the_untrained_model_is_measured_too_if_asked_for(tiny_run: TinyRun) -> None:
    run = tiny_run(Tokens(), Scorer(), Validation(accuracy=True), validate_first=True)
    first = run.history[0]
    assert first["step"] == 0
    assert {"val/loss", "val/accuracy", "code/perplexity", "best/val_loss"} <= set(first)


@plugin
class Watches:
    """Something with a monitor."""

    monitor: str
    """A metric."""

    @hookimpl
    def on_log(self) -> None:
        pass


@pytest.mark.parametrize(
    ("metric", "table"),
    [
        ("val/perplexity", {}),
        ("code/perplexity", {}),
        ("val/bits_per_byte", {"bits_per_byte": True}),
        ("val/accuracy", {"accuracy": True}),
        ("best/val_loss", {}),
        ("best/code_accuracy", {"accuracy": True}),
    ],
)
def test_a_monitor_finds_what_it_logs_and_nothing_that_is_off(
    metric: str, table: dict[str, bool]
) -> None:
    def composed(**settings: bool) -> None:
        tables = {"plugins": [], "run": {"length": 1}}
        parts = [TinyData(), Scorer(), Watches(monitor=metric), Validation(**settings)]
        try:
            compose(tables, plugins=parts)
        except SettingsError as error:
            problems = [str(one) for one in error.mistakes if one.kind != "required"]
            if problems:
                raise SettingsError(problems) from None

    composed(**table)
    off = dict.fromkeys(("perplexity", "bits_per_byte", "accuracy", "best"), False)
    with pytest.raises(SettingsError, match=f"nothing listed produces '{metric}'"):
        composed(**off)


def test_validation_logs_exactly_the_metrics_that_it_declares(tiny_run: TinyRun) -> None:
    from fnmatch import fnmatchcase

    measured = Validation(bits_per_byte=True, accuracy=True)
    row = tiny_run(Tokens(), Scorer(), measured).history[-1]
    core = {"step", "train/loss", "train/tokens", "optim/lr", "val/loss", "code/loss"}
    logged = set(row) - core
    assert len(logged) == 2 * (3 + len(LARGER))
    for name in logged:
        assert any(fnmatchcase(name, pattern) for pattern in measured.produces), name
    for pattern in measured.produces:
        assert any(fnmatchcase(name, pattern) for name in logged), pattern


def _fails(tiny_run: TinyRun, *parts: object) -> str:
    with pytest.raises(SettingsError) as caught:
        tiny_run(*parts, length=1)
    return str(caught.value)


def test_data_without_a_count_of_bytes_is_an_error_at_the_start(tiny_run: TinyRun) -> None:
    problem = _fails(tiny_run, Tokens(knows_bytes=False), Scorer(), Validation(bits_per_byte=True))
    assert problem.startswith("validation.bits_per_byte: the data (TokenBatches) does not know")


def test_a_model_without_logits_is_an_error_at_the_start(tiny_run: TinyRun) -> None:
    problem = _fails(tiny_run, Validation(accuracy=True))
    assert (
        problem == "validation.accuracy: Tiny has no method logits(inputs) that returns its scores"
    )


def test_batches_without_targets_are_an_error_at_the_start(tiny_run: TinyRun) -> None:
    @plugin
    class Alone:
        @hookimpl
        def build_data(self, run: Run) -> Data:
            data = TokenBatches(Tokens(), run)
            for batch in data.splits["val"]:
                batch.data = batch.data[:1]
            return data

    problem = _fails(tiny_run, Alone(), Scorer(), Validation(accuracy=True))
    assert "a batch of the held-out data is 1 tensors; it must be (inputs, ..., targets)" in problem


def test_scores_that_do_not_fit_the_targets_are_an_error(tiny_run: TinyRun) -> None:
    @plugin
    class Flat:
        @hookimpl
        def build_model(self) -> nn.Module:
            class Flattened(Table):
                def logits(self, inputs: Tensor) -> Tensor:
                    return super().logits(inputs).flatten(0, 1)

            return Flattened()

    problem = _fails(tiny_run, Tokens(), Flat(), Validation(accuracy=True))
    assert "scores for targets of shape (12,), but they have (3, 4)" in problem


def test_a_forward_that_does_not_call_the_module_is_an_error(tiny_run: TinyRun) -> None:
    @plugin
    class Own:
        @hookimpl
        def forward(self, run: Run, batch: Batch) -> Tensor:
            loss: Tensor = run.model(*batch.data)
            return loss

    problem = _fails(tiny_run, Tokens(), Scorer(), Own(), Validation(accuracy=True))
    assert "a plugin answers 'forward' without calling run.module" in problem


def test_data_without_a_held_out_split_gets_a_warning(tiny_run: TinyRun, caplog: Any) -> None:
    @plugin
    class Nothing:
        @hookimpl
        def build_data(self, run: Run) -> Data:
            data = TokenBatches(Tokens(), run)
            data.splits = {}
            return data

    run = tiny_run(Nothing(), Scorer(), Validation(accuracy=True, bits_per_byte=True))
    assert run.outcome == "finished"
    assert "validation: the data has no held-out split to measure" in caplog.messages


def test_each_plain_run_calls_it_only_where_a_row_is_due(tiny_run: TinyRun) -> None:
    """It must cost nothing per step: of its hooks none is emitted in one."""
    hooks: Callable[..., Any] = Validation
    marked = {name for name in dir(hooks) if hasattr(getattr(hooks, name), "fundamentallm_impl")}
    assert marked == {
        "on_train_start",
        "validate",
        "reduce_metrics",
        "on_validation_end",
        "on_train_end",
    }
