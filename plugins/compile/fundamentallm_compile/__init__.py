"""Compile the model with ``torch.compile``, whole or block by block, in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import field, hookimpl, plugin

if TYPE_CHECKING:
    from torch import nn

    from fundamentallm import Run

__all__ = ["Compile"]


@plugin
class Compile:
    """Let PyTorch's compiler make fast code of the forward and backward pass.

    The model stays the same object with the same names, so checkpoints of a compiled run and of one
    that is not are the same. Where no gradients are computed the model runs as it is written, but
    for validation, if that is to be compiled: sampling never waits for the compiler.
    """

    scope: Literal["model", "blocks"] = "model"
    """`model` compiles all of it at once, which makes the fastest code; `blocks` compiles a block
    once for all that are alike, which takes a fraction of the time."""
    blocks: list[str] | None = None
    """Globs on module names (`*` matches dots too) that say what a block is, such as
    `["encoder.layers.*"]`; of modules inside each other, the outer ones. By default the elements of
    the `nn.ModuleList` with the most parameters."""
    backend: str = "inductor"
    """What compiles: `inductor`, or another backend that PyTorch knows."""
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """`max-autotune-no-cudagraphs` tries several ways to do a matrix product and takes the fastest,
    which takes longer to compile."""
    dynamic: bool | None = None
    """Whether code is made for any size instead of one per size; by default from the second size
    on."""
    fullgraph: bool = False
    """Whether it is an error if the compiler has to leave some of the model to Python."""
    validation: bool = True
    """Whether validation is compiled, too: code of its own, since dropout is off there."""
    cache_dir: Path | None = None
    """Where compiled code is kept for the next start. By default what `TORCHINDUCTOR_CACHE_DIR`
    says, or a folder in the system's temporary one."""

    _before: Any = field(init=False, repr=False, default=None)
    _watch: Any = field(init=False, repr=False, default=None)

    def __attrs_post_init__(self) -> None:
        if self.blocks is not None and self.scope != "blocks":
            raise ValueError('blocks: has no effect without scope = "blocks"')
        if self.blocks == []:
            raise ValueError("blocks: is empty; leave it out for the largest list of modules")
        for name in ("mode", "cache_dir"):
            if self.backend != "inductor" and getattr(self, name) not in (None, "default"):
                raise ValueError(f"{name}: is the inductor's; the backend is {self.backend!r}")

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Refuse to start where the backend has not what it needs; set up its cache."""
        from fundamentallm_compile.requirements import check, use_cache

        check(self.backend, run.device, self._name(run))
        if self.cache_dir is not None:
            self._before = use_cache(self.cache_dir, self._name(run))

    @hookimpl
    def compile_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Compile model or blocks in place; the compiler itself runs when they are first called."""
        from fundamentallm_compile.blocks import find_blocks
        from fundamentallm_compile.switching import switch

        name = self._name(run)
        chosen = {"": model} if self.scope == "model" else find_blocks(model, self.blocks, name)
        self._watch = switch(run, chosen, self, name)
        return model

    @hookimpl
    def on_train_end(self) -> None:
        """Leave the process's environment as it was."""
        if self._watch is not None:
            self._watch.end()
        if self._before is not None:
            self._before()
            self._before = None

    def _name(self, run: Run) -> str:
        return next((name for name, one in run.plugins.items() if one is self), "compile")
