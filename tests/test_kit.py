"""The kit for authors of plugins finds what it promises to find."""

from __future__ import annotations

import pytest

from fundamentallm import field, hookimpl, plugin, state
from fundamentallm.testing import Memory, PluginContract, assert_same_weights


@plugin
class Forgetful:
    """Lowers the learning rate with every step, and forgets how far it was."""

    seen: int = field(init=False, default=0)

    @hookimpl
    def on_step_end(self) -> None:
        self.seen += 1

    @hookimpl
    def lr_factor(self) -> float:
        return 1 / (1 + self.seen)


@plugin
class Mindful(Forgetful):
    """Does the same, and says what its state is."""

    seen: int = state(0)


def contract(of: type) -> PluginContract:
    return type("Contract", (PluginContract,), {"plugin": of})()


def test_state_that_no_checkpoint_holds_breaks_the_contract(tiny_run):
    contract(Mindful).test_a_resumed_run_ends_with_the_same_bits(tiny_run)
    with pytest.raises(AssertionError, match="these weights differ"):
        contract(Forgetful).test_a_resumed_run_ends_with_the_same_bits(tiny_run)


def test_memory_goes_back_once(tiny_run, tmp_path):
    run = tiny_run(Memory(step=2, later=4), length=6)
    assert (run.progress.step, run.progress.samples) == (6, 32)
    assert_same_weights(run, tiny_run(Memory(step=2, later=4), length=6, run_dir=tmp_path / "two"))
