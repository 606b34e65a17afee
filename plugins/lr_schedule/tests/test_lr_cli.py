"""``fundamentallm lr`` draws what a run does, without building anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fundamentallm import SettingsError, StorageError, compose, train
from fundamentallm.testing import compose_tiny
from fundamentallm_lr_schedule.cli import lr
from fundamentallm_lr_schedule.curve import trace_lr
from fundamentallm_lr_schedule.plot import text

PARTS = '''
from fundamentallm import hookimpl, plugin

@plugin
class Parts:
    """A model that must not be built, with an optimizer's learning rate."""

    lr: float = 0.02
    """Base learning rate."""

    @hookimpl
    def build_data(self): raise AssertionError("built")

    @hookimpl
    def build_model(self): raise AssertionError("built")

    @hookimpl
    def build_optimizer(self): raise AssertionError("built")
'''


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    (tmp_path / "parts.py").write_text(PARTS)
    path = tmp_path / "run.toml"
    path.write_text(
        'plugins = ["./parts.py", "lr_schedule"]\n[run]\nlength = 1000\n'
        "[lr_schedule]\nwarmup = 100\ndecay_to = 0.1\n"
    )
    return path


def drawn(*arguments: object) -> str:
    done = CliRunner().invoke(lr, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_lr_draws_the_run_and_prints_its_first_last_and_highest_rate(settings: Path) -> None:
    output = drawn(settings)
    assert "learning rate: first 0.000198, highest 0.02 at update 100, last 0.002" in output
    assert output.count("│") == 16
    assert "1000 steps" in output


def test_the_drawing_rises_and_falls_with_the_schedule(settings: Path) -> None:
    overrides = [
        "lr_schedule.shape='wsd'",
        "lr_schedule.warmup=0.5",
        "lr_schedule.decay=0.5",
        "lr_schedule.decay_to=0.0",
    ]
    picture = text(trace_lr(compose(settings, overrides=overrides)), width=8, height=4)
    assert picture.splitlines()[:5] == [
        "2.00e-02 │⠀⠀⠀⢠⠿⡄⠀⠀",
        "         │⠀⠀⣠⠏⠀⠹⣄⠀",
        "         │⠀⣰⠃⠀⠀⠀⠘⣆",
        "         │⣰⠃⠀⠀⠀⠀⠀⠘",
        "       0 └────────",
    ]


def test_the_curve_equals_the_learning_rates_of_a_run(tmp_path: Path) -> None:
    table = {"shape": "one_cycle", "warmup": 0.3, "decay_to": 0.01}
    composed = compose_tiny("lr_schedule", settings={"lr_schedule": table}, length=20, log_every=1)
    curve = trace_lr(composed)
    run = train(composed, run_dir=tmp_path / "run")
    assert curve.positions == list(range(20))
    assert curve.rates == [row["optim/lr"] for row in run.history]


def test_the_option_steps_draws_a_run_of_another_length(settings: Path) -> None:
    output = drawn(settings, "--steps", 5000, "--set", "lr_schedule.warmup=0.5")
    assert "5000 steps" in output
    assert "highest 0.02 at update 2500" in output


def test_the_axis_is_in_the_unit_of_the_run(settings: Path) -> None:
    output = drawn(settings, "--set", "run.length='1e6 tokens'", "--set", "lr_schedule.warmup=0.1")
    assert "1e+06 tokens" in output
    assert "first 0, highest 0.02 at 100000 tokens, last 0.002" in output


@pytest.mark.parametrize("shape", ["constant", "inverse_sqrt"])
def test_a_schedule_without_an_end_in_another_unit_is_drawn_beyond_its_warmup(
    settings: Path, shape: str
) -> None:
    sets = ("--set", "run.length='2 hours'", "--set", f"lr_schedule.shape='{shape}'")
    assert "200 steps" in drawn(settings, *sets)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_runs_can_be_drawn(settings: Path, length: int) -> None:
    assert f"{length} steps" in drawn(settings, "--steps", length, "--set", "lr_schedule.warmup=0")


def test_png_writes_an_image(settings: Path, tmp_path: Path) -> None:
    picture = tmp_path / "lr.png"
    assert f"written: {picture}" in drawn(settings, "--png", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_image_that_cannot_be_written_is_an_error_that_names_the_file(
    settings: Path, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=r"missing/lr\.png: cannot be written: No such file"):
        drawn(settings, "--png", tmp_path / "missing" / "lr.png")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["lr_schedule.warmup='1e6 tokens'"], "lr_schedule.warmup: is in tokens, but length is in"),
        (
            [
                "plugins=['./parts.py', 'lr_schedule', 'other']",
                "other.plugin='lr_schedule'",
                "other.shape='constant'",
                "other.warmup='5 minutes'",
            ],
            "schedules in several units cannot be drawn as one: lr_schedule is in steps, other is in",
        ),
    ],
)
def test_settings_that_cannot_be_drawn_are_an_error(
    settings: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], complaint: str
) -> None:
    monkeypatch.chdir(settings.parent)
    with pytest.raises(SettingsError) as caught:
        drawn(settings, *(word for one in overrides for word in ("--set", one)))
    assert complaint in str(caught.value)


def test_settings_without_a_schedule_have_nothing_to_draw(settings: Path) -> None:
    settings.write_text('plugins = ["./parts.py"]\n[run]\nlength = 1000\n')
    with pytest.raises(SettingsError, match="no schedule to draw: lr_schedule is not in the"):
        drawn(settings)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", code]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_drawing_imports_no_torch(settings: Path) -> None:
    code = f"""
import sys
from fundamentallm_lr_schedule.cli import lr
lr([{str(settings)!r}], standalone_mode=False)
print(sorted({{"torch", "numpy", "matplotlib"}} & set(sys.modules)))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_missing_matplotlib_is_an_error_with_the_install_command(settings: Path) -> None:
    code = f"""
import sys
sys.modules["matplotlib"] = None
from fundamentallm import SettingsError
from fundamentallm_lr_schedule.cli import lr
try:
    lr([{str(settings)!r}, "--png", "lr.png"], standalone_mode=False)
except SettingsError as error:
    print(error)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "pip install 'fundamentallm-lr-schedule[png]'" in done.stdout.splitlines()[-1]
