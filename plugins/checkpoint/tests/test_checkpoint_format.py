"""What is written comes back exactly, and other programs can read it."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from fundamentallm import StorageError, folder
from fundamentallm_checkpoint.storage import (
    durable_files,
    json_tree,
    manifest,
    safetensors,
    strict_json,
)
from fundamentallm_checkpoint.storage import snapshot as snapshot_files
from fundamentallm_checkpoint.storage.durable_files import FileDigest
from fundamentallm_checkpoint.storage.host_buffer import HostBuffer
from fundamentallm_checkpoint.storage.manifest import Manifest
from fundamentallm_checkpoint.storage.safetensors import WrittenTensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.complex64,
    torch.bool,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def saved(folder: Path, snapshot: dict[str, Any]) -> Manifest:
    """Write a snapshot as an asynchronous save does, and return its manifest."""
    staged = HostBuffer().copy(snapshot_files.pack(snapshot))
    written = snapshot_files.write(folder, staged)
    return Manifest(
        step=1, run="it", created=0.0, settings="", data="", metrics={}, files=written.files
    )


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """Return what makes two tensors the same, NaN payloads included."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().reshape(-1))
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).tolist()


def same(one: Any, other: Any) -> bool:
    """Return whether two trees are the same, bit by bit and type by type."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and bits(one) == bits(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        alike = math.copysign(1, one) == math.copysign(1, other)
        return math.isnan(other) if math.isnan(one) else one == other and alike
    return bool(one == other)


@st.composite
def any_tensor(draw: st.DrawFn) -> Tensor:
    """Draw a tensor of random bytes: any kind, 0-d to 3-d, perhaps empty, perhaps a strange view."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype is torch.bool:
        raw = bytearray(byte % 2 for byte in raw)
    made = torch.frombuffer(raw, dtype=dtype) if size else torch.empty(0, dtype=dtype)
    made = made.reshape(shape)
    changed = draw(st.sampled_from(["as it is", "transposed", "expanded", "strided", "conjugate"]))
    if changed == "transposed":
        return made.permute(tuple(reversed(range(made.dim()))))
    if changed == "expanded":
        return made.expand(2, *shape)
    if changed == "strided" and made.dim():
        return made[::2]
    return made.conj() if changed == "conjugate" and dtype.is_complex else made


names = st.text(st.characters(), min_size=0, max_size=8)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | any_tensor()
)
trees_of = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            names | st.sampled_from(["$tensor", "$float", "$table", "a/b"]), inner, max_size=4
        )
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)
model_names = names.filter(lambda name: name != "__metadata__" and name.isascii())
snapshots = st.fixed_dictionaries(
    {
        "model": st.dictionaries(model_names, any_tensor() | trees_of, max_size=4),
        "optimizer": st.dictionaries(
            model_names, st.dictionaries(model_names, trees_of, max_size=3), max_size=3
        ),
        "plugins": st.dictionaries(names, trees_of, max_size=3),
        "logged": trees_of,
    }
)


@settings(max_examples=40, deadline=None)
@given(snapshots)
def test_any_snapshot_comes_back_exactly(snapshot: dict[str, Any]) -> None:
    with TemporaryDirectory() as name:
        from pathlib import Path

        folder = Path(name)
        manifest = saved(folder, snapshot)
        assert same(snapshot_files.read(folder, manifest), snapshot)


manifests = st.builds(
    Manifest,
    step=st.integers(0, 10**18 - 1),
    run=st.text("0123456789abcdef", min_size=12, max_size=12),
    created=st.floats(0, 1e11),
    settings=st.just(""),
    data=st.text(max_size=9),
    metrics=st.dictionaries(st.text(max_size=9), st.floats(), max_size=4),
    tags=st.lists(st.sampled_from(["best", "final", "signal"]), unique=True).map(tuple),
    contents=st.sampled_from(["all", "model"]),
    finite=st.booleans(),
    files=st.just(
        {
            name: FileDigest(3, hashlib.sha256(b"abc").hexdigest())
            for name in ("model.safetensors", "optimizer.safetensors", "state.json")
        }
    ),
)


@settings(max_examples=80, deadline=None)
@given(manifests)
def test_the_core_reads_from_a_manifest_what_this_plugin_reads(made: Manifest) -> None:
    """There are two readers, one that lists and one that verifies; see decision 0014."""
    with TemporaryDirectory() as name:
        run = pathlib.Path(name)
        home = run / "checkpoints" / manifest.folder_name(made.step)
        home.mkdir(parents=True)
        (home / manifest.NAME).write_bytes(made.to_json())
        for file in made.files:
            (home / file).write_bytes(b"abc")
        read, (listed,) = manifest.read(home), folder.checkpoints(run)
    names = ("step", "run", "created", "tags", "contents", "finite", "data", "size")
    assert [getattr(listed, name) for name in names] == [getattr(read, name) for name in names]
    assert repr(listed.metrics) == repr(read.metrics) == repr(made.metrics)  # NaN is not equal


@settings(max_examples=80, deadline=None)
@given(trees_of)
def test_any_tree_comes_back_exactly_from_strict_json(tree: Any) -> None:
    kept: dict[str, Tensor] = {}
    text = strict_json.dump(json_tree.split(tree, kept))

    def refuse(_: str) -> None:
        raise AssertionError(f"not JSON: {text!r}")

    assert same(json_tree.join(json.loads(text, parse_constant=refuse), kept), tree)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_readable_by_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    safetensors.write(tmp_path / "it", {"odd": tensor[:, :1], "even": tensor.t()})
    found = load_file(tmp_path / "it")
    assert {k: bits(v) for k, v in found.items()} == {
        "odd": bits(tensor[:, :1]),
        "even": bits(tensor.t()),
    }


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    shared = torch.randn(3, 3)
    given = {"out": shared, "embedding": shared, "view": shared.t(), "half": shared[:2]}
    safetensors.write(tmp_path / "it", given)
    with safe_open(tmp_path / "it", "pt") as file:
        assert json.loads(file.metadata()["aliases"]) == {"out": "embedding"}
        assert sorted(file.keys()) == ["embedding", "half", "view"]
    found = safetensors.read(tmp_path / "it")
    assert found["out"] is found["embedding"]
    assert same(found, given)


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    one = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.bool), "c": torch.ones(())}
    first = safetensors.write(tmp_path / "one", one)
    again = safetensors.write(tmp_path / "other", dict(reversed(one.items())))
    assert first == again
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_nan_is_found_in_every_float_dtype(tmp_path: Path) -> None:
    for index, dtype in enumerate(kind for kind in DTYPES if kind.is_floating_point):
        poison = torch.tensor([1.0, float("nan")]).to(dtype)
        tensors_ = {"sound": torch.ones(2, dtype=dtype), "poison": poison}
        written = safetensors.write(tmp_path / str(index), tensors_)
        assert isinstance(written, WrittenTensors)
        assert written.nonfinite == ["poison"], dtype


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.eye(2).to_sparse(), "dense tensors only, not torch.sparse_coo"),
        (torch.empty(2, device="meta"), "dense tensors only, not torch.strided on meta"),
        (torch.zeros(2, dtype=torch.complex128), "cannot store torch.complex128"),
    ],
)
def test_a_tensor_that_the_format_cannot_hold_is_named(
    tensor: Tensor, said: str, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=f"layer.weight: .*{said}"):
        safetensors.write(tmp_path / "it", {"layer.weight": tensor})


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    snapshot = {"model": {"w": torch.ones(2)}, "optimizer": {}, "plugins": torch.ones(2)}
    written = saved(tmp_path, snapshot)
    for name in written.files:
        start = (tmp_path / name).read_bytes()[:16]
        assert start.startswith(b"{") or start[8:9] == b"{", name


def test_optimizer_state_is_kept_by_parameter_name(tmp_path: Path) -> None:
    moments = {"layer.weight": {"exp_avg": torch.ones(2), "step": torch.tensor(3.0), "flag": True}}
    saved(tmp_path, {"model": {}, "optimizer": moments})
    found = load_file(tmp_path / "optimizer.safetensors")
    assert sorted(found) == ["exp_avg/layer.weight", "step/layer.weight"]
    assert json.loads((tmp_path / "state.json").read_bytes())["optimizer"] == {
        "layer.weight": {"flag": True}
    }


def test_tensors_that_were_read_do_not_change_when_the_file_changes(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "it", {"w": torch.ones(1000)})
    found = safetensors.read(tmp_path / "it")
    (tmp_path / "it").write_bytes(bytes((tmp_path / "it").stat().st_size))
    assert bool(found["w"].eq(1).all())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "holds NaN"),
        ('{"a": 1e999}', "holds 1e999"),
        ('{"a": 1, "a": 2}', "has a key twice"),
        ('{"a": "' + "x" * 2000 + '"}', "larger than 1,000 bytes"),
    ],
    ids=["deep", "nan", "huge number", "twice", "long"],
)
def test_json_that_is_not_plain_and_small_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "it").write_text(text)
    limit = 1000 if "x" in text else 10**6
    with pytest.raises(ValueError, match=said):
        strict_json.parse(durable_files.read(tmp_path / "it", limit))
