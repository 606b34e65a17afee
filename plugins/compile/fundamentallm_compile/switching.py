"""Modules that run compiled where gradients are computed, and as they are written elsewhere."""

from __future__ import annotations

import copy
import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from fundamentallm import PluginError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fundamentallm import Run
    from fundamentallm_compile import Compile

log = logging.getLogger("fundamentallm")

_TASK = "compiling"
_ADVICE = 'fullgraph = false or scope = "blocks" may help; backend = "aot_eager" tells who fails'


class Switch:
    """Stands for the ``forward`` of a module, and chooses between two ways to run it."""

    def __init__(
        self, run: Run, forward: Callable[..., Any], settings: Compile, where: str
    ) -> None:
        self.run, self.eager, self.where = run, forward, where
        self.validation = settings.validation
        self.compiled: Callable[..., Any] = torch.compile(
            forward,
            backend=settings.backend,
            mode=None if settings.mode == "default" else settings.mode,
            dynamic=settings.dynamic,
            fullgraph=settings.fullgraph,
        )

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the module."""
        if torch.is_grad_enabled() or (self.validation and self.run.phase != "train"):
            try:
                return self.compiled(*inputs, **named)
            except Exception as error:
                if not _is_compilers(error):
                    raise
                raise PluginError(f"{self.where}: {_told(error)}") from error
        return self.eager(*inputs, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Give a copy of the module its own ``forward``; compiled code belongs to this module."""
        twin: Callable[..., Any] = copy.deepcopy(self.eager, memo)
        return twin


class Watch:
    """Tells that the compiler is at work, from the first training call to the second.

    The backward pass is compiled in between, where nobody can see it. Then it takes itself away.
    """

    def __init__(self, run: Run, module: nn.Module, forward: Switch) -> None:
        self.run, self.module, self.forward = run, module, forward
        self.since: float | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the module."""
        if torch.is_grad_enabled():
            if self.since is None:
                log.info("compiling the model: the first step takes its time")
                self.since = time.perf_counter()
                self.run.report(_TASK, 0)  # nobody knows how long
            else:
                self.end()
        return self.forward(*inputs, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Give a copy of the module its own ``forward``."""
        return self.forward.__deepcopy__(memo)

    def end(self) -> None:
        """Tell that the first step is through, unless that is told or was never begun."""
        if self.since is not None and self.module.forward is self:
            log.info("the first step took %.1f seconds", time.perf_counter() - self.since)
            self.run.report(_TASK, 1, 1)
            self.module.forward = self.forward


def switch(run: Run, modules: dict[str, nn.Module], settings: Compile, plugin: str) -> Watch:
    """Compile the modules in place; their names, hooks and parameters stay what they are."""
    switches = []
    for name, module in modules.items():
        where = f"{plugin}: {name or type(module).__name__} cannot be compiled"
        switches.append(Switch(run, module.forward, settings, where))
        module.forward = switches[-1]
    first = next(iter(modules.values()))
    watch = Watch(run, first, switches[0])
    first.forward = watch
    return watch


def _is_compilers(error: Exception) -> bool:
    # By name, since PyTorch keeps these classes to itself.
    modules = [cls.__module__ for cls in type(error).__mro__]
    return any(name.startswith(("torch._dynamo", "torch._inductor")) for name in modules)


def _told(error: Exception) -> str:
    """Return the line that says most of a compiler's many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line.lower()]
    what = [*telling, *lines, type(error).__name__][0]
    return f"{what} ({_ADVICE})"
