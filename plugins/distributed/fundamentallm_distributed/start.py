"""How this process was started as one of several: by torchrun, by srun, or within a program."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import attrs

from fundamentallm import SettingsError

# Ports below 20,000 are often those of services; from 32,768 on, systems choose ports themselves.
_FIRST_PORT, _PORTS = 20_000, 12_000


@attrs.frozen
class Start:
    """What a launcher says about this process. ``variables`` are those that torch reads."""

    variables: Mapping[str, str]
    is_joined: bool = False
    """Whether the program that calls the run has made the default process group already."""

    @classmethod
    def find(cls) -> Start | None:
        """Return how this process was started; None if it is alone."""
        from torch import distributed as dist

        if dist.is_available() and dist.is_initialized():
            return cls({}, is_joined=True)
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return cls({})
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            return cls(slurm_variables(os.environ))
        return None

    @contextlib.contextmanager
    def joined(self, device: str, timeout: float) -> Iterator[None]:
        """Make the default process group, and leave it at the end."""
        import torch
        from torch import distributed as dist

        if device == "cuda":
            torch.cuda.set_device(int({**os.environ, **self.variables}.get("LOCAL_RANK", 0)))
        if self.is_joined:
            yield
            return
        os.environ.update(self.variables)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        wait = timedelta(seconds=timeout)
        try:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            store = _fresh_store(rank, size, wait)
        except (KeyError, ValueError) as error:
            text = f"a variable of the launcher is missing or is no number: {error}"
            raise SettingsError(text) from error
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
        ended = False
        try:
            yield
            ended = True
        finally:
            # NCCL would wait for collectives that a lost process can no longer take part in.
            if ended or device != "cuda":
                dist.destroy_process_group()


def _fresh_store(rank: int, size: int, timeout: timedelta) -> Any:
    """Return the store in which the processes find each other's addresses."""
    from torch import distributed as dist

    # The agent of torchrun may serve the store; else the first process does.
    has_server = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=not rank and not has_server,
        timeout=timeout,
    )
    # An agent keeps its store when it restarts the processes, and they would read the addresses of
    # dead ones. Agents of several nodes may differ in their counts of restarts; ``launch`` turns
    # the agent's store off for them.
    is_one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    if has_server and is_one_node:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
    return store


def slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torch reads, made from those that srun sets for a task."""
    job = int(environ.get("SLURM_JOB_ID", "0"))
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environ.get("MASTER_ADDR", first_host(nodes)),
        # Jobs that share a node need different ports.
        "MASTER_PORT": environ.get("MASTER_PORT", str(_FIRST_PORT + job % _PORTS)),
    }


def first_host(nodes: str) -> str:
    """Return the first host of a node list of SLURM, such as ``gpu[07-09,12],login1``."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^\[,]*)", nodes)
    if found is None:
        return nodes
    name, number, rest = found.groups(default="")
    return name + number + rest
