"""Reduced precision: autocast in every forward, a dynamic loss scale for fp16, or TF32."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import (
    NotFiniteError,
    Rejection,
    SettingsError,
    field,
    ge,
    gt,
    hookimpl,
    le,
    lt,
    plugin,
    setting_fields,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fundamentallm import Run

OVERFLOW = Rejection("overflow", "the gradients overflowed in fp16")
# Other plugins' causes that a smaller loss scale may remove.
_BY_THE_SCALE = ("overflow", "nonfinite_gradient")
_FP16_ONLY = ("init_scale", "growth_factor", "backoff_factor", "growth_interval", "min_scale")


@plugin
class Amp:
    """Compute in bf16 or fp16 where that is safe, with weights in fp32 (or bf16); or use TF32.

    With fp16 the loss is scaled, so that small gradients do not become zero, and a step whose
    gradients overflow is rejected. To know that, the host waits for the device once in every step;
    with bf16 it never waits. Micikevicius et al., "Mixed Precision Training" (2018,
    arXiv:1710.03740).
    """

    role = "training"

    dtype: Literal["bf16", "fp16", "tf32"] = "bf16"
    """The type of matrix products and similar operations, in training and in validation. `tf32`
    keeps all tensors in fp32, and NVIDIA GPUs since Ampere multiply them with fewer bits; other
    devices ignore it."""
    params: Literal["bf16"] | None = None
    """The type of the weights, and so of the optimizer's state. By default the type in which the
    model is built, usually fp32."""
    init_scale: float = field(default=65536.0, validator=[gt(0), le(2.0**127)])
    """`fp16` only: the first loss scale."""
    growth_factor: float = field(default=2.0, validator=gt(1))
    """`fp16` only: the factor of the scale after `growth_interval` consecutive steps without an
    overflow."""
    backoff_factor: float = field(default=0.5, validator=[gt(0), lt(1)])
    """`fp16` only: the factor of the scale after an overflow."""
    growth_interval: int = field(default=2000, validator=ge(1))
    """`fp16` only: consecutive steps without an overflow after which the scale grows."""
    min_scale: float = field(default=1.0, validator=gt(0))
    """`fp16` only: a scale below this ends the run, since gradients that still overflow are not
    finite at any scale."""

    overflows: int = field(init=False, default=0)
    """Steps whose gradients overflowed, since the start of the run."""
    # Any: naming these types would import torch.
    _autocast: Any = field(init=False, repr=False)
    _loss_scale: Any = field(init=False, default=None, repr=False)
    _precision_before: str | None = field(init=False, default=None, repr=False)
    _restored: dict[str, Any] = field(init=False, factory=dict, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.min_scale > self.init_scale:
            raise ValueError(f"min_scale: must not exceed init_scale, {self.init_scale:g}")
        if self.dtype != "bf16" and self.params is not None:
            raise ValueError(f"params: weights in bf16 need dtype 'bf16', not {self.dtype!r}")
        if self.dtype != "tf32":
            # None in place of a method is no hook.
            self.on_train_end = None  # type: ignore[assignment,method-assign]
        if self.dtype == "fp16":
            return
        fields = setting_fields(type(self))
        for name in _FP16_ONLY:
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name}: belongs to dtype 'fp16', but dtype is {self.dtype!r}")
        # bf16 and TF32 need none of these hooks. backward stays, so that two instances of amp are
        # an error.
        for name in ("finish_gradients", "judge_step", "settle_step"):
            setattr(self, name, None)

    @property
    def produces(self) -> tuple[str, ...]:
        """The metrics that the plugin logs."""
        return ("amp/scale", "amp/overflows") if self.dtype == "fp16" else ()

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Check that the device can train in the type, and forget an earlier run of this object."""
        from fundamentallm_amp.precision import check_device, use_tf32

        self._loss_scale, self._restored, self.overflows = None, {}, 0
        try:
            check_device(run.device, self.dtype)
        except SettingsError as error:
            raise SettingsError(f"{run.name_of(self)}.{error}") from error
        if self.dtype == "tf32":
            self._precision_before = use_tf32()

    @hookimpl(wrapper=True)
    def build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        """Convert the weights of the new model to bf16, if `params` says so."""
        from fundamentallm_amp.precision import autocast, convert_to_bf16

        model = yield
        if self.params == "bf16":
            convert_to_bf16(model)
        self._autocast = autocast(run.device, self.dtype)
        return model

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """With fp16, create the loss scale or restore that of the checkpoint."""
        if self.dtype != "fp16":
            return
        import torch

        from fundamentallm_amp.loss_scale import LossScale

        for name, parameter in run.model.named_parameters():
            if parameter.dtype is torch.float16:
                raise SettingsError(
                    f"{run.name_of(self)}.dtype: 'fp16' trains weights in fp32, but the model has "
                    f"{name} in fp16, where small updates are lost; build the model in fp32"
                )
        scaler = torch.amp.GradScaler(
            run.device,
            init_scale=self.init_scale,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            growth_interval=self.growth_interval,
        )
        self._loss_scale = LossScale(scaler, run.parameters, run.device)
        self.set_state(self._restored)

    @hookimpl(wrapper=True)
    def forward(self) -> Generator[None, Tensor, Tensor]:
        """Run the forward pass under autocast."""
        with self._autocast:
            return (yield)

    @hookimpl
    def backward(self, loss: Tensor) -> None:
        """Backpropagate the loss, with fp16 times the loss scale."""
        if self._loss_scale is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._loss_scale.backward(loss)

    @hookimpl
    def finish_gradients(self, run: Run) -> None:
        """With fp16, divide the gradients by the loss scale."""
        if not self._loss_scale.unscale():
            raise SettingsError(
                f"{run.name_of(self)}.dtype: 'fp16' needs every loss to go through the hook "
                f"'backward', which scales it; a plugin that answers 'train_microbatch' skipped it"
            )

    @hookimpl
    def judge_step(self) -> Rejection | None:
        """With fp16, reject a step whose gradients overflowed. The host waits for the device."""
        return OVERFLOW if self._loss_scale.overflows() else None

    @hookimpl
    def settle_step(self, run: Run) -> None:
        """With fp16, update the loss scale, and log it when a row is due.

        A step that another plugin rejects counts only if its cause may be the scale. A scale below
        `min_scale` ends the run.
        """
        loss_scale, progress = self._loss_scale, run.progress
        # For example, a step rejected for its loss shows nothing about the scale.
        unrelated = [why for why in run.rejected if why.cause not in _BY_THE_SCALE]
        if loss_scale.settle(counts=not unrelated):
            self.overflows += 1
            self._check_minimum(run, loss_scale.scaler.get_scale())
        if run.settings.log_every.due(progress) or run.settings.length.reached(progress):
            run.log("amp/scale", loss_scale.scale())
            run.log("amp/overflows", self.overflows)

    @hookimpl
    def on_train_end(self) -> None:
        """With TF32, restore torch's precision of fp32 matrix products."""
        if self._precision_before is not None:
            import torch

            torch.set_float32_matmul_precision(self._precision_before)
            self._precision_before = None

    def get_state(self) -> dict[str, Any]:
        """Return the scale, the steps since its last change, and the count of overflows."""
        if self._loss_scale is None:
            return self._restored
        return {"overflows": self.overflows, **self._loss_scale.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint; with bf16 there is none."""
        self._restored = state if self.dtype == "fp16" else {}
        self.overflows = self._restored.get("overflows", 0)
        if self._loss_scale is not None and self._restored:
            self._loss_scale.restore(self._restored)

    def _check_minimum(self, run: Run, scale: float) -> None:
        """Raise ``NotFiniteError`` if the scale is below ``min_scale``."""
        if scale >= self.min_scale:
            return
        from fundamentallm_amp.loss_scale import diagnose

        raise NotFiniteError(
            f"step {run.progress.step}: the gradients overflow in fp16 at every loss scale; it is "
            f"down to {scale:g} ({run.name_of(self)}.min_scale is "
            f"{self.min_scale:g}); {diagnose(run)}. Lower the learning rate, clip the gradients, "
            f"or set dtype = 'bf16', which needs no scale"
        )
