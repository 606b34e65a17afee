"""A plugin that looks at a run while it makes its first steps."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fundamentallm import Period, Rejection, field, hookimpl, plugin
from fundamentallm_tuning.digests import differences, digests
from fundamentallm_tuning.trial import OWN, catch_up, peak_memory, window_loss

if TYPE_CHECKING:
    from fundamentallm import Run

TIMED = ("build_data", "build_model", "validate", "on_safe_point")


@plugin
class Probe:
    """Measure some steps and what is around them, and note the state they leave."""

    steps: int
    passed: dict[str, Any] = field(factory=dict)
    """Counts of the progress that the run is to begin with, as if so much had been trained."""

    seconds: dict[str, list[float]] = field(init=False, factory=lambda: defaultdict(list))
    """What calls of ``TIMED`` hooks and steps (as ``"step"``) took."""
    validations: list[float] = field(init=False, factory=list)
    """What validations took, in seconds."""
    losses: list[float] = field(init=False, factory=list)
    rates: list[float] = field(init=False, factory=list)
    rejections: list[Rejection] = field(init=False, factory=list)
    sizes: dict[str, int] = field(init=False, factory=dict)
    """Bytes: of parameters, gradients and so on."""
    counts: dict[str, int] = field(init=False, factory=dict)
    """Parameters, and what is in one step."""
    metrics: dict[str, float] = field(init=False, factory=dict)
    """What the last validation found."""
    dtypes: list[str] = field(init=False, factory=list)
    without_gradient: list[str] = field(init=False, factory=list)
    without_optimizer: list[str] = field(init=False, factory=list)
    gradient_norm: float = field(init=False, default=0.0)
    vocab_size: int | None = field(init=False, default=None)
    epoch_samples: int | None = field(init=False, default=None)
    device: str = field(init=False, default="")
    saved: bool = field(init=False, default=False)
    state: dict[str, str] = field(init=False, factory=dict)
    """Digests of the snapshot at the end."""
    _started: float = field(init=False, default=0.0)
    _looked: float = field(init=False, default=0.0)  # seconds that are no part of the step

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Put a clock around what is heard from now on."""
        self.device = run.device
        for name, value in self.passed.items():
            setattr(run.progress, name, value)
        run.hook = run.bind(self._clock)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Count and weigh what has been built."""
        if self.passed:
            self._make_room(run)
        named = dict(run.model.named_parameters())
        held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        self.without_optimizer = [
            name for name, p in named.items() if p.requires_grad and id(p) not in held
        ]
        self.counts["parameters"] = sum(p.numel() for p in named.values())
        self.counts["tensors"] = len(named)
        self.counts["trained"] = sum(p.numel() for p in named.values() if p.requires_grad)
        self.sizes["parameters"] = _bytes(named.values())
        self.sizes["buffers"] = _bytes(run.model.buffers())
        self.dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in named.values()})
        vocab_size = getattr(run.data, "vocab_size", None)
        self.vocab_size = vocab_size if isinstance(vocab_size, int) else None
        self.epoch_samples = run.progress.epoch_samples

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        """Start the clock of a step."""
        catch_up(run.device)
        self._started = time.perf_counter()

    @hookimpl
    def judge_step(self, run: Run) -> None:
        """Look at the loss and the gradients, which nobody has clipped yet; judge nothing."""
        catch_up(run.device)
        began = time.perf_counter()
        self.losses.append(window_loss(run))
        self._look_at_gradients(run)
        self._looked = time.perf_counter() - began

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        """Note what the step took and what came of it; end the run after the last of them."""
        catch_up(run.device)
        self.seconds["step"].append(time.perf_counter() - self._started - self._looked)
        progress = run.progress
        self.rates.append(progress.lr)
        self.rejections += run.rejected
        self.counts["samples"] = progress.samples - progress.before[0]
        self.counts["tokens"] = progress.tokens - progress.before[1]
        self.counts["microbatches"] = len(run.window)
        if len(self.seconds["step"]) >= self.steps:
            run.stop("checked")

    @hookimpl
    def on_validation_end(self, metrics: dict[str, float]) -> None:
        """Keep what was found, and what it took: whoever surrounds others took the longest."""
        self.metrics = metrics
        self.validations.append(max(self.seconds.pop("validate", [0.0])))

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        """Note the state at the end, as whoever saves it here finds it."""
        if run.ending and run.signal is None:
            self.sizes["peak"] = peak_memory(run.device)
            states = [s for kept in run.optimizer.state.values() for s in kept.values()]
            self.sizes["optimizer"] = _bytes(s for s in states if hasattr(s, "element_size"))
            self.state = digests(run.snapshot())

    @hookimpl
    def on_checkpoint_saved(self) -> None:
        """Note that there is one."""
        self.saved = True

    def _make_room(self, run: Run) -> None:
        """Let the run be longer than it is, so that its end can be left after some steps."""
        length = run.settings.length
        longer = math.ceil(1.1 * length.amount) + self.steps
        run.settings.length, run.ending = Period(longer, length.unit), False

    def _look_at_gradients(self, run: Run) -> None:
        import torch

        named = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
        norms = {
            name: float(torch.linalg.vector_norm(p.grad.detach().float()))
            for name, p in named
            if p.grad is not None
        }
        # At the last step: what begins at zero may have none in the first (a LoRA's, say).
        self.without_gradient = [name for name, _ in named if not norms.get(name)]
        self.gradient_norm = sum(norm**2 for norm in norms.values()) ** 0.5
        self.sizes["gradients"] = _bytes(p.grad for _, p in named if p.grad is not None)

    def _clock(self, plugin: str, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        if hook not in TIMED or plugin == OWN:
            return call

        def timed(**given: Any) -> Any:
            catch_up(self.device)
            started = time.perf_counter()
            try:
                return call(**given)
            finally:
                catch_up(self.device)
                self.seconds[hook].append(time.perf_counter() - started)

        return timed


@plugin
class Comparison:
    """Compare what a run has been restored to with what it was; end it before a step."""

    expected: dict[str, str] = field(init=False, factory=dict)
    different: list[str] = field(init=False, factory=list)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """All that a resumed run begins with is there."""
        self.different = differences(self.expected, digests(run.snapshot()))
        run.ending = True


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
