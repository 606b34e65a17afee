# mypy: disable-error-code="import-untyped"
"""Write a TensorBoard event file: scalars, histograms, the settings, and the marks of rewinds.

The ``tensorboard`` package defines the format of the records and the messages in them.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram.metadata import create_summary_metadata
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from fundamentallm import flatten, set_aside

log = logging.getLogger("fundamentallm")


class EventFile:
    """A new event file in ``folder``, which readers sort after all others there."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files of a folder in the order of their names.
        stamps = [stamp(path) for path in folder.iterdir() if "tfevents" in path.name]
        second = max([int(time.time()), *(one + 1 for one in stamps)])
        path = folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}"
        # Unbuffered: one write for each record, and nothing is lost with the process.
        self._records = RecordWriter(path.open("xb", buffering=0))
        self._write(Event(file_version="brain.Event:2"))

    def purge(self, step: int) -> None:
        """Invalidate all points of this step and later ones; TensorBoard does not show them."""
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=step, session_log=start))

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step in one record, each value as float32."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def histogram(
        self, name: str, step: int, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Write a histogram: ``counts[i]`` values lie between ``edges[i]`` and ``edges[i + 1]``."""
        bins = list(zip(edges[:-1], edges[1:], counts, strict=True))
        tensor = make_tensor_proto(bins, dtype=np.float64)  # (bins, 3): left, right, count
        metadata = create_summary_metadata(display_name=None, description=None)
        value = Summary.Value(tag=name, metadata=metadata, tensor=tensor)
        self._write(Event(step=step, summary=Summary(value=[value])))

    def settings(self, step: int, tables: dict[str, Any], hparams: bool) -> None:
        """Write the settings that are valid from a step on, as text and for the HParams tab."""
        text = "\n".join("    " + line for line in tomli_w.dumps(tables).splitlines())
        self._write(Event(step=step, summary=text_pb("settings", text)))
        if hparams:
            # The tab knows no lists.
            values = {
                name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in flatten(tables).items()
            }
            summary = Summary.FromString(hparams_pb(values).SerializeToString())
            self._write(Event(step=step, summary=summary))

    def close(self) -> None:
        """Close the file. Every record has been written already."""
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def stamp(path: Path) -> int:
    """Return the Unix time in an event file's name; 0 if there is none."""
    digits = path.name.partition("tfevents.")[2].partition(".")[0]
    return int(digits) if digits.isdecimal() else 0


def move_old(folder: Path) -> None:
    """Rename a folder that has events: they cannot be repeated without their checkpoints."""
    if not folder.is_dir() or not any("tfevents" in path.name for path in folder.iterdir()):
        return
    renamed = set_aside(folder)
    log.warning(
        "the run starts at step 0: the points that %s held are now in %s", folder, renamed.name
    )
