"""Every feature with every other: whatever is listed, and in whatever order, ends in the same bits."""

from __future__ import annotations

import json
from itertools import count

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fundamentallm import SettingsError, compose, train
from fundamentallm.testing import weights

NEEDED = ["text", "gpt", "adamw"]
OPTIMIZERS = ["adamw", "adam", "sgd", "adafactor", "muon"]

# What can run together on a CPU. Loggers that start a process of their own are left to their suites.
# Compiling takes longer than all the rest: it has a test of its own, with what it wraps.
FEATURES = {
    "accumulate": {"microbatches": 2},
    "activation_checkpointing": {"mode": "full", "every": 2},
    "amp": {"dtype": "bf16"},
    "checkpoint": {"every": 4, "keep_best": 1},
    "console": {},
    "crash_report": {},
    "csv": {},
    "deterministic": {},
    "early_stopping": {"patience": 50},
    "ema": {"decay": 0.9},
    "freeze": {"patterns": ["*embed*"], "unfreeze": {"*embed*": 5}},
    "gc": {},
    "grad_clip": {"max_norm": 0.5},
    "grad_stats": {},
    "guard": {"spike": "skip", "spike_window": 5},
    "jsonl": {},
    "lora": {"rank": 2},
    "lr_schedule": {"warmup": "3 steps", "shape": "cosine"},
    "profiler": {"start": 3, "steps": 2},
    "progress": {"quiet": True},
    "sample": {"every": 4, "max_tokens": 4},
    "schedules": {"of": {"text": {"batch_size": {"start": 2, "end": 4, "length": "6 steps"}}}},
    "slurm": {},
    "tensorboard": {},
    "throughput": {"sample_every": 2, "table": False},
    "validation": {"perplexity": True},
}
# Other settings of the same, of which one or the other is drawn.
VARIANTS = {
    "amp": {"dtype": "fp16", "init_scale": 2.0**24, "growth_interval": 3},
    "guard": {"nonfinite": "rewind", "oom": "split", "max_rewinds": 100},
}
POISON = '''
from fundamentallm import hookimpl, plugin

@plugin
class Poison:
    """Spoils the losses of some data."""

    @hookimpl(wrapper=True)
    def forward(self, batch):
        loss = yield
        return loss * float("nan") if batch.first % 22 == 6 else loss
'''
MORE = {
    "compile": {"backend": "aot_eager"},
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "swa": {"start": "2 steps", "every": 2},
}
TABLES = {
    "text": {"max_bytes": 60_000, "context_length": 8, "batch_size": 2, "validation_batches": 2},
    "gpt": {"num_layers": 2, "num_heads": 2, "d_model": 16, "dropout": 0.1},
    "run": {"length": 10, "validate_every": 4, "log_every": 3, "device": "cpu"},
}
# Metrics of the speed and memory of a process differ between two runs.
TIMED = ("perf/", "system/")
folders = count()


def ended(plugins: list[str], folder, cache, variants=()):
    """Train with the plugins in an order; return all that may not differ, by name."""
    known = FEATURES | TABLES | MORE | {name: VARIANTS[name] for name in variants}
    tables = {name: table for name, table in known.items() if name in [*plugins, "run"]}
    tables["text"] = {**TABLES["text"], "cache_dir": str(cache)}
    run = train({"plugins": plugins, **tables}, run_dir=folder / str(next(folders)))
    state = run.snapshot()
    kept = {name: state[name] for name in ("progress", "plugins", "logged")}
    for name in ("seconds", "before"):
        del kept["progress"][name]
    kept["plugins"].pop("throughput", None)
    for name in ("measured", "waiting"):  # in steps, samples, tokens and seconds
        if "early_stopping" in plugins:
            del kept["plugins"]["early_stopping"][name][3:]
    kept["logged"] = {n: rows for n, rows in kept["logged"].items() if not n.startswith(TIMED)}
    found = {
        f"{part}.{name}": json.dumps(value, default=lambda tensor: tensor.tolist())
        for part, values in kept.items()
        for name, value in values.items()
    }
    found |= {name: tensor.tolist() for name, tensor in weights(run).items()}
    rows = [{n: v for n, v in row.items() if not n.startswith(TIMED)} for row in run.history]
    return found | {f"row {row['step']}": row for row in rows}


def differing(one: dict, other: dict) -> list[str]:
    """Return the names of what is not the same, bit by bit."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_features_in_any_order_end_in_the_same_bits(data, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "tokens"
    chosen = data.draw(st.sets(st.sampled_from(sorted(FEATURES)), min_size=2))
    optimizer = data.draw(st.sampled_from(OPTIMIZERS))
    if "ema" in chosen and data.draw(st.booleans()):  # only one of them can answer for the weights
        chosen = chosen - {"ema"} | {"swa"}
    variants = data.draw(st.sets(st.sampled_from(sorted(VARIANTS))))
    folder = tmp_path_factory.mktemp("runs")
    plugins = ["text", "gpt", optimizer, *sorted(chosen)]
    if "guard" in chosen:  # else a run of NaN would end with an error
        (folder / "poison.py").write_text(POISON)
        plugins.append(str(folder / "poison.py"))
    shuffled = data.draw(st.permutations(plugins))
    one, other = (ended(list(names), folder, cache, variants) for names in (plugins, shuffled))
    assert differing(one, other) == []


@pytest.mark.parametrize("turn", ["reversed", "rotated"])
def test_all_features_at_once_end_in_the_same_bits_in_another_order(turn, tmp_path):
    plugins = [*NEEDED, *sorted(FEATURES)]
    other = plugins[::-1] if turn == "reversed" else [*plugins[9:], *plugins[:9]]
    one, two = (ended(names, tmp_path, tmp_path / "t") for names in (plugins, other))
    assert differing(one, two) == []


def test_plugins_that_change_and_wrap_the_model_compose_in_any_order(tmp_path):
    wrapping = ["compile", "amp", "activation_checkpointing", "freeze", "lora", "ema", "guard"]
    plugins = [*NEEDED, *wrapping]
    one, two = (ended(names, tmp_path, tmp_path / "t") for names in (plugins, plugins[::-1]))
    assert differing(one, two) == []


@pytest.mark.parametrize(
    ("listed", "hook"),
    [
        (["adamw", "sgd"], "build_optimizer"),
        (["ema", "swa"], "evaluation_weights"),
        (["text", "other_text"], "build_data"),
    ],
)
def test_two_answers_to_one_question_are_an_error_that_names_both(listed, hook):
    plugins = [name for name in NEEDED if name not in listed] + listed
    with pytest.raises(SettingsError) as raised:
        compose(
            {"plugins": plugins, "run": TABLES["run"], "other_text": {"plugin": "text"}}
            if "other_text" in listed
            else {"plugins": plugins, "run": TABLES["run"]}
        )
    (problem,) = [text for text in raised.value.problems if hook in text]
    assert all(name in problem for name in listed)
    assert "both answer" in problem


def test_two_edits_without_a_declared_order_are_an_error_that_names_both(tmp_path):
    (tmp_path / "noise.py").write_text('''
from fundamentallm import hookimpl, plugin

@plugin
class Noise:
    """Adds noise to the gradients."""

    @hookimpl
    def edit_gradients(self, run):
        pass
''')
    plugins = [*NEEDED, "grad_clip", str(tmp_path / "noise.py")]
    with pytest.raises(SettingsError) as raised:
        compose({"plugins": plugins, "run": TABLES["run"], "grad_clip": {"max_norm": 1.0}})
    (problem,) = raised.value.problems
    assert "grad_clip" in problem
    assert "noise" in problem
    assert "before or after" in problem
