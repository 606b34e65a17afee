"""What holds for all tests, those of the core and those of the plugins."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tests" / "support"))  # modules for all tests


def pytest_configure() -> None:
    """Let each signal have Python's own handler, whatever the caller of pytest has set.

    A shell starts a background job with SIGINT ignored, and a child process inherits that. Tests
    send signals to runs, and compare handlers before and after.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
