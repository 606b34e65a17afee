"""What can go wrong, sorted by what the user can do about it. Each kind has an exit code."""

from collections.abc import Sequence

_ALLOCATORS = ("can't allocate memory", "not enough memory", "out of memory")


class FundamentalError(Exception):
    """An end of the run that its user can act on; ``str()`` of it is the whole message."""

    # As that of Python for an error that nothing handles.
    exit_code = 1
    printed_elsewhere = False
    """Whether the first process of the run raises the same error, and prints it."""


class SettingsError(FundamentalError):
    """The settings, or the way the command was called, are wrong; it has every mistake found.

    ``mistakes`` are what it was made with: texts, or a ``Mistake`` each where ``compose`` found
    them. ``problems`` are their texts.
    """

    # As the exit code of a wrong command line.
    exit_code = 2

    def __init__(self, mistakes: str | Sequence[object]) -> None:
        self.mistakes = [mistakes] if isinstance(mistakes, str) else list(mistakes)
        self.problems = [str(mistake) for mistake in self.mistakes]
        super().__init__("\n".join(self.problems))


class NotFiniteError(FundamentalError):
    """A loss or a gradient is NaN or infinite, and nothing was there to handle it."""

    exit_code = 3


class DataError(FundamentalError):
    """The data is missing, empty, damaged or not what the settings say."""

    exit_code = 4


class StorageError(FundamentalError):
    """The run folder, a checkpoint or another file cannot be written or trusted."""

    exit_code = 5


class OutOfMemoryError(FundamentalError):
    """The host's or the device's memory does not hold the run."""

    exit_code = 6


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether Python or one of torch's allocators raised this because memory ran out."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The allocators of CPUs and of Apple's GPUs raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATORS)


def lost_a_process(error: BaseException) -> bool:
    """Return whether torch raised this because another process of the run has ended or hangs."""
    # gloo raises a plain RuntimeError, torch.distributed one with a name such as DistStoreError.
    kind = type(error).__name__
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or kind.startswith("Dist"))


def why_lost(error: BaseException) -> str:
    """Return what torch's long message says of a lost connection."""
    # Before it is a place in torch's code, after it a sentence of advice.
    return str(error).partition("\n")[0].partition(". ")[0].rpartition("] ")[2]


class ReservedNameError(ValueError):
    """A plugin logged under a name of the core's own; from an observer, too, it ends the run."""


class PluginError(FundamentalError):
    """A plugin that the run needs failed; the message names plugin, hook and distribution."""

    exit_code = 7


class PeerError(FundamentalError):
    """Another process of the run has ended, no longer answers, or does something else."""

    exit_code = 8
