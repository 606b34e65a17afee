"""The order of the plugin list never decides anything: any shuffle ends in the same bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random

import pytest
import tomli
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fundamentallm import compose, train
from fundamentallm.host import get_state
from fundamentallm.testing import in_processes, weights

SETTINGS = Path(__file__).parent.parent / "settings"
LISTED = tomli.loads((SETTINGS / "quickstart.toml").read_text())["plugins"]

# The quickstart's own plugins and settings, on a corner of its text and with a small model.
SMALL = [
    "run.length=12",
    "run.validate_every=5",
    "run.log_every=4",
    "run.device='cpu'",
    "text.max_bytes=100_000",
    "text.context_length=16",
    "text.batch_size=4",
    "text.vocab_size=300",
    "text.validation_batches=3",
    "gpt.num_layers=1",
    "gpt.num_heads=2",
    "gpt.d_model=16",
    "gpt.dropout=0.1",
    "lr_schedule.warmup='3 steps'",
    "checkpoint.every=5",
    "sample.every=5",
    "sample.max_tokens=8",
]


def finished(plugins: list[str], folder: Path, cache: Path):
    """Train the small quickstart with the plugins in an order; return all that may not differ."""
    tracking = f"mlflow.tracking_uri='sqlite:///{cache}/mlflow.db'"
    shuffled = folder / "shuffled.toml"
    shuffled.write_text(f"extends = '{SETTINGS / 'quickstart.toml'}'\nplugins = {plugins}\n")
    overrides = [*SMALL, f"text.cache_dir='{cache}/text'"]
    composed = compose(shuffled, overrides=overrides + [tracking] * ("mlflow" in plugins))
    run = train(composed, run_dir=folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["time"]
    state = run.snapshot()
    del state["progress"]["seconds"], state["progress"]["before"]
    kept = {name: repr(state[name]) for name in ("progress", "logged")}
    digest = hashlib.sha256(repr(kept).encode()).hexdigest()
    for name, tensor in sorted(weights(run).items()):
        digest += name + hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return digest, rows


@pytest.fixture(scope="module")
def listed_order(tmp_path_factory):
    """Return a cache, and what the listed order ends in: a digest of all bits, and the rows."""
    cache = tmp_path_factory.mktemp("cache")
    plugins = [name for name in LISTED if name != "mlflow"]
    return cache, finished(plugins, tmp_path_factory.mktemp("listed"), cache)


# A list that differs needs no smaller example, and looking for one takes minutes.
@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(plugins=st.permutations([name for name in LISTED if name != "mlflow"]))
def test_any_shuffle_of_the_quickstart_ends_in_the_same_bits(
    plugins, listed_order, tmp_path_factory
):
    cache, expected = listed_order
    assert finished(plugins, tmp_path_factory.mktemp("run"), cache) == expected


def test_the_quickstart_with_mlflow_first_or_last_ends_in_the_same_bits(
    listed_order, tmp_path_factory
):
    cache, expected = listed_order
    others = [name for name in LISTED if name != "mlflow"]
    for plugins in (["mlflow", *others], [*reversed(others), "mlflow"]):
        assert finished(plugins, tmp_path_factory.mktemp("run"), cache) == expected


PROCESSES = ["guard", "ema", "validation", "early_stopping", "throughput", "csv", "accumulate"]


def in_two_processes(plugins: list[str], folder: Path, cache: Path):
    """Train the small quickstart in two processes; return what may not differ, of each of them."""
    shuffled = folder / "shuffled.toml"
    shuffled.write_text(f"extends = '{SETTINGS / 'quickstart.toml'}'\nplugins = {plugins}\n")
    overrides = [*SMALL, f"text.cache_dir='{cache}/text'", "ddp.timeout=20", "guard.spike='skip'"]
    overrides.append("accumulate.microbatches=2")

    def work(_: int):
        run = train(compose(shuffled, overrides=overrides), run_dir=folder / "run")
        rows = [
            {name: value for name, value in row.items() if not name.startswith(("perf", "system"))}
            for row in run.history
        ]
        # The state of early_stopping has the time of its last measurement.
        names = sorted(run.plugins.keys() - {"early_stopping"})
        states = {name: get_state(run.plugins[name]) for name in names}
        bits = [tensor.numpy().tobytes() for _, tensor in sorted(weights(run).items())]
        return run.outcome, repr(rows), repr(states), hashlib.sha256(b"".join(bits)).hexdigest()

    return in_processes(2, work)


def test_any_shuffle_of_a_long_list_ends_in_the_same_bits_in_two_processes(tmp_path):
    pytest.importorskip("fundamentallm_distributed")
    plugins = [name for name in LISTED if name != "mlflow"] + [*PROCESSES, "ddp"]
    found = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(in_two_processes(plugins, folder, tmp_path))
        Random(number).shuffle(plugins)
    first, second = found[0]
    assert first == second
    assert first[0] == "finished"
    assert found[1:] == found[:1] * 2
