"""What plugins return, checked at the first call of each hook and never again.

A wrong answer would otherwise fail later, in the code of another plugin. ``Checks`` raises a
``PluginError`` that names file, plugin, hook, what came and what was expected. ``freeze`` calls it
at first calls only (see ``host.dispatch``); data, states and rejections are checked by the loop.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import torch
from torch import Tensor, nn

from fundamentallm.data import Batch, Rejection
from fundamentallm.errors import PluginError
from fundamentallm.host import FirstCall, Provenance, Shared, get_state

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pluggy import HookImpl, PluginManager

    from fundamentallm.run import Run

Given: TypeAlias = Mapping[str, Any]
Expected: TypeAlias = str | None
"""What was expected instead of a wrong answer; None if the answer is right."""
NAMES_SHOWN = 60
"""Characters of a wrong value that a message shows."""
OWNERS = {"forward": "build_model", "collect_batches": "build_data", "validate": "build_data"}
"""Where the core's default answers a hook, its answer comes from what this hook built."""


@attrs.frozen
class Checks:
    """The checks of one run."""

    registry: PluginManager
    brought: Mapping[str, Provenance]
    shared: Shared = attrs.field(factory=Shared)
    phases: set[str] = attrs.field(factory=set)  # of which a loss was checked

    def first_calls(self) -> dict[str, FirstCall]:
        """Return what ``freeze`` has to do at the first call of each hook."""
        calls = {hook: FirstCall(after=self._after(hook, wrong)) for hook, wrong in ANSWERS.items()}
        calls["collect_batches"] = FirstCall(
            before=self._check_stream, after=self._after("collect_batches", _window)
        )
        # At the first safe point, since a saver may write its first checkpoint only hours later.
        calls["on_safe_point"] = FirstCall(before=lambda given: self.states(given["run"]))
        return calls

    def splits(self, splits: Any) -> Mapping[str, Iterable[Batch]]:
        """Return the held-out splits of the data, checked."""
        expected = "a mapping of splits, such as {'val': batches}; {} if there is none"
        if not isinstance(splits, Mapping):
            raise self._of_data("validation() returned", came(splits), expected)
        for name, batches in splits.items():
            # "train" names the phase between validations, and "/" ends the split in a metric's
            # name.
            if not isinstance(name, str) or "/" in name or name == "train":
                text = "a name without '/' that is not 'train'"
                raise self._of_data("validation() has the split", repr(name), text)
            # An iterator would be exhausted after the first validation.
            if isinstance(batches, Iterator) or not hasattr(batches, "__iter__"):
                text = "batches that can be read at every validation: a list, or an object whose "
                text += "__iter__ begins again"
                raise self._of_data(f"validation()[{name!r}] is", came(batches), text)
        return splits

    def stream(self, batches: Any) -> Iterator[Batch]:
        """Return an iterator over what the ``batches`` of the data returned."""
        if not hasattr(batches, "__iter__"):
            expected = "an iterator of Batch: does it `yield`?"
            raise self._of_data("batches() returned", came(batches), expected)
        iterator: Iterator[Batch] = iter(batches)
        return iterator

    def batch(self, batch: Any, device: str, source: str) -> None:
        """Check a micro-batch that ``source``, a method of the data, yielded."""
        if not isinstance(batch, Batch):
            expected = "a Batch(data=..., weight=..., samples=..., tokens=...)"
            raise self._of_data(f"{source} yielded", came(batch), expected)
        for name, value, expected in _batch_problems(batch, device):
            raise self._of_data(f"{source} yielded a Batch whose {name} is", value, expected)
        if self._answerer("forward") is None and not isinstance(batch.data, tuple | list | dict):
            expected = "a tuple or dict of tensors, since the model is called as run.module(*data)"
            text = f"{source} yielded a Batch whose data is"
            raise self._of_data(text, came(batch.data), expected)

    def first_of_split(self, batch: Any, run: Run) -> None:
        """Check the first micro-batch of the current split and, once, the loss of it."""
        self.batch(batch, run.device, f"validation()[{run.phase!r}]")
        if run.phase not in self.phases:
            self.shared.check_next("forward", FirstCall(after=self._after("forward", _loss)))

    def ended(self, microbatches: int) -> PluginError:
        """Return the error for data that ended although the run has not."""
        text = f"the data source ended after {microbatches} micro-batches; `batches` must go on,"
        what = f"{text} for example `while True:`"
        return self._error("build_data", self._answerer("build_data"), what)

    def rejections(self, verdicts: list[Any]) -> list[Rejection]:
        """Return the rejections among what the plugins answered to ``judge_step``."""
        for impl, verdict in self._answered("judge_step", verdicts):
            if (expected := _verdict(verdict, {})) is not None:
                raise self._wrong_answer("judge_step", impl, verdict, expected)
        return [verdict for verdict in verdicts if verdict is not None]

    def measures(self, answers: list[Any], metrics: dict[str, float]) -> None:
        """Add to a split's metrics what the plugins answered to ``measure_split``."""
        for impl, found in self._answered("measure_split", answers):
            plain = found
            if isinstance(found, Mapping):  # 0-d tensors and the numbers of numpy have `item`
                plain = {n: v.item() if getattr(v, "ndim", 1) == 0 else v for n, v in found.items()}
            if plain is not None and (expected := _metrics(plain, {})) is not None:
                raise self._wrong_answer("measure_split", impl, found, expected)
            if twice := sorted(metrics.keys() & (plain or ())):
                what = f"measure_split: {twice[0]} is there already; take another name"
                raise self._error("measure_split", impl, what)
            metrics |= {name: float(value) for name, value in (plain or {}).items()}

    def states(self, run: Run) -> None:
        """Check that a checkpoint can hold the state of every plugin."""
        for name, plugin in run.plugins.items():
            state = get_state(plugin)
            where = "get_state() returned" if hasattr(plugin, "get_state") else "the state is"
            for path, value in _not_saved(state, ()):
                place = f"the state field {'/'.join(path)!r} is" if path else where
                expected = "JSON values and tensors, which a checkpoint can hold"
                what = f"{place} {came(value)}; expected {expected}"
                raise self._said(name, inspect.getfile(type(plugin)), what)

    def _after(self, hook: str, wrong: Callable[[Any, Given], Expected]) -> Any:
        def check(impl: HookImpl, answer: Any, given: Given) -> bool:
            # A wrapper may drop the losses of a step that it rejects.
            skipped = impl.wrapper and hook == "train_microbatch"
            expected = None if skipped else wrong(answer, given)
            if hook == "forward":
                self.phases.add(given["run"].phase)
            if expected is not None:
                raise self._wrong_answer(hook, impl, answer, expected)
            # A validation's loss has no graph, so the check stays until the loss of a step.
            return hook != "forward" or "train" in self.phases

        return check

    def _check_stream(self, given: dict[str, Any]) -> None:
        # Only in this call: the later windows are taken from the plain stream, unchecked.
        given["stream"] = self._checked(given["stream"], given["run"])

    def _checked(self, stream: Iterator[Batch], run: Run) -> Iterator[Batch]:
        count = run.progress.microbatches
        for batch in stream:
            self.batch(batch, run.device, "batches()")
            count += 1
            yield batch
        raise self.ended(count)

    def _wrong_answer(self, hook: str, impl: HookImpl, answer: Any, expected: str) -> PluginError:
        if impl.wrapper:
            what = f"its wrapper of {hook} returned {came(answer)}; expected {expected}"
            if answer is None:
                what += ": `answer = yield`, then `return answer`"
            return self._error(hook, impl, what)
        if impl.plugin_name == "core":
            owner, made = OWNERS.get(hook, ""), {"forward": "its model"}.get(hook, "its data")
            what = f"{made} returned {came(answer)} to {hook}; expected {expected}"
            return self._error(owner, self._answerer(owner), what)
        left = "train_microbatch left run.losses without a loss"
        what = left if hook == "train_microbatch" else f"{hook} returned {came(answer)}"
        return self._error(hook, impl, f"{what}; expected {expected}")

    def _of_data(self, what: str, came: str, expected: str) -> PluginError:
        impl = self._answerer("build_data")
        return self._error("build_data", impl, f"{what} {came}; expected {expected}")

    def _error(self, hook: str, impl: HookImpl | None, what: str) -> PluginError:
        if impl is None:
            return PluginError(f"{hook}: {what}")
        # Behind decorators, whose file and line would not help.
        code = inspect.unwrap(impl.function).__code__
        return self._said(impl.plugin_name, f"{code.co_filename}:{code.co_firstlineno}", what)

    def _said(self, plugin: str, place: str, what: str) -> PluginError:
        brought = self.brought.get(plugin)
        # The message begins with the file of a local plugin already.
        source = "" if brought is None or brought.kind == "file" else f" ({brought})"
        return PluginError(f"{place}: plugin {plugin!r}{source}: {what}")

    def _answerer(self, hook: str) -> HookImpl | None:
        """Return the plugin's implementation that answers an exclusive hook, if one does."""
        found = [i for i in self._impls(hook) if not i.wrapper and i.plugin_name != "core"]
        return found[-1] if found else None

    def _answered(self, hook: str, answers: list[Any]) -> Iterator[tuple[HookImpl, Any]]:
        # pluggy calls the last one registered first, and the answers are in the order of calls.
        impls = [i for i in reversed(self._impls(hook)) if not i.wrapper]
        return zip(impls, answers, strict=True)

    def _impls(self, hook: str) -> list[HookImpl]:
        impls: list[HookImpl] = getattr(self.registry.hook, hook).get_hookimpls()
        return impls


def came(value: Any) -> str:
    """Return how a message names a wrong value."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        graph = "with a graph" if value.requires_grad else "without a graph"
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype)[6:]}, {graph}"
    kind = type(value).__name__
    if isinstance(value, bool | int | float | str):
        return f"the {kind} {repr(value)[:NAMES_SHOWN]}"
    if isinstance(value, Real):  # a number of numpy, say, which JSON cannot hold
        convert = "int" if isinstance(value, Integral) else "float"
        return f"the {kind} {value} (write `{convert}(...)`)"
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def _loss(loss: Any, given: Given) -> Expected:
    phase = given["run"].phase
    where = "" if phase == "train" else f"in the validation of {phase!r} "
    if not isinstance(loss, Tensor):
        hint = ": leave out `.item()`" if isinstance(loss, float) else ""
        return f"{where}the mean loss of the batch as a 0-d tensor{hint}"
    if loss.dim():
        return f"{where}a 0-d tensor: take the mean, `loss.mean()`"
    if not loss.is_floating_point():
        return f"{where}a floating-point tensor"
    if not where and not loss.requires_grad:
        return "a loss with a graph: leave out `.detach()`, `.data` and `torch.no_grad()`"
    return None


def _an_instance(kind: type, name: str) -> Callable[[Any, Given], Expected]:
    def wrong(answer: Any, _: Given) -> Expected:
        return None if isinstance(answer, kind) else name

    return wrong


def _window(window: Any, _: Given) -> Expected:
    if isinstance(window, list) and all(isinstance(batch, Batch) for batch in window):
        return None
    return "a list of Batch, this step's micro-batches"


def _data(data: Any, given: Given) -> Expected:
    # The fingerprint of a loaded run may need the training data, which may be missing.
    training = given["run"].training
    names = ("epoch_samples", *["fingerprint"] * training)
    methods = [
        name for name in ("batches", "validation") if not callable(getattr(data, name, None))
    ]
    missing = [name for name in names if not hasattr(data, name)]
    if methods or missing:
        lacking = ", ".join([*(f"{name}()" for name in methods), *missing])
        return f"a data source; it has no {lacking} (see fundamentallm.Data)"
    if training and not isinstance(data.fingerprint, str):
        return f"a data source whose fingerprint is a str; it is {came(data.fingerprint)}"
    samples = data.epoch_samples
    if samples is not None and (not _is_number(samples) or samples < 1):
        return (
            f"a data source whose epoch_samples is an int from 1 on or None; it is {came(samples)}"
        )
    return None


def _tokenizer(tokenizer: Any, _: Given) -> Expected:
    names = ("vocab_size", "encode", "decode")
    missing = [name for name in names if not hasattr(tokenizer, name)]
    if tokenizer is None or not missing:
        return None
    return f"a tokenizer, or None; it has no {', '.join(missing)} (see fundamentallm.Tokenizer)"


def _snapshot(snapshot: Any, _: Given) -> Expected:
    if snapshot is None or (isinstance(snapshot, Mapping) and "model" in snapshot):
        return None
    return "a snapshot such as run.snapshot() returns, or None"


def _weight(weight: Any, _: Given) -> Expected:
    if _is_number(weight) and math.isfinite(weight) and weight > 0:
        return None
    return "a finite number above 0, the weight of the whole window"


def _factor(factor: Any, _: Given) -> Expected:
    return None if _is_number(factor) and math.isfinite(factor) else "a finite number"


def _microbatch(_: Any, given: Given) -> Expected:
    losses = given["run"].losses
    # With its graph, the loss would keep the activations of its micro-batch in memory.
    if losses and isinstance(losses[-1], Tensor) and not losses[-1].requires_grad:
        return None
    return "the detached loss of the micro-batch: `run.losses.append(loss.detach())`"


def _context(context: Any, _: Given) -> Expected:
    if hasattr(type(context), "__enter__") and hasattr(type(context), "__exit__"):
        return None
    hint = ": decorate the function with @contextmanager" if inspect.isgenerator(context) else ""
    return f"a context manager{hint}"


def _metrics(metrics: Any, _: Given) -> Expected:
    if not isinstance(metrics, dict):
        return "a dict of metrics, such as {'val/loss': 2.5}"
    for name, value in metrics.items():
        if not isinstance(name, str) or not _is_number(value):
            wrong = came(value if isinstance(name, str) else name)
            return f"a dict of names and plain numbers; {name!r} is {wrong}"
    return None


def _verdict(verdict: Any, _: Given) -> Expected:
    if verdict is None or isinstance(verdict, Rejection):
        return None
    return "a Rejection, such as Rejection('other', 'why'), or None to accept the step"


_module = _an_instance(nn.Module, "a torch.nn.Module")
ANSWERS: dict[str, Callable[[Any, Given], Expected]] = {
    "build_data": _data,
    "build_tokenizer": _tokenizer,
    "build_model": _module,
    "checkpoint_activations": _module,
    "compile_model": _module,
    "distribute_model": _module,
    "build_optimizer": _an_instance(torch.optim.Optimizer, "a torch.optim.Optimizer"),
    "read_checkpoint": _snapshot,
    "weigh_window": _weight,
    "train_microbatch": _microbatch,
    "forward": _loss,
    "judge_step": _verdict,
    "lr_factor": _factor,
    "evaluation_weights": _context,
    "validate": _metrics,
    "reduce_metrics": _metrics,
    "stop_agreed": _an_instance(bool, "True or False"),
}
"""Hook -> what was expected instead of its answer, or None if the answer is right."""


def _batch_problems(batch: Batch, device: str) -> Iterator[tuple[str, str, str]]:
    """Yield the name of a field, what came, and what was expected."""
    weight, want = batch.weight, torch.device(device)
    if not _is_number(weight) or not math.isfinite(weight) or weight < 0:
        yield "weight", came(weight), "the number of its targets, a finite number from 0 on"
    for name in ("samples", "tokens", "first"):
        value = getattr(batch, name)
        if not isinstance(value, int) or value < 0:
            yield name, came(value), "an int from 0 on"
    for tensor in _tensors(batch.data):
        # "cuda" without an index accepts the tensors of any GPU.
        if tensor.device.type != want.type or want.index not in (None, tensor.device.index):
            yield "data", f"on {tensor.device}", f"tensors on run.device, which is {device!r}"


def _tensors(data: Any) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, list | tuple | dict):
        for item in data.values() if isinstance(data, dict) else data:
            yield from _tensors(item)


def _not_saved(state: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of what neither JSON nor a file of tensors can hold."""
    # JSON turns every other key into a text, so the restored state would differ.
    is_table = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if is_table or (path and isinstance(state, list | tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, item in items:
            yield from _not_saved(item, (*path, str(key)))
    elif not path or not isinstance(state, bool | int | float | str | Tensor | None):
        yield path, state


def _is_number(value: Any) -> bool:
    # A bool is an int in Python, but as a weight or a metric it is a mistake.
    return isinstance(value, int | float) and not isinstance(value, bool)
