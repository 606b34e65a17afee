"""What holds for all tests, those of the core and those of the plugins."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

sys.path.insert(0, str(Path(__file__).parent / "tests" / "support"))  # modules for all tests


def pytest_configure() -> None:
    """Let each signal have Python's own handler, whatever the caller of pytest has set.

    A shell starts a background job with SIGINT ignored, and a child process inherits that. Tests
    send signals to runs, and compare handlers before and after.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)


NO_GPU = "needs an NVIDIA GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``cuda`` where there is no NVIDIA GPU."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were skipped for want of a GPU."""
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and report.longrepr[2].endswith(NO_GPU)
    ]
    if skipped:
        terminalreporter.write_line(f"no NVIDIA GPU here: {len(skipped)} tests skipped")
