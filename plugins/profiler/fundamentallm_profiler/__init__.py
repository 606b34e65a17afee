"""PyTorch's profiler over chosen steps, and control of Python's garbage collection."""

from fundamentallm_profiler.garbage import Gc
from fundamentallm_profiler.profiler import Profiler

__all__ = ["Gc", "Profiler"]
