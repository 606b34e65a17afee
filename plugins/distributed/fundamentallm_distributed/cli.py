"""The command ``launch``."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from fundamentallm import SettingsError

ADVICE = "write the folder into the command: ... train SETTINGS --run-dir DIR"


def processes(_: click.Context, __: click.Parameter, value: str) -> int | None:
    """Read a number of processes; None for ``auto``."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither 'auto' nor a number from 1.")
    return int(value)


def nodes(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    """Read a number of nodes, or the least and the largest number."""
    ends = value.split(":")
    numbers = [int(end) for end in ends if end.isdecimal()]
    if len(numbers) != len(ends) or len(ends) > 2 or not 1 <= numbers[0] <= numbers[-1]:
        raise click.BadParameter(f"{value!r} is no number such as 4, or 2:4 for 2 to 4.")
    return numbers[0], numbers[-1]


def address(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Check that a text is a host and a port."""
    host, colon, port = (value or "").rpartition(":")
    if value is not None and not (colon and host and port.isdecimal() and 1 <= int(port) <= 65535):
        raise click.BadParameter(f"{value!r} is no HOST:PORT such as node0:29400.")
    return value


# Without interspersed arguments, all that follows the first word is passed on unchanged.
@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--processes",
    metavar="N|auto",
    callback=processes,
    default="auto",
    show_default=True,
    help="Processes on this machine; auto: one for each CUDA device, or one.",
)
@click.option(
    "--nodes",
    metavar="N|MIN:MAX",
    callback=nodes,
    default="1",
    show_default=True,
    help="Machines that start this command; MIN:MAX begins with MIN, and restarts if one joins.",
)
@click.option(
    "--meet",
    metavar="HOST:PORT",
    callback=address,
    help="One of the machines and a free port of it, where all meet.",
)
@click.option("--address", help="Address of this machine for the others. [default: its host name]")
@click.option(
    "--name", default="fundamentallm", show_default=True, help="What all machines call the job."
)
@click.option(
    "--restarts",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Restarts after a failure that a restart can cure.",
)
@click.option(
    "--grace",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Seconds that the processes have to save and end after a signal, before SIGKILL.",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="train|resume ...")
def launch(words: tuple[str, ...], **chosen: Any) -> None:
    """Run train or resume in several processes.

    All that follows train or resume is passed on. The exit code is that of the first process that
    failed.
    """
    check(words, **chosen)
    if chosen["meet"] is None:
        del chosen["meet"]
    # torch reads it when it is imported. The launcher reports lost connections itself.
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "FATAL"
    from fundamentallm_distributed import launcher

    if level is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the processes print their warnings
    chosen["processes"] = chosen["processes"] or launcher.automatic_processes()
    command = (sys.executable, "-m", "fundamentallm", *words)
    sys.exit(launcher.launch(launcher.Job(command, **chosen)))


def check(words: tuple[str, ...], *, nodes: tuple[int, int], **chosen: Any) -> None:
    """Raise a ``SettingsError`` for what does not fit together."""
    if words[:1] not in (("train",), ("resume",)):
        came = f"got {words[0]!r}" if words else "got nothing"
        raise SettingsError(f"launch: expected 'train' or 'resume' after the options, {came}")
    if nodes[1] > 1 and chosen["meet"] is None:
        raise SettingsError(
            f"launch: --nodes {nodes[1]} needs a place where the machines meet:"
            " add --meet HOST:PORT with the name of one of them and a free port of it"
        )
    if nodes[1] == 1 and chosen["meet"] is not None:
        raise SettingsError("launch: --meet is for several machines: add --nodes, or leave it out")
    if chosen["restarts"] == 0 and nodes[0] == nodes[1]:
        return
    why = f"--restarts {chosen['restarts']}" if chosen["restarts"] else "--nodes MIN:MAX"
    if words[0] == "train" and not has_option(words, "--run-dir"):
        raise SettingsError(
            f"launch: with {why}, each start of 'train' would begin a run in a new folder: {ADVICE}"
        )
    if words[0] == "resume" and has_option(words, "--from"):
        raise SettingsError(
            f"launch: with {why}, each start would go back to the checkpoint of --from:"
            " leave out --from, or resume once without restarts"
        )


def has_option(words: tuple[str, ...], name: str) -> bool:
    """Return whether an option is among the words, in either of its forms."""
    return any(word == name or word.startswith(f"{name}=") for word in words)
