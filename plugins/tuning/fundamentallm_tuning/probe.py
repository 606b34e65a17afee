"""A plugin that measures the first steps of a run."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fundamentallm import Period, Rejection, field, hookimpl, plugin
from fundamentallm_tuning.digests import batch_digests, differences, digests
from fundamentallm_tuning.trial import OWN, catch_up, peak_memory, window_loss

if TYPE_CHECKING:
    from fundamentallm import Run

TIMED = ("build_data", "build_model", "validate", "on_safe_point")


@plugin
class Probe:
    """Measure some steps, validations and saves, and record the state at the end."""

    free = ("*",)  # it measures steps and changes none, so a resumed trial needs no permission

    steps: int
    passed: dict[str, Any] = field(factory=dict)
    """Counts of the progress to begin with, as if these steps had been trained."""

    seconds: dict[str, list[float]] = field(init=False, factory=lambda: defaultdict(list))
    """Times of the ``TIMED`` hooks and of the steps (as ``"step"``)."""
    validations: list[float] = field(init=False, factory=list)
    """Times of the validations, in seconds."""
    losses: list[float] = field(init=False, factory=list)
    rates: list[float] = field(init=False, factory=list)
    rejections: list[Rejection] = field(init=False, factory=list)
    sizes: dict[str, int] = field(init=False, factory=dict)
    """Bytes: of parameters, gradients and so on."""
    counts: dict[str, int] = field(init=False, factory=dict)
    """Counts of parameters, and of the samples, tokens and micro-batches of one step."""
    metrics: dict[str, float] = field(init=False, factory=dict)
    """Metrics of the last validation."""
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
    next_batch: dict[str, str] | None = field(init=False, default=None)
    """Digests of the micro-batch that would have been trained next."""
    _started: float = field(init=False, default=0.0)
    _looked: float = field(init=False, default=0.0)  # seconds of the measurements in a step

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Time all later calls of the ``TIMED`` hooks."""
        self.device = run.device
        for name, value in self.passed.items():
            setattr(run.progress, name, value)
        run.hook = run.bind(self._clock)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Count parameters and their bytes."""
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
        """Start the clock of the step."""
        catch_up(run.device)
        self._started = time.perf_counter()

    @hookimpl
    def judge_step(self, run: Run) -> None:
        """Measure the loss and the gradients before clipping; reject nothing."""
        catch_up(run.device)
        began = time.perf_counter()
        self.losses.append(window_loss(run))
        self._look_at_gradients(run)
        self._looked = time.perf_counter() - began

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        """Record the time and the counts of the step; stop the run after the last step."""
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
        """Record the metrics and the time of the validation."""
        self.metrics = metrics
        # The outermost wrapper has the longest time.
        self.validations.append(max(self.seconds.pop("validate", [0.0])))

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        """Record the state at the end, at the safe point at which savers save it."""
        if run.ending and run.signal is None:
            self.sizes["peak"] = peak_memory(run.device)
            states = [s for kept in run.optimizer.state.values() for s in kept.values()]
            self.sizes["optimizer"] = _bytes(s for s in states if hasattr(s, "element_size"))
            self.state = digests(run.snapshot())
            # Last: a source may draw from the global generators.
            self.next_batch = batch_digests(next(run.stream, None))

    @hookimpl
    def on_checkpoint_saved(self) -> None:
        """Record that a checkpoint was saved."""
        self.saved = True

    def _make_room(self, run: Run) -> None:
        """Make the run longer, so that a trial that begins at its end has its steps."""
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
        # Of the last step: weights that begin at zero, as in LoRA, may have none in the first.
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
    """Compare a restored run with the state that was saved; end it before its first step."""

    expected: dict[str, str] = field(init=False, factory=dict)
    next_batch: dict[str, str] | None = field(init=False, default=None)
    different: list[str] = field(init=False, factory=list)
    other_data: bool = field(init=False, default=False)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Compare the state and the next micro-batch of the resumed run."""
        self.different = differences(self.expected, digests(run.snapshot()))
        batch = next(iter(run.data.batches(run.progress)), None)
        self.other_data = batch_digests(batch) != self.next_batch
        run.ending = True


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
