"""Build, check and try all distributions: ``python tests/dist/check.py FOLDER``.

An sdist of each is built from the repository, and its wheel from the sdist, as a package registry
would get them. ``twine check`` reads their metadata; each wheel must hold exactly the tracked files
of its package, and the license. Then the wheels that ``fundamentallm[starter]`` needs are installed
into an empty environment, without the repository, and a model is trained and sampled there. The
packages of others come from the registry.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = """\
plugins = ["text", "gpt", "adamw", "accumulate", "grad_clip", "lr_schedule", "checkpoint", "sample",
           "jsonl", "console"]

[run]
length = "20 steps"
validate_every = "10 steps"
log_every = "10 steps"
device = "cpu"

[text]
path = "corpus.txt"
tokenizer = "byte"
context_length = 16
batch_size = 4
validation_batches = 2
cache_dir = "cache"

[accumulate]
microbatches = 2

[gpt]
num_layers = 1
num_heads = 2
d_model = 16

[sample]
every = "20 steps"
max_tokens = 20
"""


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    """Run a command; return its output, or end with it if the command fails."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def build(folder: Path, target: Path) -> tuple[Path, Path]:
    """Build the sdist of the distribution in ``folder``, and its wheel from that; return both."""
    hatchling = (sys.executable, "-m", "hatchling", "build", "-d", target)
    with tempfile.TemporaryDirectory() as place:
        before = set(target.iterdir())
        run(*hatchling, "-t", "sdist", cwd=folder)
        (sdist,) = set(target.iterdir()) - before
        with tarfile.open(sdist) as archive:
            archive.extractall(place, filter="data")
        (source,) = Path(place).iterdir()
        run(*hatchling, "-t", "wheel", cwd=source)
        (wheel,) = set(target.iterdir()) - before - {sdist}
    return sdist, wheel


def mistakes(folder: Path, sdist: Path, wheel: Path) -> list[str]:
    """Return what is wrong with the files in an sdist and a wheel."""
    name = wheel.name.partition("-")[0]
    tracked = run("git", "ls-files", name, cwd=folder).split()
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/"
        licenses = [one for one in files if one.startswith(f"{info}licenses/")]
        found = [one for one in files if not one.startswith(info)]
        same = licenses and archive.read(licenses[0]) == (ROOT / "LICENSE").read_bytes()
    with tarfile.open(sdist) as archive:
        sources = {one.partition("/")[2] for one in archive.getnames()}
    wrong = [f"{wheel.name}: lacks {one}" for one in sorted({*tracked} - {*found})]
    wrong += [f"{wheel.name}: has {one}, which git does not track" for one in {*found} - {*tracked}]
    wrong += [] if f"{name}/py.typed" in found else [f"{wheel.name}: lacks py.typed"]
    wrong += [] if same else [f"{wheel.name}: lacks the LICENSE of the repository"]
    needed = {"pyproject.toml", "README.md", "LICENSE", *tracked}
    return wrong + [f"{sdist.name}: lacks {one}" for one in sorted(needed - sources)]


def starter(wheels: list[Path]) -> list[Path]:
    """Return the wheels of ``fundamentallm[starter]``: the core and what that extra names."""
    core = next(one for one in wheels if one.name.startswith("fundamentallm-"))
    with zipfile.ZipFile(core) as archive:
        (path,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        text = archive.read(path).decode()
    names = re.findall(r"^Requires-Dist: ([\w-]+)\S*; extra == 'starter'", text, re.MULTILINE)
    assert names, "the core has no extra 'starter'"
    wanted = {name.replace("-", "_") for name in names}
    return [core, *(one for one in wheels if one.name.partition("-")[0] in wanted)]


def try_alone(wheels: list[Path]) -> None:
    """Install wheels into an empty environment; train, resume and sample there, and make a plugin."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        run(sys.executable, "-m", "venv", place / "env")
        python = place / "env" / "bin" / "python"
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, "-c", ROOT / "constraints.txt", *wheels)
        (place / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
        (place / "mine.toml").write_text(SETTINGS)
        command = place / "env" / "bin" / "fundamentallm"
        listed = run(command, "plugins", cwd=place)
        assert "editable" not in listed and str(ROOT) not in listed, listed
        trained = run(command, "train", "mine.toml", "--run-dir", "run", cwd=place)
        assert "finished after 20 steps" in trained, trained
        longer = run(command, "resume", "run", "--set", "run.length=30", cwd=place)
        assert "finished after 30 steps" in longer, longer
        assert run(command, "sample", "run", "--set", "sample.max_tokens=5", cwd=place).strip()
        run(command, "new", "acme-noise", cwd=place)
        assert (place / "acme-noise" / "pyproject.toml").is_file()


def main() -> None:
    """Build into the folder that the command line names; end with 1 and all mistakes, if any."""
    started, target = time.monotonic(), Path(sys.argv[1]).resolve()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    folders = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
    built = [build(folder, target) for folder in folders]
    wrong = [
        text
        for folder, pair in zip(folders, built, strict=True)
        for text in mistakes(folder, *pair)
    ]
    if wrong:
        sys.exit("\n".join(wrong))
    files = [file for pair in built for file in pair]
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    print(f"{len(files)} files of {len(built)} distributions are sound: {target}")
    chosen = starter([wheel for _, wheel in built])
    try_alone(chosen)
    print(f"{len(chosen)} wheels train alone; all of it took {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
