"""Replace the ``forward`` of modules: compiled where gradients are computed, else unchanged."""

from __future__ import annotations

import copy
import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from fundamentallm import PluginError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from fundamentallm import Run
    from fundamentallm_compile import Compile

log = logging.getLogger("fundamentallm")

_TASK = "compiling"
_ADVICE = (
    'try fullgraph = false or scope = "blocks"; backend = "aot_eager" shows whether the capture or '
    "the code generator fails"
)


class CompiledForward:
    """The ``forward`` of a module, which calls the compiled or the original function."""

    def __init__(
        self, run: Run, forward: Callable[..., Any], settings: Compile, where: str
    ) -> None:
        self.run, self.original, self.where = run, forward, where
        self.validation = settings.validation
        self.replays_graphs = settings.mode == "reduce-overhead"
        self.compiled: Callable[..., Any] = torch.compile(
            forward,
            backend=settings.backend,
            mode=None if settings.mode == "default" else settings.mode,
            dynamic=settings.dynamic,
            fullgraph=settings.fullgraph,
        )

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the module; raise ``PluginError`` in one line if the compiler fails."""
        if torch.is_grad_enabled() or (self.validation and self.run.phase != "train"):
            try:
                if self.replays_graphs:
                    return self._replayed(*inputs, **named)
                return self.compiled(*inputs, **named)
            except Exception as error:
                if not _is_compiler_error(error):
                    raise
                raise PluginError(f"{self.where}: {_one_line(error)}") from error
        return self.original(*inputs, **named)

    def _replayed(self, *inputs: Any, **named: Any) -> Tensor:
        """Run the module as a new iteration of the CUDA graphs; return a copy of the result.

        The next call overwrites the result itself, but losses live until they are logged.
        """
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        result = self.compiled(*inputs, **named)
        if not isinstance(result, torch.Tensor):
            raise PluginError(
                f"{self.where} with mode 'reduce-overhead': its forward returns "
                f'{type(result).__name__}, not a tensor; use mode = "default"'
            )
        return result.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Copy the original ``forward``: compiled code is bound to this module's parameters."""
        copied: Callable[..., Any] = copy.deepcopy(self.original, memo)
        return copied


class FirstCall:
    """The ``forward`` of the first compiled module that reports the time of the first step.

    The backward pass is compiled between the first and the second training call, where no hook
    runs. After the second call the module's ``forward`` is the plain ``CompiledForward``.
    """

    def __init__(self, run: Run, module: nn.Module, forward: CompiledForward) -> None:
        self.run, self.module, self.forward = run, module, forward
        self.started: float | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the module."""
        if torch.is_grad_enabled():
            if self.started is None:
                log.info("compiling the model; the first step waits for it")
                self.started = time.perf_counter()
                self.run.report(_TASK, 0)  # the total time is unknown
            else:
                self.end()
        return self.forward(*inputs, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Copy the original ``forward``."""
        return self.forward.__deepcopy__(memo)

    def end(self) -> None:
        """Report the end of the first step once, and take this object out of the module."""
        if self.started is not None and self.module.forward is self:
            log.info("the first step took %.1f seconds", time.perf_counter() - self.started)
            self.run.report(_TASK, 1, 1)
            self.module.forward = self.forward


def compile_modules(
    run: Run, modules: dict[str, nn.Module], settings: Compile, plugin: str
) -> FirstCall:
    """Compile the modules in place; their names, hooks and parameters do not change.

    ``plugin`` is the instance name that begins errors. Returns the reporter of the first step.
    """
    compiled = []
    for name, module in modules.items():
        where = f"{plugin}: {name or type(module).__name__} cannot be compiled"
        compiled.append(CompiledForward(run, module.forward, settings, where))
        module.forward = compiled[-1]
    first = next(iter(modules.values()))
    reporter = FirstCall(run, first, compiled[0])
    first.forward = reporter
    return reporter


def copy_gradients(
    parameters: list[nn.Parameter], copied: dict[nn.Parameter, Tensor]
) -> dict[nn.Parameter, Tensor]:
    """Replace the gradients that are not in ``copied`` by copies; return those of all parameters.

    The first gradient of a parameter may be an output of a CUDA graph. Later micro-batches are
    added to it in place.
    """
    kept = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient is not copied.get(parameter):
            gradient = parameter.grad = gradient.clone()
        kept[parameter] = gradient
    return kept


def _is_compiler_error(error: Exception) -> bool:
    # By module name: PyTorch exports no common base class of these errors.
    modules = [cls.__module__ for cls in type(error).__mro__]
    return any(name.startswith(("torch._dynamo", "torch._inductor")) for name in modules)


def _one_line(error: Exception) -> str:
    """Return the most useful line of a compiler's long message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if "error:" in line.lower()]
    return f"{[*useful, *lines, type(error).__name__][0]} ({_ADVICE})"
