"""Compile the model with ``torch.compile``, whole or block by block, in place."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import field, find_blocks, hookimpl, plugin

if TYPE_CHECKING:
    from torch import nn

    from fundamentallm import Run

__all__ = ["Compile"]


@plugin
class Compile:
    """Compile the forward and backward pass with ``torch.compile``.

    The model stays the same object with the same parameter names, so checkpoints of a compiled run
    and of an uncompiled one are interchangeable. Compiled code runs where gradients are computed
    and, with ``validation``, in validation. Sampling always runs the model uncompiled.
    """

    role = "training"
    free = ("cache_dir",)

    scope: Literal["model", "blocks"] = "model"
    """`model` compiles the whole model at once, which makes the fastest code; `blocks` compiles one
    block and reuses its code for all equal blocks, which takes a fraction of the time."""
    blocks: list[str] | None = None
    """Glob patterns on module names that select the blocks (`*` also matches dots), such as
    `["encoder.layers.*"]`; of nested matches only the outer modules count. By default the elements
    of the `nn.ModuleList` with the most parameters."""
    backend: str = "inductor"
    """The compiler: `inductor`, or another backend that PyTorch knows."""
    mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default"
    """`reduce-overhead` replays CUDA graphs instead of launching kernels singly, which helps small
    batches on an NVIDIA GPU; it needs scope `model`. `max-autotune-no-cudagraphs` measures several
    implementations of each matrix product and uses the fastest; compiling takes longer."""
    dynamic: bool | None = None
    """Whether the code accepts any input size instead of one size each. By default it does from the
    second size on."""
    fullgraph: bool = False
    """Whether it is an error if the compiler cannot capture the whole model."""
    validation: bool = True
    """Whether validation runs compiled as well. It needs a second compilation, because dropout is
    off there."""
    cache_dir: Path | None = None
    """The folder where compiled code is kept for later starts. By default the value of
    `TORCHINDUCTOR_CACHE_DIR`, or a folder in the system's temporary directory."""

    _restore_environment: Any = field(init=False, repr=False, default=None)
    _first_call: Any = field(init=False, repr=False, default=None)
    _copied: Any = field(init=False, repr=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        if self.blocks is not None and self.scope != "blocks":
            raise ValueError('blocks: has no effect without scope = "blocks"')
        if self.blocks == []:
            raise ValueError("blocks: is empty; leave it out for the largest list of modules")
        for name in ("mode", "cache_dir"):
            if self.backend != "inductor" and getattr(self, name) not in (None, "default"):
                raise ValueError(
                    f"{name}: works with backend 'inductor' only; backend is {self.backend!r}"
                )
        if self.mode == "reduce-overhead":
            if self.scope == "blocks":
                raise ValueError("mode: 'reduce-overhead' needs scope 'model', not 'blocks'")
        else:
            # None in place of a method is no hook: the other modes need no copies.
            self.train_microbatch = None  # type: ignore[assignment,method-assign]

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Check that the backend's requirements are installed, and set its cache folder."""
        from fundamentallm_compile.requirements import check, use_cache

        check(self.backend, run.device, run.name_of(self))
        if self.cache_dir is not None:
            self._restore_environment = use_cache(self.cache_dir, run.name_of(self))

    @hookimpl
    def compile_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Compile the model or its blocks in place; the compiler runs at their first call."""
        from fundamentallm_compile.compiled_forward import compile_modules

        name = run.name_of(self)
        modules = {"": model}
        if self.scope == "blocks":
            modules = find_blocks(model, self.blocks, f"{name}.blocks")
        self._first_call = compile_modules(run, modules, self, name)
        return model

    @hookimpl(wrapper=True)
    def train_microbatch(self, run: Run, is_last: bool) -> Generator[None, None, None]:
        """With `reduce-overhead`, move the gradients out of the memory of the CUDA graphs before
        the next micro-batch reuses it."""
        yield
        if is_last:
            self._copied = {}  # otherwise the memory of these gradients would not be free in time
        else:
            from fundamentallm_compile.compiled_forward import copy_gradients

            self._copied = copy_gradients(run.parameters, self._copied)

    @hookimpl
    def on_train_end(self) -> None:
        """Restore the environment variable of the cache folder."""
        if self._first_call is not None:
            self._first_call.end()
        self._copied = {}
        if self._restore_environment is not None:
            self._restore_environment()
            self._restore_environment = None
