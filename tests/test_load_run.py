"""Loading a run to use it: on another machine, without its data, without what only observed it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from fundamentallm import (
    DataError,
    PluginError,
    SettingsError,
    find_plugins,
    hookimpl,
    load_run,
    plugin,
    train,
)
from fundamentallm.testing import weights

PARTS = '''
from pathlib import Path
from fundamentallm import DataError, Loaded, hookimpl, plugin
from fundamentallm.testing import TinyData, TinyModel, TinyOptimizer

@plugin
class Parts:
    """A tiny model, and data that need a file."""

    corpus: Path
    asks: bool = False

    @hookimpl
    def build_data(self, run):
        if not self.corpus.is_file():
            raise DataError(f"{self.corpus}: no such file")
        return TinyData().build_data(run)

    @hookimpl
    def build_model(self, run):
        if self.asks:
            run.data.vocab_size
        return TinyModel().build_model()

    @hookimpl
    def build_optimizer(self, run):
        return TinyOptimizer().build_optimizer(run)

    @hookimpl
    def on_safe_point(self, run):
        import torch
        torch.save(run.snapshot(), run.folder / f"step-{run.progress.step:08}.pt")

    @hookimpl
    def read_checkpoint(self, run):
        import torch
        wanted = run.wanted_checkpoint or "latest"
        saved = sorted(run.folder.glob("step-*.pt" if wanted == "latest" else f"{wanted}.pt"))
        if not saved:
            return None
        snapshot = torch.load(saved[-1], weights_only=False)
        made = Loaded(saved[-1], snapshot["progress"]["step"], {"val/loss": 1.5}, "abc")
        return snapshot | {"loaded": made}
'''

WATCHES = '''
from fundamentallm import hookimpl, plugin

@plugin
class Watches:
    """Only observes."""

    role = "observer"

    @hookimpl
    def on_log(self, run, metrics): ...
'''


@pytest.fixture
def trained(tmp_path):
    """A run of local plugins, of three steps."""
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "watches.py").write_text(WATCHES)
    (tmp_path / "corpus.txt").write_text("words")
    (tmp_path / "my.toml").write_text(
        'plugins = ["./parts.py", "./watches.py"]\n'
        '[run]\nlength = 3\ndevice = "cpu"\n[parts]\ncorpus = "corpus.txt"\n'
    )
    return train(tmp_path / "my.toml", run_dir=tmp_path / "run")


def change(run, old, new):
    path = run.folder / "settings.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_loaded_run_has_the_weights_and_the_progress_of_its_checkpoint(trained):
    loaded = load_run(trained.folder)
    same = weights(trained)
    assert all(same[name].equal(tensor) for name, tensor in weights(loaded).items())
    assert loaded.progress == trained.progress
    assert (loaded.loaded.folder.name, loaded.loaded.step) == ("step-00000003.pt", 3)
    assert (loaded.loaded.metrics, loaded.loaded.digest) == ({"val/loss": 1.5}, "abc")
    earlier = load_run(trained.folder, at="step-00000002")
    assert (earlier.progress.step, earlier.loaded.step) == (2, 2)
    assert not all(same[name].equal(tensor) for name, tensor in weights(earlier).items())


def test_a_run_is_loaded_without_its_training_data_and_without_an_optimizer(trained, tmp_path):
    (tmp_path / "corpus.txt").unlink()
    loaded = load_run(trained.folder)
    assert not loaded.training
    assert not hasattr(loaded, "optimizer")
    assert loaded.tokenizer is None
    with pytest.raises(DataError, match="corpus.txt: no such file"):
        train(tmp_path / "my.toml", run_dir=trained.folder)


@pytest.mark.parametrize("error", ["ValueError('bad')", "ModuleNotFoundError('No absent')"])
def test_a_run_is_loaded_without_data_whatever_error_their_source_raises(trained, tmp_path, error):
    code = (tmp_path / "parts.py").read_text()
    (tmp_path / "parts.py").write_text(code.replace('DataError(f"{self.corpus}: no', f"{error} #"))
    (tmp_path / "corpus.txt").unlink()
    loaded = load_run(trained.folder)
    assert weights(loaded).keys() == weights(trained).keys()
    with pytest.raises(DataError, match="run.data.batches is needed: ") as caught:
        loaded.data.batches(loaded.progress)
    assert str(caught.value).endswith(error)
    with pytest.raises(PluginError, match="'parts'"):
        load_run(trained.folder, train=True)


def test_the_error_for_missing_data_names_what_the_model_needs_and_the_reason(trained, tmp_path):
    change(trained, "asks = false", "asks = true")
    (tmp_path / "corpus.txt").unlink()
    with pytest.raises(DataError, match=r"run.data.vocab_size is needed: .*corpus.txt: no such"):
        load_run(trained.folder)


def test_a_run_that_is_loaded_to_be_trained_has_its_optimizer_state(trained, tmp_path):
    loaded = load_run(trained.folder, train=True)
    before, after = (run.optimizer.state_dict()["state"] for run in (trained, loaded))
    assert before.keys() == after.keys()
    for number, state in before.items():
        assert state["exp_avg"].equal(after[number]["exp_avg"])
    assert loaded.training
    (tmp_path / "corpus.txt").unlink()
    with pytest.raises(DataError):
        load_run(trained.folder, train=True)


def missing_device():
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return next(name for name, has in there.items() if not has)


def test_a_recorded_device_that_is_missing_is_replaced_with_a_line(trained, caplog):
    missing = missing_device()
    change(trained, 'device = "cpu"', f'device = "{missing}"')
    assert load_run(trained.folder).device != missing
    assert f"run.device: there is no '{missing}' device here; using another" in caplog.text
    with pytest.raises(SettingsError, match=f"there is no '{missing}' device"):
        load_run(trained.folder, train=True)


def test_loading_on_a_missing_device_is_an_error(trained):
    assert load_run(trained.folder, device="cpu").device == "cpu"
    missing = missing_device()
    for asked in ({"device": missing}, {"overrides": [f"run.device={missing}"]}):
        with pytest.raises(SettingsError, match=f"there is no '{missing}' device"):
            load_run(trained.folder, **asked)
    with pytest.raises(SettingsError, match="there is no 'abacus' device"):
        load_run(trained.folder, device="abacus")


def test_a_plugin_that_only_observes_and_is_gone_is_left_out_with_a_warning(
    trained, tmp_path, caplog
):
    (tmp_path / "watches.py").unlink()
    assert list(load_run(trained.folder).plugins) == ["parts"]
    (said,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert said == "plugin 'watches' is not installed; it only observes and is left out"
    with pytest.raises(SettingsError, match="watches"):
        load_run(trained.folder, train=True)


def test_without_recorded_roles_a_first_party_plugin_that_only_observes_is_left_out(
    trained, tmp_path, monkeypatch, caplog
):
    change(trained, f'"{tmp_path}/watches.py"', '"tensorboard"')
    change(trained, "[watches]", "[tensorboard]")
    record = trained.folder / "environment.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps({name: fact for name, fact in facts.items() if name != "roles"}))
    found = {name: one for name, one in find_plugins().items() if name != "tensorboard"}
    monkeypatch.setattr("fundamentallm.launch.find_plugins", lambda: found)
    assert list(load_run(trained.folder).plugins) == ["parts"]
    assert "plugin 'tensorboard' is not installed; it only observes and is left out" in caplog.text


def test_another_plugin_that_is_gone_is_an_error(trained, tmp_path):
    (tmp_path / "parts.py").unlink()
    with pytest.raises(SettingsError, match="parts"):
        load_run(trained.folder)


def test_settings_and_plugins_of_a_loaded_run_can_be_changed(trained, tmp_path):
    shutil.copy(tmp_path / "watches.py", tmp_path / "watches2.py")
    loaded = load_run(
        trained.folder,
        overrides=["run.seed=5"],
        add=[str(tmp_path / "watches2.py")],
        remove=["watches"],
    )
    assert loaded.settings.seed == 5
    assert list(loaded.plugins) == ["parts", "watches2"]


def test_a_folder_that_is_no_run_cannot_be_loaded(tmp_path):
    with pytest.raises(SettingsError, match="is not a run folder"):
        load_run(tmp_path)
    assert list(Path(tmp_path).iterdir()) == []


def test_nothing_is_written_while_a_run_is_loaded(trained):
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    load_run(trained.folder)
    assert {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")} == before


def test_a_plugin_knows_whether_it_is_built_to_be_trained(tiny_run):
    seen = []

    @plugin
    class Asks:
        @hookimpl
        def adapt_model(self, run):
            seen.append((run.training, run.begun))

        @hookimpl
        def on_train_start(self, run):
            seen.append((run.training, run.begun))

    tiny_run(Asks(), length=1)
    assert seen == [(True, False), (True, True)]
