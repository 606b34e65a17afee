"""A merged model has the names of the base and computes the same as the adapted model."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fundamentallm import Run, SettingsError, StorageError, load_run, train
from fundamentallm_lora import Lora
from fundamentallm_lora.cli import lora_merge
from fundamentallm_lora.layer import LoraLinear, add_adapter
from fundamentallm_lora.merge import write_weights

MODEL = '''
import torch
from torch import nn
from fundamentallm import hookimpl, plugin
from fundamentallm.testing import TinySamples

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tied = nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8, bias=False)
        self.twin.weight = self.tied.weight
        self.inner = nn.Linear(8, 8)
        self.again = self.inner
        self.out = nn.Linear(8, 1)

    def forward(self, inputs, targets):
        hidden = self.again(self.inner(self.twin(self.tied(inputs))).relu())
        return nn.functional.mse_loss(self.out(hidden), targets)

@plugin
class Net8:
    """Data, model and optimizer."""

    @hookimpl
    def build_data(self, run): return TinySamples(4, run.device)

    @hookimpl
    def build_model(self): return Net()

    @hookimpl
    def build_optimizer(self, run): return torch.optim.SGD(run.model.parameters(), lr=0.1)
'''


AVERAGE = '''
from contextlib import contextmanager
import torch
from fundamentallm import hookimpl, plugin, state

@plugin
class Middle:
    """Evaluates with the equal average of the trained weights since a step."""

    since: int = 1
    """The step."""
    count: int = state(0)
    mean: dict = state(factory=dict)

    def get_state(self): return {"count": self.count, "mean": self.mean}

    def set_state(self, kept): self.count, self.mean = kept["count"], kept["mean"]

    @hookimpl
    def settle_step(self, run):
        if run.progress.step < self.since: return
        now = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
        mean = self.mean or now
        self.mean = {n: (mean[n] * self.count + now[n]) / (self.count + 1) for n in now}
        self.count += 1

    @hookimpl
    @contextmanager
    def evaluation_weights(self, run):
        own = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        run.model.load_state_dict(self.mean, strict=False)
        yield
        run.model.load_state_dict(own, strict=False)
'''


DOUBLES = '''
import torch
from fundamentallm import hookimpl, plugin

@plugin
class Doubles:
    """Doubles a weight of the finished model."""

    after = ("lora",)

    @hookimpl
    def finish_model(self, run):
        with torch.no_grad():
            run.model.out.weight.mul_(2)
'''


def trained(folder: Path, *more: str, **tables: Any) -> Run:
    (folder / "net8.py").write_text(MODEL)
    (folder / "middle.py").write_text(AVERAGE)
    settings = {
        "plugins": [str(folder / "net8.py"), "lora", "checkpoint", *more],
        "run": {"length": 3, "device": "cpu"},
        "lora": {"rank": 2, "except_for": ["tied", "twin"], "train_also": ["out.bias"]},
        "checkpoint": {"every": 1},
    }
    return train(settings | tables, run_dir=folder / "run")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return trained(tmp_path)


def merge(*words: object) -> str:
    done = CliRunner().invoke(lora_merge, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def losses(model: nn.Module, run: Run) -> torch.Tensor:
    batch = run.data.validation()["val"][0]
    with torch.no_grad():
        return model.eval()(*batch.data)


def plain(run: Run) -> nn.Module:
    return type(run.model)()


def test_the_file_fits_the_model_without_adapters_and_computes_the_same(
    run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "merged.safetensors"
    assert merge(run.folder, out) == f"written: {out}\n"
    with safe_open(out, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    model, found = plain(run), load_file(out)
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert set(missing) == {"twin.weight", "inner.bias", "inner.weight"}
    assert not unexpected
    assert (losses(model, run) - losses(run.model, run)).abs() < 1e-6
    assert not found["again.weight"].equal(run.model.inner.weight)


def test_a_merged_file_can_be_the_base_of_another_run(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    merge(run.folder, out)
    tables = {
        "plugins": [str(tmp_path / "net8.py"), "lora"],
        "run": {"length": 1},
        "lora": {"base": str(out), "except_for": ["tied", "twin"]},
    }
    again = train(tables, run_dir=tmp_path / "again")
    with torch.no_grad():
        for module in again.model.modules():
            if isinstance(module, LoraLinear):
                module.lora_b.zero_()
    assert (losses(again.model, again) - losses(run.model, run)).abs() < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_merged_layer_computes_the_same_as_the_adapted_one(
    dtype: torch.dtype, limit: float
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, dtype=dtype)
    add_adapter(layer, Lora(rank=4, alpha=3.0), torch.Generator())
    assert isinstance(layer, LoraLinear)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(16, 64, dtype=dtype)
    merged = nn.functional.linear(x, layer.merged_weight(), layer.bias)
    assert layer.merged_weight().dtype == dtype
    assert float((merged - layer(x)).detach().abs().max()) < limit
    a, b, weight = (p.detach().double() for p in (layer.lora_a, layer.lora_b, layer.weight))
    assert float((layer.merged_weight().double() - (weight + 3.0 / 4 * b @ a)).abs().max()) < limit


def test_the_option_at_selects_the_checkpoint(run: Run, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("first", "last", "latest")]
    merge(run.folder, outs[0], "--at", "step-00000001")
    merge(run.folder, outs[1], "--at", "step-00000003")
    merge(run.folder, outs[2])
    first, last, latest = (load_file(out)["again.weight"] for out in outs)
    assert not first.equal(last)
    assert last.equal(latest)


def test_the_recorded_settings_may_be_changed_for_the_merge(run: Run, tmp_path: Path) -> None:
    (tmp_path / "doubles.py").write_text(DOUBLES)
    outs = [tmp_path / name for name in ("plain", "alpha", "doubled")]
    merge(run.folder, outs[0])
    merge(run.folder, outs[1], "--set", "lora.alpha=32")
    merge(run.folder, outs[2], "--plugin", str(tmp_path / "doubles.py"))
    plain, scaled, doubled = (load_file(out) for out in outs)
    assert not plain["again.weight"].equal(scaled["again.weight"])
    assert doubled["out.weight"].equal(2 * plain["out.weight"])


def merged_by_hand(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    a, b, weight = (state[f"{name}.{part}"].double() for part in ("lora_a", "lora_b", "weight"))
    return (weight + 16.0 / 2 * b @ a).to(state[f"{name}.weight"].dtype)


@pytest.mark.parametrize("place", [0, 3])
def test_averaged_merges_the_weights_that_the_run_is_validated_with(
    tmp_path: Path, place: int
) -> None:
    names = ["net8.py", "lora", "checkpoint"]
    names.insert(place, "middle.py")
    listed = [str(tmp_path / name) if name.endswith(".py") else name for name in names]
    run = trained(tmp_path, plugins=listed)
    raw = run.model.state_dict()
    mean = raw | run.plugins["middle"].mean
    outs = [tmp_path / "raw", tmp_path / "averaged"]
    merge(run.folder, outs[0])
    merge(run.folder, outs[1], "--averaged")
    for out, state in zip(outs, (raw, mean), strict=True):
        found = load_file(out)
        assert set(found) == {
            "again.bias",
            "again.weight",
            "out.bias",
            "out.weight",
            "tied.bias",
            "tied.weight",
        }
        for name, own in (("again", "inner"), ("out", "out")):
            assert found[f"{name}.bias"].equal(state[f"{own}.bias"])
            by_hand = merged_by_hand(state, own)
            assert torch.allclose(found[f"{name}.weight"], by_hand, rtol=1e-7, atol=1e-9)
    assert not load_file(outs[0])["out.bias"].equal(load_file(outs[1])["out.bias"])
    assert not load_file(outs[0])["again.weight"].equal(load_file(outs[1])["again.weight"])


def test_averaged_without_an_average_is_refused_with_the_list_of_plugins(
    run: Run, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="no averaged weights") as caught:
        merge(run.folder, tmp_path / "out", "--averaged")
    assert "(listed: net8, lora, checkpoint); leave out --averaged" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_averaged_before_the_average_has_begun_is_refused(tmp_path: Path) -> None:
    run = trained(tmp_path, str(tmp_path / "middle.py"), middle={"since": 2})
    with pytest.raises(SettingsError, match="averaged weights of this checkpoint are the trained"):
        merge(run.folder, tmp_path / "out", "--averaged", "--at", "step-00000001")
    assert not (tmp_path / "out").exists()
    merge(run.folder, tmp_path / "out", "--averaged")


def test_merging_changes_no_file_of_the_run(run: Run, tmp_path: Path) -> None:
    def contents() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}

    before = contents()
    merge(run.folder, tmp_path / "merged.safetensors")
    assert contents() == before


def test_an_existing_file_is_replaced_only_with_overwrite(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    out.write_text("mine")
    with pytest.raises(StorageError, match="exists already; --overwrite replaces it"):
        merge(run.folder, out)
    assert out.read_text() == "mine"
    merge(run.folder, out, "--overwrite")
    assert load_file(out)


def test_a_file_that_cannot_be_written_leaves_no_draft(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"missing/out: cannot be written: No such file"):
        merge(run.folder, tmp_path / "missing" / "out")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match="folder: cannot be written: Is a directory"):
        merge(run.folder, tmp_path / "folder", "--overwrite")
    assert sorted(tmp_path.iterdir()) == before


def test_the_file_has_the_permissions_of_other_new_files(run: Run, tmp_path: Path) -> None:
    out, other = tmp_path / "merged.safetensors", tmp_path / "other"
    other.touch()
    write_weights(run.model.state_dict(), out)
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_a_run_without_adapters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net8.py").write_text(MODEL)
    tables = {"plugins": [str(tmp_path / "net8.py"), "checkpoint"], "run": {"length": 1}}
    run = train(tables, run_dir=tmp_path / "run")
    with pytest.raises(SettingsError, match="no adapters: it was trained without 'lora'"):
        merge(run.folder, tmp_path / "out")
    with pytest.raises(SettingsError, match="is not a run folder"):
        merge(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loaded_run_has_the_adapters_of_its_checkpoint(run: Run) -> None:
    assert load_run(run.folder).model.inner.lora_b.equal(run.model.inner.lora_b)
