"""A thread that does something every now and then."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Looks:
    """Calls ``look`` every ``seconds`` until it is stopped, or until ``look`` has failed."""

    def __init__(self, look: Callable[[], None], seconds: float) -> None:
        self.error: Exception | None = None
        self._look, self._seconds = look, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what ``look`` has raised, where the run can hear it."""
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join(self._seconds)  # no longer: a terminal may be held up

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - told by ``check``
                self.error = error
                return
