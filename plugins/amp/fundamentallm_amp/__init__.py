"""Training in half precision: autocast in every forward, and a dynamic loss scale for fp16."""

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
_OF_FP16 = ("init_scale", "growth_factor", "backoff_factor", "growth_interval", "min_scale")


@plugin
class Amp:
    """Compute in bf16 or fp16 where that is safe; the weights stay as they are (or go bf16).

    With fp16 the loss is scaled, so that small gradients do not vanish, and a step whose gradients
    overflow is rejected. To know that, the host waits for the device once in every step; with bf16
    it never does.
    """

    role = "training"

    dtype: Literal["bf16", "fp16"] = "bf16"
    """What matrix products and the like are computed in, in training and in validation."""
    params: Literal["bf16"] | None = None
    """What the weights are kept in, and the optimizer's state with them. By default they stay as
    the model is built, which is fp32."""
    init_scale: float = field(default=65536.0, validator=[gt(0), le(2.0**127)])
    """`fp16` only: the first loss scale."""
    growth_factor: float = field(default=2.0, validator=gt(1))
    """`fp16` only: what the scale is multiplied by after `growth_interval` steps in a row without
    an overflow."""
    backoff_factor: float = field(default=0.5, validator=[gt(0), lt(1)])
    """`fp16` only: what the scale is multiplied by after an overflow."""
    growth_interval: int = field(default=2000, validator=ge(1))
    """`fp16` only: steps in a row without an overflow after which the scale grows."""
    min_scale: float = field(default=1.0, validator=gt(0))
    """`fp16` only: a scale below this ends the run, since what still overflows is not finite at
    all."""

    overflows: int = field(init=False, default=0)
    """Steps whose gradients overflowed, since the run began."""
    # Any: the types of what is made at the start cannot be named without importing torch.
    _autocast: Any = field(init=False, repr=False)
    _scaling: Any = field(init=False, default=None, repr=False)
    _kept: dict[str, Any] = field(init=False, factory=dict, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.min_scale > self.init_scale:
            raise ValueError(f"min_scale: is more than init_scale, {self.init_scale:g}")
        if self.dtype == "fp16":
            if self.params is not None:
                raise ValueError("params: weights in bf16 go with dtype 'bf16', not with 'fp16'")
            return
        fields = setting_fields(type(self))
        for name in _OF_FP16:
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name}: belongs to dtype 'fp16', but dtype is {self.dtype!r}")
        # They have nothing to do with bf16, and a name without a method is no hook. backward stays:
        # two amps that answer it are noticed.
        for name in ("finish_gradients", "judge_step", "settle_step"):
            setattr(self, name, None)

    @property
    def produces(self) -> tuple[str, ...]:
        """The metrics it logs."""
        return ("amp/scale", "amp/overflows") if self.dtype == "fp16" else ()

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Try the device out, so that what it cannot do is told before anything is built."""
        from fundamentallm_amp.precision import try_out

        try:
            try_out(run.device, self.dtype)
        except SettingsError as error:
            raise SettingsError(f"{self._name(run)}.{error}") from error

    @hookimpl(wrapper=True)
    def build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        """Turn the weights of the new model into bf16, if they are to be kept in it."""
        from fundamentallm_amp.precision import autocast, keep_in_bf16

        model = yield
        if self.params == "bf16":
            keep_in_bf16(model)
        self._autocast = autocast(run.device, self.dtype)
        return model

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Make the loss scale, or take up that of the checkpoint."""
        if self.dtype != "fp16":
            return
        import torch

        from fundamentallm_amp.scaling import Scaling

        for name, parameter in run.model.named_parameters():
            if parameter.dtype is torch.float16:
                raise SettingsError(
                    f"{self._name(run)}.dtype: 'fp16' trains weights in fp32, but the model has "
                    f"{name} in fp16, where updates vanish; build the model in fp32"
                )
        scaler = torch.amp.GradScaler(
            run.device,
            init_scale=self.init_scale,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            growth_interval=self.growth_interval,
        )
        self._scaling = Scaling(scaler, run.parameters, run.device)
        self.set_state(self._kept)

    @hookimpl(wrapper=True)
    def forward(self) -> Generator[None, Tensor, Tensor]:
        """Compute in half precision."""
        with self._autocast:
            return (yield)

    @hookimpl
    def backward(self, loss: Tensor) -> None:
        """Backpropagate; with fp16 the scaled loss."""
        if self._scaling is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._scaling.backward(loss)

    @hookimpl
    def finish_gradients(self, run: Run) -> None:
        """With fp16, divide the gradients by the scale, so that everyone sees the true ones."""
        if not self._scaling.unscale():
            raise SettingsError(
                f"{self._name(run)}.dtype: 'fp16' needs every loss to go through the hook "
                f"'backward', to scale it; a plugin that answers 'train_microbatch' went past it"
            )

    @hookimpl
    def judge_step(self) -> Rejection | None:
        """With fp16, reject a step whose gradients overflowed. The host waits for the device."""
        return OVERFLOW if self._scaling.overflows() else None

    @hookimpl
    def settle_step(self, run: Run) -> None:
        """With fp16, let the scale follow; log it where a row is due; end when it has collapsed.

        A step that another plugin rejects for something else than its gradients does not count.
        """
        scaling, progress = self._scaling, run.progress
        # A rejection for the loss, a spike or memory says nothing about the scale.
        causes = {one.cause for one in run.rejected}
        if scaling.settle(counts=causes <= {"overflow", "nonfinite_gradient"}):
            self.overflows += 1
            self._insist_on_a_scale(run, scaling.scaler.get_scale())
        if run.settings.log_every.due(progress) or run.settings.length.reached(progress):
            run.log("amp/scale", scaling.scale())
            run.log("amp/overflows", self.overflows)

    def get_state(self) -> dict[str, Any]:
        """Return the scale, how far it is from growing, and the overflows so far."""
        if self._scaling is None:
            return self._kept
        return {"overflows": self.overflows, **self._scaling.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; with bf16 there is nothing to go on with."""
        self._kept = state if self.dtype == "fp16" else {}
        self.overflows = self._kept.get("overflows", 0)
        if self._scaling is not None and self._kept:
            self._scaling.restore(self._kept)

    def _insist_on_a_scale(self, run: Run, scale: float) -> None:
        """End the run if no loss scale is small enough for its gradients."""
        if scale >= self.min_scale:
            return
        from fundamentallm_amp.scaling import diagnosis

        raise NotFiniteError(
            f"step {run.progress.step}: the gradients overflow in fp16 however small the loss "
            f"scale, which is down to {scale:g} ({self._name(run)}.min_scale is "
            f"{self.min_scale:g}); {diagnosis(run)}. Lower the learning rate, clip the gradients, "
            f"or set dtype = 'bf16', which needs no scale"
        )

    def _name(self, run: Run) -> str:
        return next(name for name, listed in run.plugins.items() if listed is self)
