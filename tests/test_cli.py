"""The command line: what it prints, what it leaves behind, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import forked
import pytest
import tomli

from fundamentallm import HOOKS, about_hook, compose, find_plugins
from fundamentallm.cli import main

TINY = '''
from fundamentallm import field, ge, hookimpl, plugin
from fundamentallm.testing import TinyData, TinyModel, TinyOptimizer

@plugin
class Tiny:
    """What a tiny run cannot do without."""

    batch_size: int = field(default=4, validator=ge(1))
    options: dict[str, list[float]] = field(factory=dict)

    @hookimpl
    def build_data(self, run):
        return TinyData(batch_size=self.batch_size).build_data(run)

    @hookimpl
    def build_model(self):
        return TinyModel().build_model()

    @hookimpl
    def build_optimizer(self, run):
        return TinyOptimizer().build_optimizer(run)
'''

TROUBLE = '''
from typing import Literal
from fundamentallm import DataError, SettingsError, StorageError, hookimpl, plugin

@plugin
class Trouble:
    """Fails in a way of choice."""

    kind: Literal[
        "diverge", "data", "storage", "settings", "plugin", "memory", "bug", "end", "stop", "start"
    ]

    @hookimpl
    def on_run_start(self):
        if self.kind == "start":
            raise DataError("corpus.txt: is gone")

    @hookimpl
    def on_train_start(self, run):
        if self.kind == "diverge":
            run.model.out.bias.data.fill_(float("nan"))
        if self.kind == "data":
            raise DataError("corpus.txt: is empty")
        if self.kind == "storage":
            raise StorageError("/data: no space left")
        if self.kind == "settings":
            raise SettingsError("run.length: is more than there is data")
        if self.kind == "bug":
            run.model.forward = None

    @hookimpl
    def on_step_end(self, run):
        if self.kind == "plugin":
            raise ZeroDivisionError("division by zero")
        if self.kind == "memory":
            raise MemoryError("too much")
        if self.kind == "stop":
            run.stop("enough")

    @hookimpl
    def on_train_end(self):
        if self.kind == "end":
            raise RuntimeError("cannot close")
'''

SAVER = '''
from fundamentallm import hookimpl, plugin

@plugin
class Saver:
    """Keeps the last snapshot."""

    @hookimpl
    def on_step_end(self, run):
        print("step", run.progress.step, flush=True)

    @hookimpl
    def on_safe_point(self, run):
        import torch
        folder = run.folder / "checkpoints" / f"step-{run.progress.step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text('{"finite": true}')
        torch.save(run.snapshot(), folder / "all.pt")

    @hookimpl
    def read_checkpoint(self, run):
        import torch
        wanted = run.wanted_checkpoint
        saved = sorted(run.folder.glob(f"checkpoints/{wanted or 'step-*'}"))
        return torch.load(saved[-1] / "all.pt", weights_only=False) if saved else None
'''

SETTINGS = """
plugins = ["./tiny.py"]

[run]
length = "4 steps"
log_every = 2
device = "cpu"
folder = "runs"

[tiny]
batch_size = 2
options.a = [1.0, 2.5]
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Ended]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with settings and plugins, and the current one."""
    for name, text in {
        "tiny.py": TINY,
        "trouble.py": TROUBLE,
        "saver.py": SAVER,
        "tiny.toml": SETTINGS,
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process; anything but a clean exit fails the test."""

    def call(*words: str) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["fundamentallm", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(code, *capsys.readouterr())

    return call


# ---------------------------------------------------------------------------------------------
# Training


def test_train_ends_with_0_and_says_where_the_run_is(call: Call, folder: Path) -> None:
    assert call("train", "tiny.toml") == Ended(
        0, f"finished after 4 steps: {folder}/runs/tiny\n", ""
    )


def test_train_records_settings_that_compose_again_and_the_environment(call: Call) -> None:
    call("train", "tiny.toml", "--set", "run.seed=5")
    run = Path("runs/tiny")
    recorded, composed = (
        compose(run / "settings.toml"),
        compose("tiny.toml", overrides=["run.seed=5"]),
    )
    assert recorded.tables == composed.tables
    about = json.loads((run / "environment.json").read_text())
    assert about["seed"] == 5
    assert about["command"] == ["fundamentallm", "train", "tiny.toml", "--set", "run.seed=5"]
    assert set(about["plugins"]) == {"tiny"}
    assert {"fundamentallm", "torch"} <= set(about["versions"])


def test_each_train_makes_a_new_run_folder_named_after_settings_or_name(call: Call) -> None:
    for _ in range(3):
        assert call("train", "tiny.toml").code == 0
    assert call("train", "tiny.toml", "--set", "run.name=other").code == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "other",
        "tiny",
        "tiny-2",
        "tiny-3",
    ]


def test_train_starts_or_continues_the_run_in_a_given_folder(call: Call) -> None:
    words = ("train", "tiny.toml", "--run-dir", "mine", "--plugin", "./saver.py")
    assert call(*words).out.splitlines() == [
        "step 1",
        "step 2",
        "step 3",
        "step 4",
        "finished after 4 steps: mine",
    ]
    assert call(*words, "--set", "run.length=6").out.splitlines() == [
        "step 5",
        "step 6",
        "finished after 6 steps: mine",
    ]


def test_resume_continues_from_the_checkpoint_that_is_asked_for(call: Call) -> None:
    call("train", "tiny.toml", "--plugin", "./saver.py")
    steps = call("resume", "runs/tiny", "--from", "step-00000002").out.splitlines()[:-1]
    assert steps == ["step 3", "step 4"]
    ended = call("resume", "runs/tiny", "--from", "step-00000009")
    assert ended.code == 2
    assert "no listed plugin finds a checkpoint to continue from" in ended.err


def test_resume_removes_and_adds_plugins(call: Call) -> None:
    call(
        "train", "tiny.toml", "--plugin", "./saver.py", "--plugin", "jsonl", "--set", "run.length=2"
    )
    ended = call(
        "resume", "runs/tiny", "--no-plugin", "jsonl", "--plugin", "csv", "--set", "run.length=4"
    )
    assert ended.code == 0, ended.err
    assert Path("runs/tiny/metrics.csv").is_file()
    assert len(Path("runs/tiny/metrics.jsonl").read_text().splitlines()) == 1


def test_a_run_whose_checkpoints_no_plugin_reads_does_not_start_again(call: Call) -> None:
    words = ("train", "tiny.toml", "--plugin", "checkpoint", "--run-dir", "mine")
    assert call(*words).code == 0
    before = Path("mine/settings.toml").read_text()
    ended = call("resume", "mine", "--no-plugin", "checkpoint", "--set", "run.length=6")
    assert ended.code == 2
    assert "mine: no listed plugin finds a checkpoint to continue from" in ended.err
    assert Path("mine/settings.toml").read_text() == before


def test_resume_continues_from_what_the_folder_records(call: Call) -> None:
    call("train", "tiny.toml", "--plugin", "./saver.py", "--set", "run.length=2")
    assert call("resume", "runs/tiny").out.splitlines() == ["finished after 2 steps: runs/tiny"]
    assert call("resume", "runs/tiny", "--set", "run.length=3").out.splitlines() == [
        "step 3",
        "finished after 3 steps: runs/tiny",
    ]


def test_a_run_that_stops_on_purpose_ends_with_0(call: Call) -> None:
    ended = call("train", "tiny.toml", "--plugin", "trouble.py", "--set", "trouble.kind=stop")
    assert (ended.code, ended.out.split(":")[0]) == (0, "stopped after 1 steps")


# ---------------------------------------------------------------------------------------------
# Showing


def test_show_prints_toml_that_composes_to_the_same_with_the_place_of_each_value(
    call: Call,
) -> None:
    ended = call("show", "tiny.toml", "--set", "run.seed=7", "--set", "tiny.options.b=[]")
    assert (ended.code, ended.err) == (0, "")
    assert (
        tomli.loads(ended.out)
        == compose("tiny.toml", overrides=["run.seed=7", "tiny.options.b=[]"]).tables
    )
    lines = {
        line.partition(" = ")[0]: line.rpartition("  # ")[2] for line in ended.out.splitlines()
    }
    assert lines["length"] == "tiny.toml:5"
    assert lines["seed"] == "--set"
    assert lines["log_every"] == "tiny.toml:6"
    assert lines["batch_size"] == "tiny.toml:11"
    assert f"[tiny]  # {Path.cwd()}/tiny.py" in ended.out
    assert call("show", "tiny.toml").out.count("# default") == 2  # validate_first and the seed


def test_show_takes_the_same_choices_as_train(call: Call) -> None:
    assert "[saver]" in call("show", "tiny.toml", "--plugin", "saver.py").out
    ended = call("show", "tiny.toml", "--no-plugin", "tiny")
    assert ended.code == 2
    assert re.findall("plugins: no (data|model|optimizer): list one of", ended.err) == [
        "data",
        "model",
        "optimizer",
    ]
    assert not Path("runs").exists()


def test_plugins_lists_what_is_installed_for_people_and_for_programs(call: Call) -> None:
    rows = json.loads(call("plugins", "--json").out)
    assert [row["name"] for row in rows] == list(find_plugins())
    listing = call("plugins").out
    for row in rows:
        assert set(row) == {"name", "distribution", "version", "about"}
        assert row["about"]
        assert f"{row['distribution']} {row['version']}\n    {row['about']}\n" in listing


def test_hooks_lists_every_hook_in_the_order_of_a_run_with_kind_age_and_stability(
    call: Call,
) -> None:
    rows = [line.split() for line in call("hooks").out.splitlines()]
    found = [(hook, about_hook(hook)) for hook in HOOKS]
    assert rows == [[hook, facts.kind, facts.since, facts.stability] for hook, facts in found]


def test_hooks_with_settings_lists_the_plugins_of_each_hook(call: Call) -> None:
    Path("wrap.py").write_text("""
from fundamentallm import hookimpl, plugin
@plugin
class Wrap:
    "Wrap build_model; come first in on_step_end."
    before = ("tiny",)
    @hookimpl(wrapper=True)
    def build_model(self):
        return (yield)
    @hookimpl
    def on_step_end(self): ...
""")
    Path("hooks.toml").write_text(
        SETTINGS.replace('"./tiny.py"', '"./tiny.py", "saver.py", "wrap.py"')
    )
    answers = {
        line.split()[0]: line.split(maxsplit=4)[4:]
        for line in call("hooks", "hooks.toml").out.splitlines()
    }
    assert answers["build_model"] == ["wrap (wraps), tiny"]
    assert answers["on_step_end"] == ["saver, wrap"] or answers["on_step_end"] == ["wrap, saver"]
    assert answers["forward"] == []


def test_help_lists_the_commands_and_what_they_do(call: Call) -> None:
    ended = call("--help")
    assert ended.code == 0
    for command in ("train", "resume", "show", "plugins", "hooks"):
        assert f"\n  {command} " in ended.out
        assert call(command, "--help").code == 0


def test_the_version_is_that_of_the_distribution(call: Call) -> None:
    from importlib.metadata import version

    ended = call("--version")
    assert ended.code == 0
    assert version("fundamentallm") in ended.out


# ---------------------------------------------------------------------------------------------
# Other distributions

COMMANDS = """
import click
from fundamentallm import DataError
print("loaded")
@click.command()
@click.argument("how")
@click.pass_context
def odd(context, how):
    "Do something odd."
    if how == "exit":
        context.exit(3)
    if how == "error":
        raise DataError("odd.txt: is empty")
    if how == "abort":
        raise click.Abort
    return ["something"]
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution that brings a command, a plugin that cannot be loaded, and nothing else."""
    info = tmp_path / "site" / "acme_odd-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-odd\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fundamentallm.commands]\nodd = acme_odd:odd\nodder = acme_odd:no_such_command\n[fundamentallm]\nbroken = no_such_module:Broken\n"
    )
    (tmp_path / "site" / "acme_odd.py").write_text(COMMANDS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield
    sys.modules.pop("acme_odd", None)


@pytest.mark.usefixtures("installed")
def test_a_command_of_another_distribution_is_loaded_to_be_listed_or_called(call: Call) -> None:
    assert "loaded" not in call("train", "--help").out
    listing = call("--help").out
    assert "loaded" in listing
    assert "Do something odd." in listing
    assert "Do something odd." in call("odd", "--help").out


@pytest.mark.usefixtures("installed")
def test_a_command_that_cannot_be_loaded_says_so_and_hides_no_other(call: Call) -> None:
    listing = call("--help")
    assert listing.code == 0
    assert "odder" in listing.out
    assert "(cannot be loaded: AttributeError: " in listing.out
    assert "Train with SETTINGS" in listing.out


@pytest.mark.parametrize(
    ("how", "code"), [("exit", 3), ("error", 4), ("abort", 130), ("return", 0)]
)
@pytest.mark.usefixtures("installed")
def test_a_command_of_another_distribution_ends_as_it_says(call: Call, how: str, code: int) -> None:
    ended = call("odd", how)
    assert ended.code == code
    assert ended.err == ("error: odd.txt: is empty\n" if how == "error" else "")


@pytest.mark.usefixtures("installed")
def test_a_plugin_that_cannot_be_loaded_is_listed_with_the_reason(call: Call) -> None:
    rows = {row["name"]: row["about"] for row in json.loads(call("plugins", "--json").out)}
    assert (
        rows["broken"] == "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"
    )


# ---------------------------------------------------------------------------------------------
# Bad ends


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("diverge", 3, "step 2: train/loss is nan: the run has diverged"),
        ("data", 4, "corpus.txt: is empty"),
        ("storage", 5, "/data: no space left"),
        ("settings", 2, "run.length: is more than there is data"),
        ("memory", 6, "out of memory: too much; try a smaller batch size"),
        ("plugin", 7, "failed in on_step_end: ZeroDivisionError('division by zero')"),
        ("end", 7, "failed in on_train_end: RuntimeError('cannot close')"),
    ],
)
def test_each_bad_end_has_a_code_of_its_own_and_says_why(
    call: Call, kind: str, code: int, said: str
) -> None:
    ended = call("train", "tiny.toml", "--plugin", "trouble.py", "--set", f"trouble.kind={kind}")
    assert ended.code == code
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    if code == 7:
        assert "'trouble'" in line, "it names the plugin"
        assert f"{Path.cwd()}/trouble.py" in line, "and who brings it"


def test_after_a_bad_end_the_advice_of_the_plugins_is_printed_with_the_error(call: Call) -> None:
    Path("late.py").write_text("""
from fundamentallm import hookimpl, plugin
@plugin
class Late:
    "Fails in the third step."
    @hookimpl
    def on_step_start(self, run):
        if run.progress.step == 2:
            raise OSError("gone")
    @hookimpl
    def on_train_end(self, run):
        run.error.add_note("saved: step 2")
""")
    ended = call("train", "tiny.toml", "--plugin", "saver.py", "--plugin", "late.py")
    assert ended.code == 7
    assert ended.err.splitlines()[-1] == "saved: step 2"


@pytest.mark.parametrize(
    "words",
    [
        ("trian", "tiny.toml"),
        ("train",),
        ("train", "tiny.toml", "--nope"),
        ("train", "tiny.toml", "too", "many"),
        ("train", "gone.toml"),
        ("train", "."),
        ("train", "tiny.py"),
        ("train", "tiny.toml", "--set", "run.length"),
        ("train", "tiny.toml", "--set", "run.lenght=5"),
        ("train", "tiny.toml", "--plugin", "nope"),
        ("train", "tiny.toml", "--no-plugin", "nope"),
        ("show",),
        ("show", "gone.toml"),
        ("hooks", "gone.toml"),
        ("resume",),
        ("resume", "runs"),
        ("resume", "tiny.toml"),
    ],
)
def test_wrong_usage_and_settings_end_with_2_one_message_and_nothing_made(
    call: Call, folder: Path, words: tuple[str, ...]
) -> None:
    before = sorted(folder.rglob("*"))
    ended = call(*words)
    assert ended.code == 2
    assert ended.err.strip()
    assert ended.out == ""
    assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts] == before


def test_a_folder_that_cannot_hold_a_run_ends_with_5(call: Call) -> None:
    Path("file").write_text("")
    Path("dangling").symlink_to("nowhere/at/all")
    for place in ("file", "file/below", "dangling"):
        ended = call("train", "tiny.toml", "--set", f"run.folder={place}")
        assert ended.code == 5
        assert ended.err.startswith(
            f"error: {Path.cwd()}/{place}: no run folder can be made there: "
        )
        ended = call("train", "tiny.toml", "--run-dir", place)
        assert ended.code == 5
        assert "cannot be written: " in ended.err


def spawn(*words: str, **options: Any) -> forked.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return forked.Popen(
        [sys.executable, "-m", "fundamentallm", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


@pytest.mark.parametrize("words", [("plugins",), ("show", "tiny.toml"), ("schema",)], ids=str)
def test_a_full_output_is_an_error_without_a_traceback(words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fundamentallm", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (5, "error: [Errno 28] No space left on device\n")


def test_a_bug_ends_with_1_and_a_traceback_to_report() -> None:
    words = (
        "train",
        "tiny.toml",
        "--plugin",
        "saver.py",
        "--plugin",
        "trouble.py",
        "--set",
        "trouble.kind=bug",
    )
    process = spawn(*words)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "Traceback" in err
    assert "TypeError: 'NoneType' object is not callable" in err
    assert out == ""


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "tiny"), (signal.SIGTERM, "it's tiny")]
)
def test_a_signal_ends_the_run_at_a_safe_point_and_prints_the_command_that_resumes_it(
    call: Call, number: signal.Signals, name: str
) -> None:
    folder = Path.cwd() / "runs" / name
    words = ["train", "tiny.toml", "--plugin", "saver.py", "--set", "run.length=1_000_000"]
    process = spawn(*words, "--run-dir", str(folder))
    assert process.stdout is not None
    assert process.stdout.readline() == "step 1\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"{number.name}: stopping at the next safe point" in err
    assert "Traceback" not in err

    last = out.splitlines()[-1]
    assert last.startswith("interrupted after ")
    steps = int(last.split()[2])
    advice = err.splitlines()[-1]
    command = shlex.split(advice.removeprefix("resume with: "))
    assert command == [sys.executable, "-m", "fundamentallm", "resume", str(folder)]
    resumed = call(*command[3:], "--set", f"run.length={steps + 2}")
    assert resumed.code == 0
    assert resumed.out.splitlines() == [
        f"step {steps + 1}",
        f"step {steps + 2}",
        f"finished after {steps + 2} steps: {command[-1]}",
    ]


def test_a_second_signal_ends_the_run_at_once() -> None:
    Path("slow.py").write_text("""
import time
from fundamentallm import hookimpl, plugin
@plugin
class Slow:
    "Takes its time."
    @hookimpl
    def on_step_end(self):
        print("waiting", flush=True)
        while True:
            time.sleep(0.01)
""")
    process = spawn("train", "tiny.toml", "--plugin", "slow.py")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    assert any("stopping at the next safe point" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out.startswith("interrupted after 1 steps")


# ---------------------------------------------------------------------------------------------
# How it was called, and what a start says


SCRIPT = Path(sys.executable).with_name("fundamentallm")


@pytest.mark.parametrize(
    ("words", "path", "expected"),
    [
        ([sys.executable, "-m", "fundamentallm"], "/nowhere", f"{sys.executable} -m fundamentallm"),
        ([str(SCRIPT)], "/nowhere", str(SCRIPT)),
        (["RELATIVE"], "/nowhere", "RELATIVE"),
        ([str(SCRIPT)], str(SCRIPT.parent), "fundamentallm"),
        ([sys.executable, "-c", "PROGRAM"], str(SCRIPT.parent), "fundamentallm"),
        ([sys.executable, "-c", "PROGRAM"], "/nowhere", f"{sys.executable} -m fundamentallm"),
    ],
    ids=["module", "path", "relative path", "name", "program", "program without the name"],
)
def test_the_command_to_call_next_is_written_as_this_one_was_called(words, path, expected):
    program = "from fundamentallm import command_line; print(command_line('resume', 'a b'))"
    module = "import click\n@click.command()\ndef say():\n    " + program + "\n"
    info = Path("site/acme_say-1.0.dist-info")
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-say\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fundamentallm.commands]\nsay = acme_say:say\n")
    Path("site/acme_say.py").write_text(module)
    where = Path.cwd()
    meant = {"PROGRAM": program, "RELATIVE": os.path.relpath(SCRIPT)}
    done = subprocess.run(
        [*(meant.get(word, word) for word in words), "say"],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(where / "site")},
        capture_output=True,
        text=True,
    )
    expected = meant.get(expected, expected)
    assert done.stdout == f"{expected} resume 'a b'\n", done.stderr


def test_the_help_names_the_command_as_it_was_called() -> None:
    done = spawn("train", "--help")
    out, _ = done.communicate(timeout=60)
    assert out.startswith(f"Usage: {sys.executable} -m fundamentallm train ")


LOADER = """
import os, torch
from fundamentallm import Batch, hookimpl, plugin
from fundamentallm.testing import TinyModel, TinyOptimizer, TinySamples

START = os.environ.get("START", "fork")

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 100_000 if START == "spawn" else 16
    def __getitem__(self, index):
        return TinySamples(1, "cpu").batch(range(index, index + 1)).data

class Source(TinySamples):
    def batches(self, progress):
        while True:
            loader = torch.utils.data.DataLoader(
                Numbers(), num_workers=2, multiprocessing_context=START
            )
            for one, other in loader:
                yield Batch((one[:, 0], other[:, 0]), 1, 1, 1)

@plugin
class Loader:
    "Reads samples in two worker processes."
    @hookimpl
    def build_data(self, run):
        return Source(1, run.device)
    @hookimpl
    def build_model(self):
        return TinyModel().build_model()
    @hookimpl
    def build_optimizer(self, run):
        return TinyOptimizer().build_optimizer(run)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_with_loader_workers_prints_one_line(
    number: signal.Signals,
) -> None:
    Path("loader.py").write_text(LOADER)
    Path("loader.toml").write_text(
        'plugins = ["./loader.py", "./saver.py"]\n[run]\nlength = 1000000\ndevice = "cpu"\n'
    )
    process = spawn("train", "loader.toml", "--run-dir", "mine", start_new_session=True)
    assert process.stdout is not None
    for _ in range(20):
        assert process.stdout.readline().startswith("step ")
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert err.count("stopping at the next safe point") == 1
    assert "Traceback" not in err


def test_ctrl_c_that_also_ends_spawned_loader_workers_saves_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A spawned process has Python's own answer to Ctrl-C, and no batch follows from it."""
    monkeypatch.setenv("START", "spawn")
    Path("loader.py").write_text(LOADER)
    Path("says.py").write_text("""
from fundamentallm import hookimpl, plugin
@plugin
class Says:
    "Says which step is over."
    @hookimpl
    def on_step_end(self, run):
        print("step", run.progress.step, flush=True)
""")
    Path("loader.toml").write_text(
        'plugins = ["./loader.py", "./says.py", "checkpoint"]\n'
        '[run]\nlength = 1000000\ndevice = "cpu"\n[checkpoint]\nevery = 1000000\n'
    )
    process = spawn("train", "loader.toml", "--run-dir", "mine", start_new_session=True)
    assert process.stdout is not None
    for _ in range(20):
        assert process.stdout.readline().startswith("step ")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.count("stopping at the next safe point") == 1
    assert "Traceback" not in err
    steps = int(out.splitlines()[-1].removeprefix("interrupted after ").split()[0])
    assert [path.name for path in Path("mine/checkpoints").iterdir()] == [f"step-{steps:08}"]


def test_a_start_says_what_is_trained_and_that_nothing_will_be_saved() -> None:
    _, err = spawn("train", "tiny.toml").communicate(timeout=120)
    assert err.splitlines() == [
        f"training for 4 steps in {Path.cwd()}/runs/tiny",
        "nothing will be saved: no listed plugin saves checkpoints",
    ]
    process = spawn("train", "tiny.toml", "--plugin", "saver.py")
    out, err = process.communicate(timeout=120)
    assert err.splitlines() == [f"training for 4 steps in {Path.cwd()}/runs/tiny-2"]
    assert out.splitlines()[-1] == f"finished after 4 steps: {Path.cwd()}/runs/tiny-2"


def test_a_start_that_fails_leaves_its_name_to_the_next_start(call: Call) -> None:
    missing = "mps" if sys.platform != "darwin" else "cuda"
    assert call("train", "tiny.toml", "--set", f"run.device={missing}").code == 2
    assert not Path("runs").exists()
    Path("lost.py").write_text("""
from fundamentallm import DataError, hookimpl, plugin
@plugin
class Lost:
    "Does not find its data."
    there: bool = False
    @hookimpl
    def on_run_start(self):
        if not self.there:
            raise DataError("corpus.txt: no such file")
""")
    words = ("train", "tiny.toml", "--plugin", "lost.py")
    assert call(*words).code == 4
    listed = call("runs", "--json").out
    assert [(row["run"], row["state"], row["step"]) for row in json.loads(listed)] == [
        ("tiny", "failed before its first step", 0)
    ]
    ended = call(*words, "--set", "lost.there=true")
    assert ended.out.endswith("runs/tiny\n")
    assert ended.code == 0


def test_an_interrupted_start_can_be_resumed(call: Call) -> None:
    Path("early.py").write_text("""
import os, signal
from fundamentallm import hookimpl, plugin
@plugin
class Early:
    "Is interrupted twice while it starts."
    times: int = 2
    @hookimpl
    def on_run_start(self):
        for _ in range(self.times):
            os.kill(os.getpid(), signal.SIGINT)
""")
    ended = call("train", "tiny.toml", "--plugin", "early.py")
    assert ended.code == 130
    assert ended.err == f"resume with: fundamentallm resume {Path.cwd()}/runs/tiny\n"
    resumed = call("resume", "runs/tiny", "--set", "early.times=0")
    assert resumed.out == "finished after 4 steps: runs/tiny\n"


def test_a_run_that_cannot_be_continued_does_not_say_that_it_is_at_step_0(call: Call) -> None:
    words = ("train", "tiny.toml", "--plugin", "saver.py", "--plugin", "console")
    assert call(*words).code == 0
    words = ("--plugin", "trouble.py", "--set", "trouble.kind=start")
    ended = call("resume", "runs/tiny", *words)
    assert ended.code == 4
    log = Path("runs/tiny/train.log").read_text()
    assert "failed while starting, before any step" in log
    assert "at step 0" not in log


def test_an_unknown_command_is_answered_by_what_to_install_or_to_type(monkeypatch, capsys):
    def said(name):
        monkeypatch.setattr(sys, "argv", ["fundamentallm", name])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    monkeypatch.setattr(metadata, "entry_points", lambda **_: ())
    assert "there is no command 'lr-finder': pip install fundamentallm-tuning" in said("lr-finder")
    assert "there is no command 'trian' (did you mean 'train'?)" in said("trian")
    assert "there is no command 'samples' (did you mean 'sample'?)" in said("samples")
