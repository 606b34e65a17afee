"""A thread that refreshes a display periodically."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class RefreshThread:
    """Calls ``refresh`` every ``seconds`` until it is stopped or ``refresh`` has failed."""

    def __init__(self, refresh: Callable[[], None], seconds: float) -> None:
        self.error: Exception | None = None
        self._refresh, self._seconds = refresh, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of ``refresh`` in the calling thread."""
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join(self._seconds)  # not longer: a terminal may block

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            try:
                self._refresh()
            except Exception as error:  # noqa: BLE001 - raised by ``check``
                self.error = error
                return
