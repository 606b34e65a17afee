"""The order of the plugin list never decides anything: any shuffle ends in the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fundamentallm import compose, train
from fundamentallm.testing import weights

SETTINGS = Path(__file__).parent.parent / "settings"
LISTED = tomli.loads((SETTINGS / "quickstart.toml").read_text())["plugins"]

# The quickstart's own plugins and settings, on a corner of its text and with a small model.
SMALL = [
    "run.length=12", "run.validate_every=5", "run.log_every=4", "run.device='cpu'",
    "text.max_bytes=100_000", "text.context_length=16", "text.batch_size=4",
    "text.vocab_size=300", "text.validation_batches=3",
    "gpt.num_layers=1", "gpt.num_heads=2", "gpt.d_model=16", "gpt.dropout=0.1",
    "lr_schedule.warmup='3 steps'", "checkpoint.every=5",
    "sample.every=5", "sample.max_tokens=8",
]  # fmt: skip


def finished(plugins: list[str], folder: Path, cache: Path):
    """Train the small quickstart with the plugins in an order; return all that may not differ."""
    tracking = f"mlflow.tracking_uri='sqlite:///{cache}/mlflow.db'"
    composed = compose(
        {**tomli.loads((SETTINGS / "base.toml").read_text()),
         **tomli.loads((SETTINGS / "quickstart.toml").read_text()), "plugins": plugins} | {},
        overrides=[*SMALL, f"text.cache_dir='{cache}/text'"]
        + ([tracking] if "mlflow" in plugins else []),
    )  # fmt: skip
    run = train(composed, run_dir=folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["time"]
    state = run.snapshot()
    names = ("progress", "random", "logged")
    kept = {name: str({**state[name], "seconds": 0, "before": 0}) for name in names}
    return weights(run), rows, kept, str(sorted(state["optimizer"]))


@pytest.fixture(scope="module")
def listed_order(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    plugins = [name for name in LISTED if name != "mlflow"]
    return cache, finished(plugins, tmp_path_factory.mktemp("listed"), cache)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plugins=st.permutations([name for name in LISTED if name != "mlflow"]))
def test_any_shuffle_of_the_quickstart_ends_in_the_same_bits(
    plugins, listed_order, tmp_path_factory
):
    cache, (expected, rows, kept, _) = listed_order
    found, found_rows, found_kept, _ = finished(plugins, tmp_path_factory.mktemp("run"), cache)
    assert all(found[name].equal(expected[name]) for name in expected)
    assert found_rows == rows
    assert found_kept == kept


def test_the_quickstart_with_mlflow_first_or_last_ends_in_the_same_bits(
    listed_order, tmp_path_factory
):
    cache, (expected, rows, _, _) = listed_order
    others = [name for name in LISTED if name != "mlflow"]
    for plugins in (["mlflow", *others], [*reversed(others), "mlflow"]):
        found, found_rows, _, _ = finished(plugins, tmp_path_factory.mktemp("run"), cache)
        assert all(found[name].equal(expected[name]) for name in expected)
        assert found_rows == rows
