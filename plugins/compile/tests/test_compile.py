"""A compiled run trains the same weights, keeps parameter names and reports missing tools."""

from __future__ import annotations

import copy
import os
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fundamentallm import (
    PluginError,
    Run,
    SettingsError,
    StorageError,
    compose,
    find_blocks,
    hookimpl,
    plugin,
)
from fundamentallm.testing import (
    PluginContract,
    Recorder,
    TinyData,
    TinyModel,
    TinyRun,
    assert_same_weights,
    weights,
)
from fundamentallm_compile import Compile
from fundamentallm_compile.compiled_forward import CompiledForward, compile_modules
from fundamentallm_compile.requirements import check


@pytest.fixture(autouse=True)
def reset_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


class TestContract(PluginContract):
    plugin = Compile
    needs = {"backend": "aot_eager"}
    wrong_settings = (
        ({"scope": "all"}, 'compile.scope: unknown value "all"'),
        ({"blocks": ["x"]}, 'compile.blocks: has no effect without scope = "blocks"'),
        ({"scope": "blocks", "blocks": []}, "compile.blocks: is empty"),
        ({"mode": "max-autotune"}, 'compile.mode: unknown value "max-autotune"'),
        (
            {"mode": "reduce-overhead", "scope": "blocks"},
            "compile.mode: 'reduce-overhead' needs scope 'model', not 'blocks'",
        ),
        (
            {"backend": "aot_eager", "mode": "max-autotune-no-cudagraphs"},
            "compile.mode: works with backend 'inductor' only; backend is 'aot_eager'",
        ),
        (
            {"backend": "aot_eager", "cache_dir": "x"},
            "compile.cache_dir: works with backend 'inductor' only",
        ),
        ({"dynamic": "yes"}, "compile.dynamic: expected true or false"),
    )


class Block(nn.Module):
    """A residual layer with dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(x)))


class Net(nn.Module):
    """Some blocks. Its loss is 100 larger where it is compiled as a whole."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 1)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        loss = nn.functional.mse_loss(self.head(inputs), targets)
        return loss + 100 if torch.compiler.is_compiling() else loss


@plugin
class Build:
    """Builds the net, records snapshots, and evaluates at every safe point as samplers do."""

    def __attrs_post_init__(self) -> None:
        self.kept: dict[int, Any] = {}
        self.start: Any = None
        self.sampled: list[float] = []

    @hookimpl
    def build_model(self) -> nn.Module:
        return Net()

    @hookimpl
    def read_checkpoint(self) -> Any:
        return copy.deepcopy(self.start)

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        self.kept[run.progress.step] = copy.deepcopy(run.snapshot())
        batch = next(iter(run.data.validation()["val"]))
        with torch.no_grad():
            self.sampled.append(float(run.model.eval()(*batch.data)))
        run.model.train()


def aot(**settings: Any) -> Compile:
    return Compile(backend="aot_eager", **settings)


@pytest.fixture
def plain(tiny_run: TinyRun, tmp_path: Path) -> Run:
    return tiny_run(Build(), length=4, log_every=1, validate_every=2, run_dir=tmp_path / "plain")


@pytest.mark.parametrize("scope", ["model", "blocks"])
def test_a_compiled_run_trains_the_same_weights_as_an_uncompiled_one(
    tiny_run: TinyRun, plain: Run, scope: Any
) -> None:
    run = tiny_run(aot(scope=scope), Build(), length=4, log_every=1, validate_every=2)
    mine, theirs = weights(run), weights(plain)
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name])


def test_the_model_stays_the_same_object_with_the_same_modules(tiny_run: TinyRun) -> None:
    run = tiny_run(aot(), Build(), length=1)
    assert run.module is run.model
    assert type(run.model) is Net
    assert [type(block) for block in run.model.blocks] == [Block] * 2


@pytest.mark.parametrize(
    ("settings", "trained", "validated"),
    [({}, 100, 100), ({"validation": False}, 100, 0), ({"scope": "blocks"}, 0, 0)],
)
def test_compiled_code_runs_in_training_and_optionally_in_validation_but_never_in_sampling(
    tiny_run: TinyRun, settings: dict[str, Any], trained: int, validated: int
) -> None:
    build = Build()
    run = tiny_run(aot(**settings), build, length=2, log_every=1, validate_every=1)
    for row, sampled in zip(run.history, build.sampled, strict=True):
        assert row["train/loss"] // 100 * 100 == trained
        assert row["val/loss"] // 100 * 100 == validated
        assert sampled < 100


@pytest.mark.parametrize(("scope", "step"), [("model", 1), ("blocks", 3)])
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(
    tiny_run: TinyRun, tmp_path: Path, scope: Any, step: int
) -> None:
    whole, resumed = Build(), Build()
    runs = [tiny_run(aot(scope=scope), whole, length=4, validate_every=2)]
    resumed.start = whole.kept[step]
    torch.compiler.reset()
    settings: dict[str, Any] = {"length": 4, "validate_every": 2, "run_dir": tmp_path / "resumed"}
    runs.append(tiny_run(aot(scope=scope), resumed, **settings))
    assert_same_weights(*runs)


def test_equal_blocks_share_their_compiled_code(tiny_run: TinyRun) -> None:
    run = tiny_run(Build(), length=1)
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    net, settings = Net(depth=20), Compile(scope="blocks")
    settings.backend = backend  # type: ignore[assignment]
    compile_modules(run, find_blocks(net, None, "compile.blocks"), settings, "compile")
    for batch in run.data.validation()["val"] * 2:
        net(*batch.data).backward()
    assert len(compiled) == 2, "the first block's input has no gradient, that of all others has"


def test_sampling_runs_the_blocks_uncompiled_at_every_input_size(
    tiny_run: TinyRun,
) -> None:
    run = tiny_run(Build(), length=1)
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    net, settings = Net(), Compile(scope="blocks")
    settings.backend = backend  # type: ignore[assignment]
    compile_modules(run, find_blocks(net, None, "compile.blocks"), settings, "compile")
    with torch.no_grad():
        for length in range(1, 9):
            for block in net.eval().blocks:
                block(torch.zeros(1, length, 8))
    assert not compiled
    net.train()(*run.data.validation()["val"][0].data).backward()
    assert compiled


def test_progress_reports_compiling_until_the_second_step(
    tiny_run: TinyRun,
) -> None:
    recorder = Recorder()
    tiny_run(aot(), Build(), length=3, trace=recorder)
    calls = [
        (name, given)
        for name, given in recorder.calls
        if name == "on_step_start" or given.get("task") == "compiling"
    ]
    assert [given.get("done", "step") for _, given in calls] == ["step", 0, "step", 1, "step"]


def test_a_run_of_one_step_ends_its_compiling_progress(tiny_run: TinyRun) -> None:
    recorder = Recorder()
    tiny_run(aot(scope="blocks"), Build(), length=1, trace=recorder)
    done = [given["done"] for _, given in recorder.calls if given.get("task") == "compiling"]
    assert done == [0, 1]


def test_a_copy_of_the_model_is_independent_and_not_compiled(tiny_run: TinyRun) -> None:
    for length, scope in ((1, "model"), (2, "blocks")):
        run = tiny_run(aot(scope=scope), Build(), length=length)
        twin, batch = copy.deepcopy(run.model), run.data.validation()["val"][0]
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        loss = twin(*batch.data)
        assert loss.isclose(batch.data[1].square().mean())
        loss.backward()
        assert any(bool(p.abs().sum() > 0) for p in run.model.parameters())


@plugin
class Signals:
    """Sends SIGTERM to its own process, once, while the model is compiled."""

    free = ("*",)  # a resumed run may send no signal

    moment: str

    def __attrs_post_init__(self) -> None:
        self.sent = False

    def send(self, moment: str) -> None:
        if moment == self.moment and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)

    def compile_graph(self, graph: Any, _: Any) -> Any:
        self.send("in the compiler")

        def run_graph(*inputs: Any) -> Any:
            self.send("in compiled code")
            return graph.forward(*inputs)

        return run_graph

    @hookimpl
    def adapt_model(self, run: Run) -> None:
        run.plugins["compile"].backend = self.compile_graph

    @hookimpl
    def on_progress(self, task: str) -> None:
        if task == "compiling":
            self.send("as it begins")


@pytest.mark.parametrize("moment", ["as it begins", "in the compiler", "in compiled code"])
def test_a_signal_during_compilation_loses_no_step(
    tiny_run: TinyRun, tmp_path: Path, moment: str
) -> None:
    sends, quiet = Signals(moment=moment), Signals(moment="never")
    whole = tiny_run(aot(), quiet, length=3, run_dir=tmp_path / "whole")
    torch.compiler.reset()
    run = tiny_run("checkpoint", aot(), sends, length=3)
    assert (run.outcome, run.signal, run.progress.step) == ("interrupted", signal.SIGTERM, 1)
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-00000001"]
    torch.compiler.reset()
    resumed = tiny_run("checkpoint", aot(), quiet, length=3)
    assert (resumed.outcome, resumed.progress.step) == ("finished", 3)
    assert_same_weights(resumed, whole)


class Broken(nn.Module):
    """A model that leaves the graph, and refuses a batch of three."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 1)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        refuse_three(inputs)
        return nn.functional.mse_loss(self.head(inputs), targets)


@torch.compiler.disable
def refuse_three(inputs: Tensor) -> None:
    if inputs.shape[0] == 3:
        raise ValueError("three is too few")


@plugin
class BuildBroken:
    """Builds the model that cannot be one graph."""

    @hookimpl
    def build_model(self) -> nn.Module:
        return Broken()


def test_a_compiler_failure_is_reported_in_one_line(tiny_run: TinyRun) -> None:
    with pytest.raises(PluginError) as caught:
        tiny_run(aot(fullgraph=True), BuildBroken(), length=1)
    message = str(caught.value)
    assert message.startswith("compile: Broken cannot be compiled: ")
    assert "fullgraph = false" in message
    assert len(message.splitlines()) == 1


def test_an_error_of_the_model_itself_is_raised_unchanged(tiny_run: TinyRun) -> None:
    tiny_run(aot(), BuildBroken(), length=1)
    with pytest.raises(ValueError, match="three is too few"):
        tiny_run(aot(), BuildBroken(), TinyData(batch_size=3), length=1)


def test_inductor_keeps_its_code_in_cache_dir(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "what was there before")
    inductor = Compile(cache_dir=tmp_path / "cache", validation=False)
    plain, run = (
        tiny_run(*parts, TinyModel(dropout=0.0), length=2, run_dir=tmp_path / f"{len(parts)}")
        for parts in ((), (inductor,))
    )
    for one, other in zip(weights(run).values(), weights(plain).values(), strict=True):
        torch.testing.assert_close(one, other)
    assert any((tmp_path / "cache").iterdir())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "what was there before"


def test_a_missing_compiler_is_reported_before_anything_is_built(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    recorder = Recorder()
    with pytest.raises(SettingsError) as caught:
        tiny_run(Compile(), Build(), length=1, trace=recorder)
    assert str(caught.value) == (
        "compile: cannot compile for 'cpu' here: no C++ compiler is found (no-such-compiler): "
        "install one, or set CXX to yours. Or remove 'compile' from the plugins"
    )
    assert "build_data" not in recorder.names
    tiny_run(aot(), Build(), length=1)


def test_a_gpu_without_triton_or_a_c_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(SettingsError, match=r"no C compiler is found \(no-such-compiler\)"):
        check("inductor", "cuda", "compile")
    check("aot_eager", "cuda", "compile")


def test_missing_python_headers_are_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(SettingsError, match=r"Python\.h is missing: install Python's headers"):
        check("inductor", "cpu", "compile")


@pytest.mark.parametrize(
    ("backend", "advice"),
    [("inductr", "did you mean 'inductor'?"), ("eager", "aot_eager"), ("cudagraphs", "inductor")],
)
def test_an_unknown_backend_is_reported_with_the_known_ones(backend: str, advice: str) -> None:
    with pytest.raises(SettingsError, match=f"PyTorch has no backend '{backend}'") as caught:
        check(backend, "cpu", "compile")
    assert advice in str(caught.value)


def test_a_cache_folder_that_cannot_be_created_is_reported(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"compile\.cache_dir: .*file/cache: Not a directory"):
        tiny_run(Compile(cache_dir=tmp_path / "file" / "cache"), length=1)


def test_the_default_blocks_need_an_nn_modulelist_in_the_model(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError, match=r"compile\.blocks: the model has no nn\.ModuleList"):
        tiny_run(aot(scope="blocks"), length=1)


def test_the_compiled_blocks_are_those_that_the_patterns_select(tiny_run: TinyRun) -> None:
    run = tiny_run(aot(scope="blocks", blocks=["head"]), Build(), length=1)
    replaced = [name for name, module in run.model.named_modules() if "forward" in vars(module)]
    assert replaced == ["head"]


def test_a_second_instance_is_refused() -> None:
    tables = {"plugins": ["compile", "more"], "run": {"length": 1}, "more": {"plugin": "compile"}}
    with pytest.raises(SettingsError, match=r"compile_model: compile .* and more .* both answer"):
        compose(tables)


@plugin
class Reused:
    """Overwrites the first gradients of a window in its second micro-batch, as CUDA graphs do.

    Only on a GPU the compiler itself does it: graphs of a CPU do not exist.
    """

    def __attrs_post_init__(self) -> None:
        self.outputs: list[Tensor] = []

    @hookimpl
    def backward(self, run: Run, loss: Tensor) -> None:
        for tensor in self.outputs:
            tensor.fill_(torch.nan)
        first = all(parameter.grad is None for parameter in run.parameters)
        loss.backward()
        grads = [p.grad for p in run.parameters if p.grad is not None]
        self.outputs = grads if first else []


@pytest.mark.parametrize("microbatches", [1, 3])
def test_gradients_of_a_window_survive_the_reuse_of_the_graphs_memory(
    tiny_run: TinyRun, tmp_path: Path, microbatches: int
) -> None:
    table = {"accumulate": {"microbatches": microbatches}}
    runs = [
        tiny_run("accumulate", TinyModel(), *more, settings=table, run_dir=tmp_path / str(number))
        for number, more in enumerate(([], [graphs(), Reused()]))
    ]
    for mine, theirs in zip(*(weights(run).values() for run in runs), strict=True):
        torch.testing.assert_close(mine, theirs)


def graphs() -> Compile:
    """Return a plugin that treats the result of another compiler like that of CUDA graphs."""
    made = Compile(mode="reduce-overhead")
    made.backend, made.fullgraph = "aot_eager", True
    return made


def test_no_copy_of_a_gradient_outlives_its_window(tiny_run: TinyRun) -> None:
    @plugin
    class Look:
        """Counts the gradients of the window before that are still in memory."""

        def __attrs_post_init__(self) -> None:
            self.references: list[Any] = []
            self.alive: list[int] = []

        @hookimpl
        def optimizer_step(self, run: Run) -> None:
            run.optimizer.step()
            self.references = [weakref.ref(p.grad) for p in run.parameters]

        @hookimpl
        def on_step_start(self) -> None:
            self.alive.append(sum(reference() is not None for reference in self.references))

    look = Look()
    tiny_run("accumulate", graphs(), look, settings={"accumulate": {"microbatches": 2}})
    assert look.alive == [0, 0, 0, 0]


def test_a_loss_survives_the_next_call_of_a_forward_that_reuses_its_memory(
    tiny_run: TinyRun,
) -> None:
    run = tiny_run(length=1)
    memory = torch.zeros(())
    settings = Compile(mode="reduce-overhead")
    forward = CompiledForward(run, memory.fill_, settings, "compile")
    forward.compiled = forward.original
    first, second = forward(1.0), forward(2.0)
    assert (float(first), float(second)) == (1.0, 2.0)


def test_graphs_need_a_model_that_returns_one_tensor(tiny_run: TinyRun) -> None:
    run = tiny_run(length=1)
    forward = CompiledForward(run, lambda: (1, 2), Compile(mode="reduce-overhead"), "compile: Net")
    forward.compiled = forward.original
    with pytest.raises(PluginError, match="compile: Net with mode 'reduce-overhead'.* tuple"):
        forward()


def test_other_modes_copy_nothing_and_have_no_hook_in_a_microbatch() -> None:
    assert Compile().train_microbatch is None
    assert Compile(mode="reduce-overhead").train_microbatch is not None
