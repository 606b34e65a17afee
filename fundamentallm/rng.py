"""The random number generators of a run: seeded at its start, kept in every checkpoint."""

from __future__ import annotations

import random
import sys
from typing import Any


def seed_random(seed: int) -> None:
    """Seed every global random number generator that is in use."""
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """Return the state of every global random number generator that is in use."""
    import torch

    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": list(random.getstate())}
    found["python"][1] = list(found["python"][1])
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = [name, keys.tolist(), *rest]
    return found


def set_random_state(kept: dict[str, Any]) -> None:
    """Put every global random number generator back to where ``random_state`` found it."""
    import torch

    torch.set_rng_state(kept["torch"])
    random.setstate(tuple(tuple(k) if isinstance(k, list) else k for k in kept["python"]))
    if "cuda" in kept:
        torch.cuda.set_rng_state_all(kept["cuda"][: torch.cuda.device_count()])
    if "numpy" in kept and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(tuple(kept["numpy"]))
