"""Half precision: check a device, make the autocast context, and convert weights."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from fundamentallm import SettingsError

_SINCE_AMPERE = "GPUs since Ampere, compute capability 8.0, have them"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: str, dtype: str) -> torch.autocast:
    """Return a reusable context in which torch computes safe operations in ``dtype``.

    Matrix products are safe, for example, but softmax is not. With TF32 it changes nothing.
    """
    if dtype == "tf32":
        return torch.autocast(torch.device(device).type, enabled=False)
    return torch.autocast(torch.device(device).type, dtype=DTYPES[dtype])


def use_tf32() -> str:
    """Let fp32 matrix products use TF32; return the previous precision, for torch's setter."""
    before: str = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    return before


def check_device(device: str, dtype: str) -> None:
    """Run a tiny training step on ``device``; raise ``SettingsError`` if ``dtype`` does not work.

    The message begins with ``dtype: …``, to be put after the plugin's name. No random number is
    drawn.
    """
    if dtype == "tf32":
        if device.startswith("cuda") and torch.cuda.get_device_capability(device) < (8, 0):
            raise _not_working(device, dtype, f"it has no TF32 units ({_SINCE_AMPERE})")
        return
    # A GPU without bf16 units emulates bf16, which is slower than fp32.
    if (device, dtype) == ("cuda", "bf16") and not torch.cuda.is_bf16_supported(
        including_emulation=False
    ):
        raise _not_working(
            device,
            dtype,
            f"it has no bf16 units ({_SINCE_AMPERE})",
        )
    try:
        computed = _tiny_step(device, dtype)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AssertionError) as error:
        raise _not_working(device, dtype, str(error).partition("\n")[0]) from error
    if computed is not DTYPES[dtype]:
        raise _not_working(device, dtype, f"torch computes in {computed} instead")


def convert_to_bf16(model: nn.Module) -> None:
    """Convert the floating-point parameters of a model to bf16, in place.

    Buffers keep their type: they contain constants (such as the angles of positions) or running
    means, which need the precision.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def _tiny_step(device: str, dtype: str) -> torch.dtype:
    """Run the operations of a step on the device; return the type of a matrix product."""
    weight = torch.ones(2, 2, device=device, requires_grad=True)
    with warnings.catch_warnings(), autocast(device, dtype):
        warnings.simplefilter("ignore")  # the returned type shows the same
        product = weight @ weight
        loss = product.float().sum()
    if dtype == "fp16":
        scaler = torch.amp.GradScaler(device, init_scale=2.0)
        optimizer = torch.optim.SGD([weight], lr=0.0)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    else:
        loss.backward()  # type: ignore[no-untyped-call]
    return product.dtype


def _not_working(device: str, dtype: str, why: str) -> SettingsError:
    other = "bf16" if dtype == "fp16" else "fp16"
    return SettingsError(
        f"dtype: {dtype!r} does not work on this {device} device: {why}; "
        f"set dtype = {other!r}, or remove the plugin"
    )
