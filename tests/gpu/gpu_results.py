"""A plugin of pytest for ``run.sh``: the longest tests first, an end in time, and results on disk.

``tests.json`` and ``tests.txt`` are written after every test, so that a call that is cut off has
left what it knows. A test states with ``@pytest.mark.cuda(seconds=60)`` how long it may take where
that is more than a few seconds.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import pytest
import torch

USUAL = 5
"""Seconds that a test takes that states none."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu", "tests on a GPU")
    group.addoption("--results", type=Path, help="folder for tests.json and tests.txt")
    group.addoption("--time-limit", type=float, default=float("inf"), help="seconds for all tests")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.results is not None:
        config.pluginmanager.register(Results(config.option.results, config.option.time_limit))


def stated_seconds(item: pytest.Item) -> float:
    """Return how long a test may take, as it states itself."""
    marker = item.get_closest_marker("cuda")
    return float(marker.kwargs.get("seconds", USUAL)) if marker else USUAL


class Results:
    """Orders the tests, skips those that would not end in time, and records what each came to."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit, self.began = folder, limit, time.monotonic()
        self.tests: dict[str, dict[str, Any]] = {}
        self.left_out = 0
        folder.mkdir(parents=True, exist_ok=True)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=stated_seconds, reverse=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        left = self.limit - (time.monotonic() - self.began)
        if stated_seconds(item) > left:
            self.left_out += 1
            pytest.skip(f"{left:.0f} s are left: start this test alone, with -k {item.name}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"outcome": "unfinished", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        test |= dict(report.user_properties)
        # One that passes has passed only with its call, and one that fails may do so at any time.
        if report.outcome != "passed" or report.when == "call":
            test["outcome"] = report.outcome
        if report.outcome != "passed":
            where = report.longrepr
            test["reason"] = where[2] if isinstance(where, tuple) else str(where)
        self.write()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.left_out and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def write(self) -> None:
        """Write all that is known."""
        known = {"machine": machine(), "tests": self.tests}
        (self.folder / "tests.json").write_text(json.dumps(known, indent=1) + "\n")
        lines = [f"{name}: {value}" for name, value in machine().items()]
        for name, test in self.tests.items():
            facts = {k: v for k, v in test.items() if k not in ("outcome", "seconds", "reason")}
            lines.append(f"{test['outcome']:10} {test['seconds']:7.1f} s  {name}  {facts or ''}")
        (self.folder / "tests.txt").write_text("\n".join(map(str.rstrip, lines)) + "\n")


def machine() -> dict[str, Any]:
    """Describe what the tests ran on."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": 0,
    }
    if torch.cuda.is_available():
        found |= {"gpus": torch.cuda.device_count(), "gpu": torch.cuda.get_device_name(0)}
    return found
