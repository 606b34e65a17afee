"""One-line mistakes in what plugins return, and the whole message of each.

Every row is the body of a local plugin in ``mine.py``. The message names the file and the line, the
plugin, the hook, what came and what was expected; the run ends with exit code 7 before its second
step.
"""

from __future__ import annotations

import pytest

from fundamentallm import PluginError, field, hookimpl, plugin, state, train
from fundamentallm.testing import TinySamples, compose_tiny

PRELUDE = """\
import torch
from fundamentallm import Batch, Rejection, hookimpl, plugin, state
from fundamentallm.testing import TinyData, TinyModel, TinyOptimizer, TinySamples

"""
TENSOR = "a tensor of shape {}, float32, {} a graph"
LOSS = "expected the mean loss of the batch as a 0-d tensor"
WRAPPED = ": `answer = yield`, then `return answer`"
A_MODULE = "expected a torch.nn.Module"
IN_VAL = "expected in the validation of 'val' "
PLAIN = "expected a dict of names and plain numbers"
AGAIN = (
    "expected batches that can be read at every validation: a list, or an object whose __iter__"
    " begins again"
)


def body(method: str, wrapper: bool = False) -> str:
    """Return a plugin class with one hook, in the line 8 of its file."""
    name, _, rest = method.partition("(")
    arguments, _, code = rest.partition("): ")
    mark = "@hookimpl(wrapper=True)" if wrapper else "@hookimpl"
    return f"@plugin\nclass Mine:\n    {mark}\n    def {name}(self, {arguments}):\n        {code}\n"


def data(code: str) -> str:
    """Return a data plugin whose source differs from the tiny one in some lines."""
    return (
        "@plugin\nclass Mine(TinyData):\n    @hookimpl\n    def build_data(self, run):\n"
        "        data = super().build_data(run=run)\n        data.__class__ = Samples\n"
        f"        return data\n\nclass Samples(TinySamples):\n    {code}\n"
    )


def batches(changes: str) -> str:
    """Return a data plugin whose batches differ from the tiny ones."""
    return data(
        "def batches(self, progress):\n        for batch in super().batches(progress):\n"
        f"            {changes}\n            yield batch\n"
    )


MISTAKES = {
    "a forward without a return": (
        body("forward(run, batch): run.module(*batch.data)"),
        f"forward returned None; {LOSS}",
    ),
    "a forward that returns a float": (
        body("forward(run, batch): return run.module(*batch.data).sum().item() * 0 + 1.5"),
        f"forward returned the float 1.5; {LOSS}: leave out `.item()`",
    ),
    "a forward that returns a vector": (
        body("forward(run, batch): return run.module(*batch.data).repeat(4)"),
        (
            f"forward returned {TENSOR.format((4,), 'with')}; expected a 0-d tensor: take the mean,"
            " `loss.mean()`"
        ),
    ),
    "a forward that returns a loss without a graph": (
        body("forward(run, batch): return run.module(*batch.data).detach()"),
        (
            f"forward returned {TENSOR.format((), 'without')}; expected a loss with a graph: leave out"
            " `.detach()`, `.data` and `torch.no_grad()`"
        ),
    ),
    "a forward that returns whole numbers": (
        body("forward(run, batch): return run.module(*batch.data).long()"),
        (
            "forward returned a tensor of shape (), int64, without a graph; expected a floating-point"
            " tensor"
        ),
    ),
    "a forward that returns nothing in a validation": (
        body(
            "forward(run, batch): return run.module(*batch.data) if run.phase == 'train' else None"
        ),
        f"forward returned None; {IN_VAL}the mean loss of the batch as a 0-d tensor",
    ),
    "a forward that returns a float in a validation": (
        body(
            "forward(run, batch): return run.module(*batch.data) if run.phase == 'train' else 1.5"
        ),
        (
            f"forward returned the float 1.5; {IN_VAL}the mean loss of the batch as a 0-d tensor:"
            " leave out `.item()`"
        ),
    ),
    "a forward that returns a vector in a validation": (
        body(
            "forward(run, batch):"
            " return run.module(*batch.data).repeat(1 if run.phase == 'train' else 2).squeeze()"
        ),
        (
            f"forward returned {TENSOR.format((2,), 'without')}; {IN_VAL}a 0-d tensor: take the mean,"
            " `loss.mean()`"
        ),
    ),
    "a wrapper of forward that forgets to return in a validation": (
        body(
            "forward(run): loss = yield; return loss if run.phase == 'train' else None",
            wrapper=True,
        ),
        (
            "its wrapper of forward returned None;"
            f" {IN_VAL}the mean loss of the batch as a 0-d tensor{WRAPPED}"
        ),
    ),
    "a model that returns several values": (
        (
            "@plugin\nclass Mine(TinyModel):\n    @hookimpl\n    def build_model(self, run):\n"
            "        model = super().build_model()\n        model.__class__ = Two\n"
            "        return model\n\nclass Two(type(TinyModel().build_model())):\n"
            "    def forward(self, *data):\n        return super().forward(*data), 0\n"
        ),
        f"its model returned a tuple to forward; {LOSS}",
    ),
    "a wrapper of forward that forgets to return": (
        body("forward(run): yield", wrapper=True),
        f"its wrapper of forward returned None; {LOSS}{WRAPPED}",
    ),
    "a wrapper of collect_batches that forgets to return": (
        body("collect_batches(run): yield", wrapper=True),
        (
            "its wrapper of collect_batches returned None; expected a list of Batch, this step's"
            f" micro-batches{WRAPPED}"
        ),
    ),
    "a wrapper of validate that forgets to return": (
        body("validate(run): yield", wrapper=True),
        (
            "its wrapper of validate returned None; expected a dict of metrics, such as"
            f" {{'val/loss': 2.5}}{WRAPPED}"
        ),
    ),
    "a wrapper of build_model that forgets to return": (
        body("build_model(run): yield", wrapper=True),
        f"its wrapper of build_model returned None; {A_MODULE}{WRAPPED}",
    ),
    "a data source without a fingerprint": (
        (
            "@plugin\nclass Mine:\n    @hookimpl\n    def build_data(self, run):\n"
            "        return Samples()\n\nclass Samples:\n    epoch_samples = None\n"
            "    def batches(self, progress): ...\n    def validation(self): return {}\n"
        ),
        (
            "build_data returned a Samples; expected a data source; it has no fingerprint (see"
            " fundamentallm.Data)"
        ),
    ),
    "a data source that lacks methods": (
        body("build_data(run): return []"),
        (
            "build_data returned a list; expected a data source; it has no batches(), validation(),"
            " epoch_samples, fingerprint (see fundamentallm.Data)"
        ),
    ),
    "a fingerprint that is no text": (
        data("fingerprint = 5"),
        (
            "build_data returned a Samples; expected a data source whose fingerprint is a str; it is"
            " the int 5"
        ),
    ),
    "a batches() without a yield": (
        data("def batches(self, progress): ..."),
        "batches() returned None; expected an iterator of Batch: does it `yield`?",
    ),
    "a stream of tuples in place of Batch": (
        batches("batch = batch.data"),
        "batches() yielded a tuple; expected a Batch(data=..., weight=..., samples=..., tokens=...)",
    ),
    "a bare tensor as the data of a batch": (
        batches("batch.data = batch.data[0]"),
        (
            "batches() yielded a Batch whose data is a tensor of shape (4, 8), float32, without a graph;"
            " expected a tuple or dict of tensors, since the model is called as run.module(*data)"
        ),
    ),
    "tensors on another device": (
        batches("batch.data = tuple(t.to('meta') for t in batch.data)"),
        (
            "batches() yielded a Batch whose data is on meta; expected tensors on run.device, which is"
            " 'cpu'"
        ),
    ),
    "a weight below 0": (
        batches("batch.weight = -4"),
        (
            "batches() yielded a Batch whose weight is the int -4; expected the number of its targets,"
            " a finite number from 0 on"
        ),
    ),
    "a weight that is a tensor": (
        batches("batch.weight = torch.tensor(4.0)"),
        (
            "batches() yielded a Batch whose weight is a tensor of shape (), float32, without a graph;"
            " expected the number of its targets, a finite number from 0 on"
        ),
    ),
    "a weight of numpy": (
        batches("import numpy; batch.weight = numpy.int64(4)"),
        (
            "batches() yielded a Batch whose weight is the int64 4 (write `int(...)`); expected the"
            " number of its targets, a finite number from 0 on"
        ),
    ),
    "samples of numpy": (
        batches("import numpy; batch.samples = numpy.int64(4)"),
        (
            "batches() yielded a Batch whose samples is the int64 4 (write `int(...)`); expected an int"
            " from 0 on"
        ),
    ),
    "a stream whose second item is no Batch": (
        batches("batch = batch.data if progress.step else batch"),
        "batches() yielded a tuple; expected a Batch(data=..., weight=..., samples=..., tokens=...)",
    ),
    "a stream that ends": (
        data(
            "def batches(self, progress):\n        for _, batch in zip(range(1),"
            " super().batches(progress)):\n            yield batch\n"
        ),
        (
            "the data source ended after 1 micro-batches; `batches` must go on, for example"
            " `while True:`"
        ),
    ),
    "a validation that is no mapping": (
        data("def validation(self): return []"),
        (
            "validation() returned a list; expected a mapping of splits, such as {'val': batches}; {}"
            " if there is none"
        ),
    ),
    "a validation split that can be read once only": (
        data("def validation(self): return {'val': iter(super().validation()['val'])}"),
        f"validation()['val'] is a list_iterator; {AGAIN}",
    ),
    "a validation split that is a generator": (
        data(
            "def validation(self): return {'val': (b for b in super().validation()['val'])}"
        ).replace("super().validation()['val']", "[]"),
        f"validation()['val'] is a generator; {AGAIN}",
    ),
    "a validation split of tuples": (
        data("def validation(self): return {'val': [(1, 2)]}"),
        (
            "validation()['val'] yielded a tuple; expected a Batch(data=..., weight=..., samples=...,"
            " tokens=...)"
        ),
    ),
    "a validation split with the name of training": (
        data("def validation(self): return {'train': []}"),
        "validation() has the split 'train'; expected a name without '/' that is not 'train'",
    ),
    "a build_model that returns a class": (
        body("build_model(run): return torch.nn.Linear"),
        f"build_model returned a type; {A_MODULE}",
    ),
    "a compile_model without a return": (
        body("compile_model(run, model): torch.nn.Sequential(model) and None").replace(
            " and None", "\n        return 0"
        ),
        f"compile_model returned the int 0; {A_MODULE}",
    ),
    "a build_optimizer that returns parameter groups": (
        body("build_optimizer(run): return [{'params': run.parameters}]"),
        "build_optimizer returned a list; expected a torch.optim.Optimizer",
    ),
    "a tokenizer without decode": (
        body("build_tokenizer(run): return type('Words', (), {'vocab_size': 3, 'encode': len})()"),
        (
            "build_tokenizer returned a Words; expected a tokenizer, or None; it has no decode (see"
            " fundamentallm.Tokenizer)"
        ),
    ),
    "a factor that is not finite": (
        body("lr_factor(run): return float('nan')"),
        "lr_factor returned the float nan; expected a finite number",
    ),
    "a factor that is a tensor": (
        body("lr_factor(run): return torch.tensor(0.5)"),
        f"lr_factor returned {TENSOR.format((), 'without')}; expected a finite number",
    ),
    "a factor of numpy": (
        body("lr_factor(run): import numpy; return numpy.float32(0.5)"),
        "lr_factor returned the float32 0.5 (write `float(...)`); expected a finite number",
    ),
    "a factor without a return": (
        body("lr_factor(run): 0.5"),
        "lr_factor returned None; expected a finite number",
    ),
    "a reason in place of a rejection": (
        body("judge_step(run): return 'too large'"),
        (
            "judge_step returned the str 'too large'; expected a Rejection, such as Rejection('other',"
            " 'why'), or None to accept the step"
        ),
    ),
    "a truth value in place of a rejection": (
        body("judge_step(run): return False"),
        (
            "judge_step returned the bool False; expected a Rejection, such as Rejection('other',"
            " 'why'), or None to accept the step"
        ),
    ),
    "a window of weight 0": (
        body("weigh_window(run, window): return 0.0"),
        (
            "weigh_window returned the float 0.0; expected a finite number above 0, the weight of the"
            " whole window"
        ),
    ),
    "a train_microbatch that forgets the loss": (
        body("train_microbatch(run, batch): run.hook.forward(run=run, batch=batch); return 1"),
        (
            "train_microbatch left run.losses without a loss; expected the detached loss of the"
            " micro-batch: `run.losses.append(loss.detach())`"
        ),
    ),
    "a validation that returns a number": (
        body("validate(run): return 1.5"),
        "validate returned the float 1.5; expected a dict of metrics, such as {'val/loss': 2.5}",
    ),
    "a validation that returns tensors": (
        body("validate(run): return {'val/loss': torch.tensor(1.0)}"),
        f"validate returned a dict; {PLAIN}; 'val/loss' is {TENSOR.format((), 'without')}",
    ),
    "a measure of a split that is a number": (
        body("measure_split(split): return 0.5"),
        (
            "measure_split returned the float 0.5; expected a dict of metrics, such as"
            " {'val/loss': 2.5}"
        ),
    ),
    "a measure of a split that is a list of pairs": (
        body("measure_split(split): return [('val/f1', 0.5)]"),
        "measure_split returned a list; expected a dict of metrics, such as {'val/loss': 2.5}",
    ),
    "a measure of a split without a value": (
        body("measure_split(split): return {'val/f1': None}"),
        f"measure_split returned a dict; {PLAIN}; 'val/f1' is None",
    ),
    "a measure of a split that is two values": (
        body("measure_split(split): return {'val/f1': torch.zeros(2)}"),
        (f"measure_split returned a dict; {PLAIN}; 'val/f1' is {TENSOR.format((2,), 'without')}"),
    ),
    "a measure of a split whose name is no text": (
        body("measure_split(split): return {1: 0.5}"),
        f"measure_split returned a dict; {PLAIN}; 1 is the int 1",
    ),
    "a measure of a split that is there already": (
        body("measure_split(split): return {'val/loss': 0.5}"),
        "measure_split: val/loss is there already; take another name",
    ),
    "evaluation weights without contextmanager": (
        body("evaluation_weights(run): return (n for n in [1])"),
        (
            "evaluation_weights returned a generator; expected a context manager: decorate the function"
            " with @contextmanager"
        ),
    ),
    "a checkpoint that is no snapshot": (
        body("read_checkpoint(run): return run.folder"),
        (
            "read_checkpoint returned a PosixPath; expected a snapshot such as run.snapshot() returns,"
            " or None"
        ),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_return_names_file_plugin_hook_what_came_and_what_was_expected(
    mistake, tmp_path, monkeypatch
):
    source, expected = MISTAKES[mistake]
    (tmp_path / "mine.py").write_text(PRELUDE + source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError) as caught:
        train(compose_tiny("./mine.py", length=2, log_every=1), run_dir=tmp_path / "run")
    where = f"{tmp_path / 'mine.py'}:7: plugin 'mine': "
    assert str(caught.value) == where + expected
    assert caught.value.exit_code == 7


@plugin
class Answers:
    """Returns right answers at first, and counts."""

    calls: int = 0

    @hookimpl
    def lr_factor(self):
        self.calls += 1
        return 1.0

    @hookimpl
    def judge_step(self, run):
        return "too late" if run.progress.step == 2 else None


def test_a_wrong_rejection_is_found_at_whatever_step_it_comes(tiny_run):
    with pytest.raises(PluginError, match=r"plugin 'answers' .*: judge_step returned the str 'too"):
        tiny_run(Answers(), length=4)


def test_after_its_first_call_a_hook_is_called_without_a_check(tiny_run):
    bound = []

    @plugin
    class Looks:
        @hookimpl
        def on_step_start(self, run):
            bound.append({name: getattr(run.hook, name) for name in ("forward", "lr_factor")})

        @hookimpl
        def lr_factor(self):
            return 1.0

    looks = Looks()
    run = tiny_run(looks, length=3, validate_first=True)
    assert all(bound[0][name] is not bound[1][name] for name in bound[0])
    assert bound[1] == bound[2]
    assert bound[1]["lr_factor"].__closure__[0].cell_contents is not None
    assert run.hook.forward is bound[1]["forward"]


@pytest.mark.parametrize("value", [{1, 2}, object(), {1: 2}, {"a": [b""]}, 1j])
def test_a_state_that_no_checkpoint_can_hold_is_found_at_the_first_safe_point(tiny_run, value):
    @plugin
    class Odd:
        seen: object = state(None)

        @hookimpl
        def on_step_end(self):
            self.seen = value

    with pytest.raises(PluginError, match=r"plugin 'odd' .*: the state field 'seen") as caught:
        tiny_run(Odd(), length=9)
    assert str(caught.value).endswith(
        "; expected JSON values and tensors, which a checkpoint can hold"
    )


def test_a_state_of_json_values_and_tensors_is_accepted(tiny_run):
    @plugin
    class Fine:
        seen: object = state(None)

        @hookimpl
        def on_step_end(self, run):
            self.seen = {"a": [1, 2.5, None, "b", (True, {})], "b": run.parameters[0].detach()}

    assert tiny_run(Fine(), length=2).outcome == "finished"


def test_a_get_state_that_returns_no_dict_is_found_at_the_first_safe_point(tiny_run):
    @plugin
    class Odd:
        def get_state(self):
            return [1]

        @hookimpl
        def on_step_end(self): ...

    with pytest.raises(PluginError, match=r"get_state\(\) returned a list; expected JSON values"):
        tiny_run(Odd())


def test_data_that_ends_in_a_later_step_is_blamed_on_the_data_source(tiny_run):
    @plugin
    class Ends:
        @hookimpl
        def build_data(self, run):
            data = TinySamples(4, run.device)
            data.__class__ = FiveBatches
            return data

    with pytest.raises(
        PluginError, match="plugin 'ends' .*: the data source ended after 5 micro-b"
    ):
        tiny_run(Ends(), length=9)


class FiveBatches(TinySamples):
    def batches(self, progress):
        yield from (batch for _, batch in zip(range(5), super().batches(progress), strict=False))


@pytest.mark.parametrize("first", [True, False])
def test_the_loss_of_every_split_is_checked_once(tiny_run, first):
    checked = []

    @plugin
    class Splits:
        @hookimpl
        def build_data(self, run):
            data = TinySamples(4, run.device)
            data.__class__ = TwoSplits
            return data

        @hookimpl
        def on_step_start(self, run):
            checked.append("forward" not in run.checks.shared.unchecked)

    @plugin
    class WrongLater:
        phases: set = state(factory=set)

        @hookimpl
        def forward(self, run, batch):
            again = run.phase in self.phases
            self.phases.add(run.phase)
            loss = run.module(*batch.data)
            return loss if again or run.phase != "second" else loss.item()

        def get_state(self):
            return {}

    with pytest.raises(PluginError, match="'wrong_later' .*in the validation of 'second' the mean"):
        tiny_run(Splits(), WrongLater(), length=3, validate_first=first, validate_every=2)
    assert checked == ([] if first else [False, True])


class TwoSplits(TinySamples):
    def validation(self):
        (batches,) = super().validation().values()
        return {"val": batches, "second": batches}


@plugin
class BindsEarly:
    """Binds the hooks a second time before the first step, as a plugin that traces steps does."""

    bound: object = field(init=False, default=None)

    @hookimpl
    def on_train_start(self, run):
        self.bound = run.bind()


def test_a_hook_without_implementations_is_false_in_all_that_is_bound_after_its_first_call(
    tiny_run,
):
    binds = BindsEarly()
    run = tiny_run(binds)
    # Of two processes, one may use the first and the other the second.
    assert (bool(run.hook.judge_step), bool(binds.bound.judge_step)) == (False, False)
