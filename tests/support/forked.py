"""Start commands of Python in processes that are forked from one that has imported torch.

A new interpreter needs five seconds of a processor until torch, with its compiler, is imported. A
forked process has it at once; in every other respect it is a process of its own: it has its own
arguments, environment, folder and output, can be killed, and dies of its own. ``run`` and ``Popen``
take the place of those of ``subprocess``, with the options that tests use.

What cannot be seen this way needs a real interpreter: what a start imports, what is chosen before
torch is imported, and whether two interpreters, which hash strings differently, agree.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "fundamentallm.cli",
        "fundamentallm.launch",
        "fundamentallm.host.environment",
        # The optimizers of torch import its compiler when they are made, which takes seconds.
        "torch._dynamo",
        "fundamentallm_accumulate",
        "fundamentallm_checkpoint.resume",
        "fundamentallm_checkpoint.save",
        "fundamentallm_checkpoint.storage.publish",
        "fundamentallm_early_stopping",
        "fundamentallm_ema",
        "fundamentallm_gpt.model",
        "fundamentallm_jsonl",
        "fundamentallm_lr_schedule",
        "fundamentallm_optimizers",
        "fundamentallm_text",
    ]
)


@attrs.frozen
class Start:
    """What a process needs to know about the command it runs."""

    words: tuple[str, ...]
    folder: str | None
    environment: dict[str, str] | None
    outputs: dict[int, Connection | str]
    """Where what is written to file descriptor 1 or 2 goes: a pipe, or the path of a file."""
    new_session: bool


class Popen:
    """A command in a forked process; ``words`` begin with ``python -m module`` or ``python -c``."""

    def __init__(
        self,
        words: Sequence[str | Path],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
        text: bool = False,
        **outputs: Any,
    ) -> None:
        self.args = [str(word) for word in words]
        ends: dict[int, Connection | str] = {}
        self.stdout = _output(1, outputs.pop("stdout", None), ends, text=text)
        self.stderr = _output(2, outputs.pop("stderr", None), ends, text=text)
        if outputs:
            raise TypeError(f"not offered here: {', '.join(outputs)}")
        start = Start(
            tuple(self.args),
            str(cwd or Path.cwd()),
            dict(os.environ if env is None else env),
            ends,
            start_new_session,
        )
        self._process: ForkServerProcess = context.Process(target=_main, args=(start,))
        self._process.start()
        for end in ends.values():
            if not isinstance(end, str):
                end.close()  # or reading would never come to an end

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Read both outputs to their ends, and wait for the process."""
        with ThreadPoolExecutor(2) as readers:
            read = [readers.submit(file.read) if file else None for file in self._files]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()  # which ends what is read
                raise
            out, err = (None if one is None else one.result() for one in read)
        return out, err

    @property
    def _files(self) -> tuple[Any, Any]:
        return self.stdout, self.stderr

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for file in filter(None, self._files):
            file.close()
        self._process.join()


def run(
    words: Sequence[str | Path],
    *,
    capture_output: bool = True,
    check: bool = False,
    timeout: float = 240,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a command to its end; ``subprocess.run`` describes the options."""
    ends = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if capture_output else {}
    with Popen(words, **{**ends, **options}) as process:
        out, err = process.communicate(timeout)
        done = subprocess.CompletedProcess(process.args, process.wait(), out, err)
    if check:
        done.check_returncode()
    return done


def _output(number: int, target: Any, ends: dict[int, Any], *, text: bool) -> Any:
    """Put the end that the process writes to into ``ends``; return the one to read, if any."""
    if target is None:
        return None
    if target == subprocess.DEVNULL:
        ends[number] = os.devnull
        return None
    if target != subprocess.PIPE:
        ends[number] = target.name
        return None
    reader, ends[number] = context.Pipe(duplex=False)
    file = os.fdopen(os.dup(reader.fileno()), "rb")
    reader.close()
    return io.TextIOWrapper(file, "utf-8") if text else file


def _main(start: Start) -> None:
    """Run the command in the new process, as a new interpreter would."""
    multiprocessing.set_start_method(None, force=True)  # it inherited that of this process
    if start.new_session:
        os.setsid()
    for number, end in start.outputs.items():
        file = os.open(end, os.O_WRONLY | os.O_APPEND) if isinstance(end, str) else end.fileno()
        os.dup2(file, number)
        os.close(file) if isinstance(end, str) else end.close()
    os.chdir(start.folder)
    os.environ.clear()
    os.environ.update(start.environment)
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [start.folder, *filter(None, added)]
    # torch has read this variable when it was imported.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.orig_argv = list(start.words)
    _, kind, code, *words = start.words
    try:
        if kind == "-m":
            sys.argv = [code, *words]
            runpy.run_module(code, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *words]
            module = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), vars(module))
    finally:
        # A process of multiprocessing leaves without calling these.
        atexit._run_exitfuncs()
