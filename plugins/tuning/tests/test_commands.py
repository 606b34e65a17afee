"""The commands, on tiny real runs: what they say, and that they leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tomli
from click.testing import CliRunner, Result

from fundamentallm import (
    DataError,
    FundamentalError,
    NotFiniteError,
    OutOfMemoryError,
    SettingsError,
    StorageError,
    compose,
    find_plugins,
    train,
)
from fundamentallm_tuning.batch_size_worker import run_trial
from fundamentallm_tuning.cli import batch_size_finder, check, lr_finder
from fundamentallm_tuning.lr_finder import run_test
from fundamentallm_tuning.probe import Probe
from fundamentallm_tuning.trial import follows, shapes_steps

PARTS = '''
import os, signal, time
from pathlib import Path
from typing import Literal
import torch
from torch import nn
from fundamentallm import DataError, field, hookimpl, plugin
from fundamentallm.testing import TinySamples

@plugin
class Parts:
    """A tiny data source, model and optimizer, with a flaw if wanted."""

    flaw: str = ""
    batch_size: int = 4
    lr: float = 0.01
    limit: int = 1000
    marker: Path | None = None

    @hookimpl
    def build_data(self, run):
        if self.batch_size > self.limit and self.flaw == "memory":
            raise MemoryError("no more")
        if self.batch_size > self.limit and self.flaw == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.batch_size > self.limit and self.flaw == "data":
            raise DataError("too few samples")
        return TinySamples(self.batch_size, run.device)

    @hookimpl
    def build_model(self):
        return Net(self.flaw)

    @hookimpl
    def build_optimizer(self, run):
        return torch.optim.SGD(list(run.model.parameters())[: 2 if self.flaw == "few" else None], lr=self.lr)

    @hookimpl
    def on_train_start(self, run):
        if self.flaw == "restores wrong" and run.progress.step:
            with torch.no_grad():
                run.model.out.weight.add_(1)

    @hookimpl
    def on_step_start(self, run):
        if self.flaw == "memory later" and run.progress.step > 400:
            raise MemoryError("no more")
        if self.flaw == "data later" and run.progress.step > 900:
            raise DataError("no more samples")
        if self.flaw == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
        if self.flaw == "slow":
            self.marker.write_text(str(os.getpid()))
            time.sleep(60)


class Net(nn.Module):
    def __init__(self, flaw):
        super().__init__()
        self.flaw = flaw
        self.hidden = nn.Linear(8, 16)
        self.dropout = nn.Dropout(0.95 if flaw == "drops" else 0.5)
        self.out = nn.Linear(16, 1)
        if flaw == "unused":
            self.spare = nn.Linear(3, 3)
        if flaw == "fails":
            raise RuntimeError("no such shape")

    def forward(self, inputs, targets):
        out = self.out(self.dropout(torch.tanh(self.hidden(inputs))))
        loss = nn.functional.mse_loss(out, targets)
        if self.flaw == "compiles" and not self.training:
            time.sleep(0.5)
            self.flaw = ""
        if self.flaw == "no number":
            loss = loss * float("nan")
        return loss * 0 + 1 if self.flaw == "flat" else loss
'''

SETTINGS = """
plugins = ["./parts.py", "checkpoint", "jsonl", "console", "progress", "mlflow"]
[run]
length = 1000
validate_every = 100
device = "cpu"
folder = "runs"
[checkpoint]
every = 50
folder = "elsewhere"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to call commands in, and another for what is temporary."""
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "here" / "parts.py").write_text(PARTS)
    (tmp_path / "here" / "run.toml").write_text(SETTINGS)
    return tmp_path


def left(place: Path) -> set[str]:
    """Return what is in the folders that was not there at first."""
    found = {str(path.relative_to(place)) for path in place.rglob("*")}
    foreign = ("__pycache__", "torchinductor_")  # Python's, and torch's own
    return {name for name in found if not any(word in name for word in foreign)} - {
        "here",
        "temporary",
        "here/parts.py",
        "here/run.toml",
    }


def call(command: object, *words: object, flaw: str = "") -> Result:
    chosen = ["--set", f"parts.flaw={flaw}"] if flaw else []
    return CliRunner().invoke(command, ["run.toml", *chosen, *map(str, words)])


def said(result: Result) -> str:
    assert result.exit_code == 0, result.exception or result.output
    return result.output


def test_check_says_what_it_found_and_leaves_nothing_behind(place: Path) -> None:
    text = said(call(check))
    for expected in (
        "parts, checkpoint",
        "left out, since they only follow a run: jsonl, console, progress, mlflow",
        "161 parameters in 4 tensors, none frozen; float32, on cpu",
        "4 samples, 4 tokens, in 1 micro-batch",
        "val/loss ",
        "parameters 644 bytes, gradients 644 bytes; the peak of the process ",
        "1,000 steps of ",
        "10 validations of ",
        "20 saves of ",
        "from the checkpoint of step 2: weights, optimizer, plugins and next micro-batch are bit for",
        "nothing wrong was found\n",
    ):
        assert expected in text
    assert left(place) == set()


def test_check_without_checkpoints_restores_from_memory(place: Path) -> None:
    for words in (["--no-plugin", "checkpoint"], ["--set", "checkpoint.contents=model"]):
        text = said(call(check, *words))
        assert "from a copy in memory, for there is no checkpoint to resume from" in text
        assert "nothing wrong was found" in text
    assert left(place) == set()


def test_check_makes_as_many_steps_as_wanted_but_no_more_than_the_run_has(place: Path) -> None:
    assert "checkpoint of step 5" in said(call(check, "--steps", 5))
    assert "checkpoint of step 1:" in said(call(check, "--set", "run.length=1"))


def test_check_names_parameters_without_gradient_or_without_optimizer(place: Path) -> None:
    text = said(call(check, flaw="unused"))
    assert "note: no gradient reaches 2 trained tensors: spare.weight, spare.bias" in text
    assert "nothing wrong was found, but see the notes" in text
    text = said(call(check, flaw="few"))
    assert "note: the optimizer does not have 2 trained tensors: out.weight, out.bias" in text


def test_check_of_a_language_model_compares_its_loss_with_guessing(place: Path) -> None:
    (place / "here" / "text.txt").write_text("the cat sat on the mat. " * 60)
    (place / "here" / "run.toml").write_text("""
plugins = ["text", "gpt", "adamw", "accumulate", "lr_schedule", "early_stopping", "guard", "ema"]
run = { length = "1e6 tokens", device = "cpu" }
text = { path = "text.txt", cache_dir = "cache", context_length = 8, batch_size = 2 }
gpt = { num_layers = 1, num_heads = 1, d_model = 8 }
accumulate = { microbatches = 3 }
lr_schedule = { warmup = "1000 tokens" }
""")
    text = said(call(check))
    assert "6 samples, 48 tokens, in 3 micro-batches" in text
    assert "guessing among 11 tokens has 2.398" in text
    assert "20,834 steps" in text
    assert "left out, since they only follow a run: early_stopping" in text
    assert "nothing wrong was found" in text
    text = said(call(lr_finder, "--steps", 20))
    assert "[adamw]\nlr = " in text
    # Of windows this short, several begin alike and go on in different ways: one does not.
    one = (
        "--set",
        "adamw.lr=0.1",
        "--set",
        "text.batch_size=1",
        "--set",
        "accumulate.microbatches=1",
    )
    assert "the loss on one batch fell" in said(call(check, "--overfit-one-batch", *one))
    assert left(place) <= {"here/text.txt", "here/cache"} | {
        str(path.relative_to(place)) for path in (place / "here" / "cache").rglob("*")
    }


def test_check_estimates_a_run_whose_steps_grow_from_its_end_and_middle(place: Path) -> None:
    (place / "here" / "text.txt").write_text("the cat sat on the mat. " * 60)
    (place / "here" / "run.toml").write_text("""
plugins = ["text", "gpt", "adamw", "schedules", "ema"]
run = { length = "60 steps", device = "cpu" }
text = { path = "text.txt", cache_dir = "cache", context_length = 8, batch_size = 2 }
gpt = { num_layers = 1, num_heads = 1, d_model = 8, context_length = 32 }
[schedules.of.text]
batch_size = { end = 16.0 }
context_length = { end = 32.0 }
""")
    text = said(call(check))
    assert "step       2 samples, 16 tokens" in text
    assert "for a step of 9 samples, 180 tokens" in text
    assert "for a step of 16 samples, 512 tokens" in text
    tokens = int(text[text.index(" tokens: 60 steps") - 6 :].split()[0].replace(",", ""))
    made = train("run.toml").progress.tokens
    assert tokens == pytest.approx(made, rel=0.1)
    # What stays as it is has one point, though a plugin acts at every step.
    words = [
        f"schedules.of.text.{name}.end={end}"
        for name, end in (("batch_size", "2.0"), ("context_length", "8.0"))
    ]
    assert "tokens: 60 steps of" in said(
        call(check, *(w for word in words for w in ("--set", word)))
    )


def test_check_counts_the_gradients_of_parameters_that_are_trained_later(place: Path) -> None:
    words = ["--plugin", "freeze", "--set", 'freeze.patterns=["hidden.*"]']
    frozen = said(call(check, *words))
    assert "gradients 68 bytes;" in frozen
    late = said(call(check, *words, "--set", "freeze.unfreeze={\"*\" = '700 steps'}"))
    assert "161 parameters in 4 tensors, 144 of them frozen" in late
    assert "gradients 644 bytes;" in late


def test_a_probe_of_the_end_makes_all_its_steps_though_one_would_be_the_last(place: Path) -> None:
    passed = {"step": 999, "applied": 999, "tokens": 3996, "samples": 3996, "seconds": 1.0}
    probe = Probe(steps=3, passed=passed)
    composed = compose(
        "run.toml",
        plugins=[probe],
        overrides=["run.length='4000 tokens'"],
        remove=["mlflow"],
    )
    run = train(composed, run_dir=place / "temporary" / "run")
    assert (len(probe.losses), run.progress.step, run.progress.tokens) == (3, 1002, 4008)


def test_check_counts_what_the_first_validation_alone_takes_once(place: Path) -> None:
    text = said(call(check, flaw="compiles"))
    assert "10 validations of " in text
    assert " (the first 5" in text


def test_out_of_memory_in_a_later_step_is_an_error_that_names_its_place_in_the_run(
    place: Path,
) -> None:
    result = call(check, "--plugin", "ema", flaw="memory later")
    assert isinstance(result.exception, OutOfMemoryError)
    assert "that was after 100% of the run" in "".join(result.exception.__notes__)
    assert "peak of the process" in result.output
    assert "run        " not in result.output
    # If no plugin acts at later steps, these are not tried.
    assert "nothing wrong was found\n" in said(call(check, flaw="memory later"))
    assert left(place) == set()


def test_an_error_in_the_trial_of_later_steps_is_a_note(place: Path) -> None:
    text = said(call(check, "--plugin", "ema", flaw="data later"))
    assert (
        "note: time and memory are those of the first steps; later ones fail: no more samp" in text
    )
    assert "1,000 steps of " in text
    assert left(place) == set()


@pytest.mark.parametrize(
    ("flaw", "kind", "complaint"),
    [
        ("no number", NotFiniteError, "train/loss is nan"),
        ("fails", FundamentalError, "plugin 'parts' .* failed in build_model: .*no such shape"),
        ("restores wrong", StorageError, r"from the checkpoint of step 2, .*: model\.out\.weight$"),
        ("memory", OutOfMemoryError, "out of memory: no more"),
    ],
)
def test_check_ends_with_the_error_of_the_run(
    place: Path, flaw: str, kind: type[FundamentalError], complaint: str
) -> None:
    result = call(check, "--set", "parts.limit=3", flaw=flaw)
    assert isinstance(result.exception, kind)
    with pytest.raises(kind, match=complaint):
        raise result.exception
    assert "nothing wrong" not in result.output
    assert left(place) == set()


def test_check_reports_what_it_measured_before_the_error(place: Path) -> None:
    text = call(check, flaw="no number").output
    assert "161 parameters" in text
    assert "loss       nan" in text


@pytest.mark.parametrize("command", [check, lr_finder, batch_size_finder])
def test_all_mistakes_of_the_settings_are_reported(place: Path, command: object) -> None:
    result = call(command, "--set", "parts.lrr=1", "--set", "run.lenght=2")
    assert isinstance(result.exception, SettingsError)
    assert "unknown setting (did you mean 'lr'?)" in str(result.exception)
    assert "unknown setting (did you mean 'length'?)" in str(result.exception)
    result = CliRunner().invoke(command, ["no-such.toml"])
    assert "no-such.toml: No such file" in str(result.exception)
    assert left(place) == set()


def test_one_batch_is_memorized_despite_dropout_and_a_schedule(place: Path) -> None:
    words = (
        "--overfit-one-batch",
        "--plugin",
        "lr_schedule",
        "--set",
        "lr_schedule.warmup=1.0",
        "--set",
        "parts.lr=0.3",
    )
    text = said(call(check, *words, flaw="drops"))
    assert "updates: this model can learn from this data" in text
    assert left(place) == set()


def test_one_batch_is_trained_for_as_long_as_its_loss_falls(place: Path) -> None:
    text = said(call(check, "--overfit-one-batch", "--set", "parts.lr=0.003"))
    assert 300 < int(text.split(" updates: ")[0].split()[-1]) < 1200
    with pytest.raises(FundamentalError, match="is 1 after 300 steps"):
        raise call(check, "--overfit-one-batch", flaw="flat").exception or AssertionError
    with pytest.raises(FundamentalError, match="after 200 steps.* still falling"):
        words = ("--steps", 200, "--set", "parts.lr=0.003")
        raise call(check, "--overfit-one-batch", *words).exception or AssertionError
    with pytest.raises(FundamentalError, match="after 1200 steps.* still falling"):
        words = ("--set", "parts.lr=0.0008")
        raise call(check, "--overfit-one-batch", *words).exception or AssertionError


@pytest.mark.parametrize(
    ("flaw", "words", "kind", "complaint"),
    [
        ("flat", [], FundamentalError, "is 1 after 20 steps; it began at 1, .* hardly falls"),
        ("no number", [], NotFiniteError, "step 1: the loss on one batch is nan"),
        ("x", ["--set", "parts.lr=1e30"], NotFiniteError, "try a smaller learning rate"),
    ],
)
def test_a_batch_that_cannot_be_learned_is_an_error_with_advice(
    place: Path, flaw: str, words: list[str], kind: type[FundamentalError], complaint: str
) -> None:
    result = call(check, "--overfit-one-batch", "--steps", 20, *words, flaw=flaw)
    with pytest.raises(kind, match=complaint) as caught:
        raise result.exception or AssertionError(result.output)
    assert caught.type is kind
    assert left(place) == set()


def test_the_learning_rate_grows_by_a_constant_factor_whatever_schedules_are_listed(
    place: Path,
) -> None:
    composed = compose(
        "run.toml",
        add=["lr_schedule"],
        overrides=["lr_schedule.warmup=500", "run.max_time='1 hour'"],
    )
    test = run_test(composed, 1e-5, 1e-3, 21)
    assert test.rates == pytest.approx([1e-5 * 10 ** (k / 10) for k in range(21)], rel=1e-12)
    assert len(test.losses) == 21
    assert left(place) == set()


def test_lr_finder_prints_a_setting_to_paste_that_trains(place: Path) -> None:
    text = said(call(lr_finder, "--max", 10, "--set", "parts.batch_size=64"))
    pasted = tomli.loads(text[text.index("[parts]") :])
    assert 1e-4 < pasted["parts"]["lr"] < 2
    assert "it falls fastest at" in text
    assert "the loss diverged at" in text
    assert text.count("│") == 12
    assert left(place) == set()


def test_the_setting_to_paste_respects_that_a_plugin_scales_its_learning_rate(place: Path) -> None:
    code = PARTS.replace("lr=self.lr)", "lr=self.lr * 100)")
    words = ("--set", "parts.batch_size=64")
    plain = said(call(lr_finder, *words))
    (place / "here" / "parts.py").write_text(code)
    scaled = said(call(lr_finder, *words))
    rates = [tomli.loads(t[t.index("[parts]") :])["parts"]["lr"] for t in (plain, scaled)]
    assert rates[1] == pytest.approx(rates[0] / 100)


@pytest.mark.parametrize(
    ("flaw", "words", "kind", "complaint"),
    [
        ("no number", [], NotFiniteError, "the loss was nan: it diverges at once"),
        ("x", ["--min", "1e4", "--max", "1e5"], NotFiniteError, "try a smaller --min than 1.0e4"),
        ("flat", [], FundamentalError, "never fell clearly between 1.0e-6 and 1.0e0, in 100 steps"),
        ("x", ["--max", "1e-5"], FundamentalError, "never fell clearly"),
    ],
)
def test_a_range_that_suggests_nothing_is_an_error_that_says_why(
    place: Path, flaw: str, words: list[str], kind: type[FundamentalError], complaint: str
) -> None:
    result = call(lr_finder, *words, flaw=flaw)
    with pytest.raises(kind, match=complaint):
        raise result.exception or AssertionError(result.output)
    assert left(place) == set()


@pytest.mark.parametrize(
    ("command", "words", "complaint"),
    [
        (lr_finder, ["--min", "1", "--max", "0.1"], "--min 1 is not below --max 0.1"),
        (lr_finder, ["--min", "0"], "0.0 is not in the range"),
        (lr_finder, ["--max", "nan"], "--max nan"),
        (lr_finder, ["--steps", "3"], "3 is not in the range"),
        (batch_size_finder, ["--min", "9", "--max", "8"], "--min 9 is above --max 8"),
        (batch_size_finder, ["--max", "2.5"], "'2.5' is not a valid integer"),
        (check, ["--steps", "0"], "0 is not in the range"),
    ],
)
def test_options_outside_their_range_are_refused(
    place: Path, command: object, words: list[str], complaint: str
) -> None:
    result = call(command, *words)
    assert result.exit_code == 2
    assert complaint in result.output


@pytest.mark.slow
def test_batch_size_finder_finds_what_fits_where_processes_are_killed(place: Path) -> None:
    text = said(
        call(batch_size_finder, "--min", 5, "--max", 6, "--set", "parts.limit=5", flaw="killed")
    )
    rows = [line.split() for line in text.splitlines()[1:3]]
    assert [row[0] for row in rows] == ["5", "6"]
    assert "does not fit: its process was killed" in text
    assert "the largest found to fit: 5; the settings have 4" in text
    assert tomli.loads(text[text.index("[parts]") :])["parts"]["batch_size"] == 5
    assert left(place) == set()


@pytest.mark.slow
def test_batch_size_finder_keeps_the_size_of_a_step(place: Path) -> None:
    words = (
        "--keep-step-size",
        "--min",
        6,
        "--plugin",
        "accumulate",
        "--set",
        "parts.batch_size=6",
        "--set",
        "accumulate.microbatches=1",
    )
    text = said(call(batch_size_finder, *words))
    pasted = tomli.loads(text[text.index("[parts]") :])
    assert pasted == {"parts": {"batch_size": 6}}
    result = call(batch_size_finder, *words, "--max", 7, "--set", "parts.batch_size=8", "--min", 5)
    assert "a step has 8 samples" in str(result.exception)
    assert left(place) == set()


@pytest.mark.parametrize(
    ("flaw", "kind", "complaint"),
    [
        (
            "memory",
            OutOfMemoryError,
            "not even parts.batch_size = 4 fits into memory: out of memory",
        ),
        ("data", DataError, "too few samples"),
    ],
)
def test_batch_size_finder_fails_if_the_smallest_size_fails(
    place: Path, flaw: str, kind: type[FundamentalError], complaint: str
) -> None:
    result = call(batch_size_finder, "--min", 4, "--set", "parts.limit=3", flaw=flaw)
    with pytest.raises(kind, match=complaint):
        raise result.exception or AssertionError(result.output)
    assert left(place) == set()


def test_data_without_a_batch_size_is_refused_with_its_settings(place: Path) -> None:
    (place / "here" / "parts.py").write_text(PARTS.replace("batch_size: int = 4", "batch_size = 4"))
    result = call(batch_size_finder)
    assert isinstance(result.exception, SettingsError)
    assert "parts: has no setting 'batch_size'" in str(result.exception)
    assert "its settings: flaw, lr, limit, marker" in str(result.exception)


def test_a_trial_measures_speed_and_memory(place: Path) -> None:
    choice = {"overrides": ["parts.batch_size=8"], "add": [], "remove": []}
    trial = run_trial({"settings": "run.toml", "choice": choice, "steps": 4}, place / "temporary")
    assert trial.code == 0
    assert trial.speed == pytest.approx(8 / trial.seconds)
    assert trial.peak > 10 << 20


@pytest.mark.parametrize("words", [[check], [check, "--overfit-one-batch"], [lr_finder]])
def test_a_signal_ends_a_trial_and_leaves_nothing_behind(place: Path, words: list[object]) -> None:
    result = call(*words, flaw="interrupted")
    assert result.exit_code == 130
    assert "nothing wrong" not in result.output
    assert left(place) == set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_signal_ends_the_trial_of_a_batch_size_and_its_process(place: Path) -> None:
    marker = place / "here" / "marker"
    words = [
        sys.executable,
        "-m",
        "fundamentallm",
        "batch-size-finder",
        "run.toml",
        "--set",
        "parts.flaw=slow",
        "--set",
        f"parts.marker={marker}",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while not (marker.is_file() and marker.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        child = int(marker.read_text())
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    marker.unlink()
    assert left(place) == set()


def test_of_the_known_plugins_the_right_ones_take_part() -> None:
    classes = {name: found[0].load() for name, found in find_plugins().items()}
    made = {name: cls.__new__(cls) for name, cls in classes.items()}
    lean_ones = {name for name, one in made.items() if shapes_steps(one)}
    out = {name for name, one in made.items() if follows(one)}
    assert {
        "text",
        "gpt",
        "adamw",
        "amp",
        "grad_clip",
        "accumulate",
        "freeze",
        "lora",
        "compile",
        "deterministic",
        "muon",
    } & made.keys() <= lean_ones
    assert not lean_ones & {
        "lr_schedule",
        "schedules",
        "guard",
        "ema",
        "checkpoint",
        "mlflow",
        "early_stopping",
        "validation",
        "console",
        "sample",
    }
    assert {
        "mlflow",
        "console",
        "jsonl",
        "progress",
        "early_stopping",
        "sample",
    } & made.keys() <= out
    assert not out & {"checkpoint", "guard", "ema", "lr_schedule", "validation", "text", "gpt"}


@pytest.mark.parametrize("how", ["wraps", "answers", "wraps and uses the result of"])
def test_lr_finder_works_with_a_plugin_that_changes_the_validation(how: str, place: Path) -> None:
    """It also shapes updates, so it takes part; a validation without metrics would break it."""
    own = """
    @hookimpl(wrapper=WRAPS)
    def validate(self, run):
        metrics = (yield) if WRAPS else {}
        return metrics | {"val/bits": metrics["val/loss"] / 0.69}

    @hookimpl
    def on_validation_end(self, metrics):
        assert metrics["val/bits"] or not USES


class Net"""
    own = own.replace("WRAPS", str(how != "answers")).replace("USES", str("uses" in how))
    if how == "answers":
        own = own.replace("(yield) if False else {}", "{}")
    (place / "here" / "parts.py").write_text(PARTS.replace("\n\n\nclass Net", "\n" + own))
    assert "[parts]\nlr = " in said(call(lr_finder, "--max", 10, "--set", "parts.batch_size=64"))


GLOBAL_ORDER = """

    @hookimpl
    def build_data(self, run):
        return Shuffled(self.batch_size, run.device)


class Shuffled(TinySamples):
    def batches(self, progress):
        from torch.utils.data import DataLoader
        samples = [self.batch(range(i, i + 1)) for i in range(64)]
        pairs = [tuple(part[0] for part in sample.data) for sample in samples]
        while True:
            for data in DataLoader(pairs, batch_size=4, shuffle=True):
                yield Batch(tuple(data), 4, 4, 4)


class Net"""


def test_check_names_the_loader_whose_order_comes_from_the_global_generator(place: Path) -> None:
    code = PARTS.replace("\n\n\nclass Net", GLOBAL_ORDER, 1)
    code = code.replace("import DataError,", "import Batch, DataError,")
    (place / "here" / "parts.py").write_text(code)
    result = call(check)
    assert isinstance(result.exception, StorageError)
    assert "the next micro-batch is not that of a run that was not stopped" in str(result.exception)
    assert "a DataLoader with `shuffle=True` and without `generator=`" in str(result.exception)
    assert "nothing wrong" not in result.output


@pytest.mark.parametrize("command", [check, lr_finder, batch_size_finder])
@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_each_command_refuses_to_be_one_of_several_processes(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: object, variable: str
) -> None:
    monkeypatch.setenv(variable, "2")
    result = call(command)
    assert isinstance(result.exception, SettingsError)
    assert f"is one of several ({variable} is 2): call it without a launcher" in str(
        result.exception
    )
