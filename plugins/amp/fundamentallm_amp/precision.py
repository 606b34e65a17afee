"""Half precision on a device: whether it works there, where it is used, and weights in it."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from fundamentallm import SettingsError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: str, dtype: str) -> torch.autocast:
    """Return a context, to be entered again and again, in which torch computes in ``dtype`` where
    that is safe: in matrix products, say, but not in softmax."""
    return torch.autocast(torch.device(device).type, dtype=DTYPES[dtype])


def try_out(device: str, dtype: str) -> None:
    """Raise ``SettingsError`` unless ``device`` trains in ``dtype``: a tiny step is made on it.

    The message begins with what follows the plugin's name, ``dtype: …``. No random number is
    drawn.
    """
    # A card may compute in bf16 without having the units for it, slower than it does in fp32.
    if (device, dtype) == ("cuda", "bf16") and not torch.cuda.is_bf16_supported(
        including_emulation=False
    ):
        raise _useless(device, dtype, "it has no bf16 units (cards since Ampere, 8.0, have)")
    try:
        computed = _tiny_step(device, dtype)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AssertionError) as error:
        raise _useless(device, dtype, str(error).partition("\n")[0]) from error
    if computed is not DTYPES[dtype]:
        raise _useless(device, dtype, f"torch computes in {computed} there all the same")


def keep_in_bf16(model: nn.Module) -> None:
    """Turn the floating-point weights of a model into bf16, in place.

    Buffers stay as they are: they hold what is computed once (the angles of positions) or summed
    up slowly (running means), and gain nothing from being coarse.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def _tiny_step(device: str, dtype: str) -> torch.dtype:
    """Do on the device what a step does; return the type that a matrix product came out in."""
    weight = torch.ones(2, 2, device=device, requires_grad=True)
    with warnings.catch_warnings(), autocast(device, dtype):
        warnings.simplefilter("ignore")  # a warning would say what the type shows
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


def _useless(device: str, dtype: str, why: str) -> SettingsError:
    other = "fp16" if dtype == "bf16" else "bf16"
    return SettingsError(
        f"dtype: {dtype!r} does not work on this {device} device: {why}; "
        f"set dtype = {other!r}, or leave the plugin out"
    )
