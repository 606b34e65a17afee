"""What the shipping process does for its request, one part after the other."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm_mlflow.system import SystemMetrics

if TYPE_CHECKING:
    from fundamentallm_mlflow.shipment import Shipping
    from fundamentallm_mlflow.store import Point, Store

SYSTEM_POINTS = 10_000  # what is kept of them while the store is away


class Work:
    """A request, and how far it has come: each method does what is left of its part, or raises
    what the store raises. Importing mlflow, too, is a part that may fail."""

    def __init__(self, request: dict[str, Any], folder: Path) -> None:
        self._request = request
        self._folder = folder
        self._store: Store | None = None
        self.shipping: Shipping | None = None
        self._system = SystemMetrics(request["parent"], request["system_seconds"])
        self._waiting: deque[Point] = deque(maxlen=SYSTEM_POINTS)

    def open(self) -> None:
        """Open the store."""
        from fundamentallm_mlflow.store import Store

        if self._store is None:
            self._store = Store(self._request["uri"], self._request["experiment"])

    def attach(self) -> dict[str, str]:
        """Make or find the MLflow run; return what it is called there."""
        from fundamentallm_mlflow.shipment import Shipping

        self.open()
        if self.shipping is None:
            place, experiment = self._request["place"], self._request["experiment"]
            assert self._store is not None
            self.shipping = Shipping(self._folder, place, experiment, self._store)
        entry = self.shipping.entry
        return {"run_id": entry.run_id, "experiment_id": entry.experiment_id}

    def measure(self) -> None:
        """Look at the machine, if it is time for that."""
        if self.shipping is not None:
            self._waiting.extend(self._system.points(self.shipping.since))

    def ship(self) -> None:
        """Send all that there is by now."""
        self.attach()
        assert self.shipping is not None
        assert self._store is not None
        self.shipping.ship()
        self.shipping.add_samples(Path(self._request["run_folder"]))
        self._store.take(self.shipping.entry.run_id, list(self._waiting))
        self._waiting.clear()

    def end(self) -> None:
        """Set the end state, and add the picture of the whole run."""
        assert self.shipping is not None
        assert self._store is not None
        if self.shipping.is_complete:
            return
        self.shipping.close()
        if self._request["plot"]:
            from fundamentallm_mlflow.plot import draw

            picture = draw(self._folder)
            if picture is not None:
                self._store.add_file(self.shipping.entry.run_id, picture)
