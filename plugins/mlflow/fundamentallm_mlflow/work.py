"""What the shipping process does for its request, one part after the other."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm_mlflow.system import SystemMetrics

if TYPE_CHECKING:
    from fundamentallm_mlflow.shipment import Shipping
    from fundamentallm_mlflow.store import Store
    from fundamentallm_mlflow.turn import Turn

log = logging.getLogger("ship")


class Work:
    """A request, and how far it has come: each method does what is left of its part, or raises
    what the store raises. Importing mlflow, too, is a part that may fail."""

    def __init__(self, request: dict[str, Any], folder: Path, turn: Turn | None = None) -> None:
        self._request = request
        self._folder = folder
        self._turn = turn
        self._store: Store | None = None
        self.shipping: Shipping | None = None
        self._system: SystemMetrics | None = None

    def enter(self) -> None:
        """Wait until nobody else ships this folder."""
        if self._turn is not None:
            # The other half is for the store.
            self._turn.take(self._request["start_seconds"] / 2)
            self._turn = None

    def open(self) -> None:
        """Open the store."""
        self.enter()
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
        """Look at the machine, if it is time for that; the journal has its start by now."""
        seconds = self._request["system_seconds"]
        if not seconds:
            return
        self.enter()
        try:
            if self._system is None:
                self._system = SystemMetrics(self._folder, self._request["parent"], seconds)
            self._system.look()
        except Exception:
            # Nothing that is shipped is to depend on it.
            log.exception("the machine is not looked at from here on")
            self._request["system_seconds"] = 0

    def ship(self) -> None:
        """Send all that there is by now."""
        self.attach()
        assert self.shipping is not None
        self.shipping.ship()
        self.shipping.add_samples(Path(self._request["run_folder"]))

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
