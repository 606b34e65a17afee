"""A save from a device that works through its queue later holds one step, whole."""

from __future__ import annotations

from pathlib import Path

import gpu
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fundamentallm import Run, field, hookimpl, plugin
from fundamentallm.testing import TinyRun

STEPS = 6
WIDTH = 1024
"""Of so many parameters that memory for the copy is prepared in a thread."""


@plugin
class Late:
    """A model whose device has the work of one step to do when the next one begins."""

    device: str
    states: dict[int, dict[str, Tensor]] = field(init=False, factory=dict)
    """Copies of weights and moments by step, which the device makes in its own order."""

    @hookimpl
    def build_model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
                self.out = nn.Linear(WIDTH, 1)

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                return nn.functional.mse_loss(self.out(self.layers(inputs)), targets)

        return Net()

    @hookimpl
    def build_optimizer(self, run: Run) -> torch.optim.Optimizer:
        return torch.optim.AdamW(run.parameters, lr=0.01, fused=True)

    @hookimpl
    def finish_gradients(self) -> None:
        """Delay the update of this step until long after the host has queued all of it."""
        # Not earlier: the copy of the batch would wait for it.
        gpu.occupy(self.device, 0.1)

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        names = {id(value): name for name, value in run.model.named_parameters()}
        kept = {name: value.detach().clone() for name, value in run.model.named_parameters()}
        for parameter, state in run.optimizer.state.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                kept[f"{kind}/{names[id(parameter)]}"] = state[kind].clone()
        self.states[run.progress.step] = kept


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda(seconds=15))]
)
@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_a_save_never_mixes_two_steps(
    tiny_run: TinyRun, tmp_path: Path, device: str, asynchronous: bool
) -> None:
    gpu.prepare_to_occupy(device)
    late = Late(device=device)
    tables = {"checkpoint": {"every": 1, "keep_last": 99, "asynchronous": asynchronous}}
    # No row is due, which would wait for the device before the save.
    words = {"device": device, "length": STEPS, "log_every": 1000}
    tiny_run("checkpoint", late, settings=tables, **words)
    assert list(late.states) == list(range(1, STEPS + 1))
    for step, kept in late.states.items():
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        saved = load_file(folder / "model.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        for name, expected in kept.items():
            found = (moments if "/" in name else saved)[name]
            assert found.equal(expected.cpu()), f"{name} in the save of step {step}"
