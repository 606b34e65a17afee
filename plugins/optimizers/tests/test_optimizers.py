"""The optimizers are PyTorch's, to the last bit; the groups are what the settings say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from fundamentallm import Run, SettingsError, compose, hookimpl, plugin, train
from fundamentallm.testing import PluginContract, TinyRun, assert_same_weights, compose_tiny
from fundamentallm_optimizers import SGD, Adafactor, Adam, AdamW, Group, Muon, MuonAdamW
from fundamentallm_optimizers.combined import CombinedOptimizer


class Steps(Protocol):
    def step(self) -> Any: ...


Make = Callable[[dict[str, nn.Parameter]], Steps]


class TestAdamWContract(PluginContract):
    plugin = AdamW


class TestAdamContract(PluginContract):
    plugin = Adam


class TestSGDContract(PluginContract):
    plugin = SGD
    needs = {"lr": 0.01}


class TestMuonContract(PluginContract):
    plugin = Muon


class TestAdafactorContract(PluginContract):
    plugin = Adafactor


@plugin
class Shadow:
    """Trains a copy of the model with an optimizer of plain PyTorch on the same gradients."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self.steps = 0

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self.model = copy.deepcopy(run.model)
        self.optimizer = self.make(dict(self.model.named_parameters()))

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        pairs = list(zip(self.model.parameters(), run.model.parameters(), strict=True))
        for mine, theirs in pairs:
            mine.grad = None if theirs.grad is None else theirs.grad.clone()
        self.optimizer.step()
        assert all(mine.equal(theirs) for mine, theirs in pairs)
        self.steps += 1


def by_dimension(named: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]


class ByHand:
    """Optimizers of PyTorch that are stepped one by one."""

    def __init__(self, *optimizers: optim.Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for one in self.optimizers:
            one.step()


def muon(named: dict[str, nn.Parameter]) -> ByHand:
    matrices = [p for p in named.values() if p.ndim == 2]
    others = [p for p in named.values() if p.ndim != 2]
    return ByHand(
        optim.Muon(matrices, 6e-4, 0.1, adjust_lr_fn="match_rms_adamw"),
        optim.AdamW(others, 6e-4, (0.9, 0.95), weight_decay=0.0, fused=True),
    )


def muon_in_another_way(named: dict[str, nn.Parameter]) -> ByHand:
    return ByHand(
        optim.Muon(
            [named["hidden.weight"]],
            0.02,
            0.3,
            momentum=0.9,
            nesterov=False,
            ns_steps=3,
            eps=1e-6,
            adjust_lr_fn="original",
        ),
        optim.AdamW(
            [
                {"params": [named["hidden.bias"]], "weight_decay": 0.05},
                {
                    "params": [named["out.weight"], named["out.bias"]],
                    "lr": 0.0015,
                    "weight_decay": 0.7,
                },
            ],
            0.003,
            (0.8, 0.99),
            1e-6,
        ),
    )


SAME: dict[str, tuple[Callable[..., object], dict[str, Any], Make]] = {
    "adamw as it is": (
        AdamW,
        {},
        lambda named: optim.AdamW(by_dimension(named, 0.1), 6e-4, (0.9, 0.95), 1e-8, fused=True),
    ),
    "adamw with everything else": (
        AdamW,
        {
            "lr": 0.01,
            "beta1": 0.8,
            "beta2": 0.99,
            "eps": 1e-6,
            "weight_decay": 0.3,
            "decay": "all",
            "amsgrad": True,
            "fused": False,
        },
        lambda named: optim.AdamW(
            named.values(), 0.01, (0.8, 0.99), 1e-6, weight_decay=0.3, amsgrad=True
        ),
    ),
    "adam as it is": (Adam, {}, lambda named: optim.Adam(named.values(), fused=True)),
    "adam with everything else": (
        Adam,
        {
            "lr": 0.01,
            "beta1": 0.8,
            "beta2": 0.99,
            "eps": 1e-6,
            "weight_decay": 0.3,
            "amsgrad": True,
            "fused": False,
        },
        lambda named: optim.Adam(by_dimension(named, 0.3), 0.01, (0.8, 0.99), 1e-6, amsgrad=True),
    ),
    "sgd as it is": (SGD, {"lr": 0.1}, lambda named: optim.SGD(named.values(), 0.1, fused=True)),
    "sgd with nesterov momentum": (
        SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "decay": "all"},
        lambda named: optim.SGD(named.values(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "sgd with fused momentum": (
        SGD,
        {"lr": 0.1, "momentum": 0.9, "fused": True},
        lambda named: optim.SGD(named.values(), 0.1, momentum=0.9, fused=True),
    ),
    "sgd with dampening": (
        SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "fused": False},
        lambda named: optim.SGD(by_dimension(named, 0.1), 0.1, momentum=0.9, dampening=0.5),
    ),
    "groups of their own": (
        AdamW,
        {
            "lr": 0.01,
            "groups": [
                Group(pattern="out.*", lr_scale=0.5, weight_decay=0.2),
                Group(pattern="*.bias", lr=0.3),
            ],
        },
        lambda named: optim.AdamW(
            [
                {"params": [named["hidden.weight"]], "lr": 0.01, "weight_decay": 0.1},
                {
                    "params": [named["out.weight"], named["out.bias"]],
                    "lr": 0.005,
                    "weight_decay": 0.2,
                },
                {"params": [named["hidden.bias"]], "lr": 0.3, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
        ),
    ),
    "muon as it is": (Muon, {}, muon),
    "muon with everything else": (
        Muon,
        {
            "lr": 0.02,
            "momentum": 0.9,
            "nesterov": False,
            "ns_steps": 3,
            "eps": 1e-6,
            "adjust_lr_fn": "original",
            "weight_decay": 0.3,
            "decay": "all",
            "fused": False,
            "matrices": ["hidden.*"],
            "adamw": MuonAdamW(lr=0.003, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.05),
            "groups": [Group(pattern="out.*", lr_scale=0.5, weight_decay=0.7)],
        },
        muon_in_another_way,
    ),
    "adafactor as it is": (Adafactor, {}, lambda named: optim.Adafactor(named.values())),
    "adafactor with everything else": (
        Adafactor,
        {
            "lr": 0.05,
            "beta2_decay": -0.5,
            "eps1": 1e-6,
            "eps2": 1e-2,
            "clip_threshold": 2.0,
            "weight_decay": 0.3,
            "foreach": True,
        },
        lambda named: optim.Adafactor(
            by_dimension(named, 0.3), 0.05, -0.5, (1e-6, 1e-2), 2.0, foreach=True
        ),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_updates_equal_those_of_plain_torch_bit_by_bit(tiny_run: TinyRun, case: str) -> None:
    cls, chosen, make = SAME[case]
    shadow = Shadow(make)
    tiny_run(cls(**chosen), shadow, length=6)
    assert shadow.steps == 6


@plugin
class Resume:
    """Records the snapshot of step 4; another run may begin with it."""

    def __init__(self, begin: dict[str, Any] | None = None) -> None:
        self.begin = begin
        self.kept: dict[str, Any] = {}

    @hookimpl
    def read_checkpoint(self) -> dict[str, Any] | None:
        return self.begin

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if run.progress.step == 4:
            self.kept = copy.deepcopy(run.snapshot())


@pytest.mark.parametrize("case", SAME)
def test_a_resumed_run_ends_with_the_same_bits(
    tiny_run: TinyRun, tmp_path: Path, case: str
) -> None:
    cls, chosen, _ = SAME[case]
    whole = Resume()
    uninterrupted = tiny_run(cls(**chosen), whole, length=8, run_dir=tmp_path / "one")
    resume = Resume(whole.kept)
    resumed = tiny_run(cls(**chosen), resume, length=8, run_dir=tmp_path / "other")
    assert resumed.history[0]["step"] > 4
    assert_same_weights(resumed, uninterrupted)


class Net(nn.Module):
    """A model with a shared matrix, a norm, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(requires_grad=False)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden).relu()
        out = self.head(self.norm(self.frozen(hidden)))
        return nn.functional.mse_loss(out.mean(1, keepdim=True), targets)


def model(make: Callable[[], nn.Module]) -> object:
    @plugin
    class OwnModel:
        """Builds the model of a test."""

        @hookimpl
        def build_model(self) -> nn.Module:
            return make()

    return OwnModel()


def named_groups(run: Run) -> Iterator[tuple[list[str], float, float]]:
    names = {id(p): name for name, p in run.model.named_parameters()}
    for group in run.optimizer.param_groups:
        yield [names[id(p)] for p in group["params"]], group["lr"], group["weight_decay"]


def test_only_matrices_are_decayed_and_frozen_parameters_are_included(tiny_run: TinyRun) -> None:
    run = tiny_run(model(Net), AdamW(lr=1e-3), length=1)
    assert list(named_groups(run)) == [
        (["embed.weight", "blocks.0.weight", "blocks.1.weight", "frozen.weight"], 1e-3, 0.1),
        (["blocks.0.bias", "blocks.1.bias", "norm.weight", "norm.bias", "frozen.bias"], 1e-3, 0.0),
    ]


EACH: dict[str, Callable[[], object]] = {
    "adamw": AdamW,
    "adamw, not fused": lambda: AdamW(fused=False),
    "adam": Adam,
    "sgd": lambda: SGD(lr=0.1, momentum=0.9, weight_decay=0.1),
    "muon": Muon,
    "adafactor": lambda: Adafactor(weight_decay=0.1),
}


@plugin
class Unfreeze:
    """Unfreezes the frozen layer before step 4, after checking that it has not changed."""

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self.initial = [p.detach().clone() for p in run.model.frozen.parameters()]

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        if run.progress.step == 3:
            layer = list(run.model.frozen.parameters())
            assert set(layer) <= {p for g in run.optimizer.param_groups for p in g["params"]}
            assert set(layer).isdisjoint(p for p, state in run.optimizer.state.items() if state)
            assert all(p.equal(old) for p, old in zip(layer, self.initial, strict=True))
            run.model.requires_grad_(requires_grad=True)


@pytest.mark.parametrize("case", EACH)
def test_frozen_parameters_are_skipped_without_state_until_they_are_unfrozen(
    tiny_run: TinyRun, case: str
) -> None:
    optimizer: Any = EACH[case]()
    optimizer.groups = [Group(pattern="frozen.*", lr=0.05)]
    unfreeze = Unfreeze()
    run = tiny_run(model(Net), optimizer, unfreeze, length=6)
    layer = list(run.model.frozen.parameters())
    assert not any(p.equal(old) for p, old in zip(layer, unfreeze.initial, strict=True))
    assert all(run.optimizer.state[p] for p in layer)


def test_an_unfrozen_parameter_is_trained_as_plain_torch_would_from_then_on(
    tiny_run: TinyRun,
) -> None:
    shadow = Shadow(
        lambda named: optim.AdamW(by_dimension(named, 0.1), 6e-4, (0.9, 0.95), fused=True)
    )
    tiny_run(model(Net), AdamW(), Unfreeze(), shadow, length=6)
    assert shadow.steps == 6


def test_integer_parameters_are_excluded_and_do_not_prevent_fused_kernels(
    tiny_run: TinyRun,
) -> None:
    class Quantized(Net):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.ones(8, dtype=torch.int8)
            self.scale = nn.Parameter(whole, requires_grad=False)

    run = tiny_run(model(Quantized), AdamW(), length=2)
    assert run.optimizer.defaults["fused"] is True
    assert "scale" not in {name for names, _, _ in named_groups(run) for name in names}
    with pytest.raises(SettingsError, match="'scale' matches only integer parameters"):
        tiny_run(model(Quantized), AdamW(groups=[Group(pattern="scale")]), length=2)


def test_groups_follow_the_other_parameters_and_the_first_match_wins(tiny_run: TinyRun) -> None:
    groups = [
        Group(pattern="blocks.0.*", lr_scale=0.5),
        Group(pattern="*.bias", lr=0.5, weight_decay=0.3),
    ]
    run = tiny_run(model(Net), AdamW(lr=1e-3, groups=groups), length=1, log_every=1)
    assert list(named_groups(run)) == [
        (["embed.weight", "blocks.1.weight", "frozen.weight"], 1e-3, 0.1),
        (["norm.weight"], 1e-3, 0.0),
        (["blocks.0.weight"], 5e-4, 0.1),
        (["blocks.0.bias"], 5e-4, 0.0),
        (["blocks.1.bias", "norm.bias", "frozen.bias"], 0.5, 0.3),
    ]
    assert run.history[0]["optim/lr"] == 1e-3


def test_a_shared_parameter_matches_by_any_of_its_names(tiny_run: TinyRun) -> None:
    run = tiny_run(model(Net), Adam(lr=1e-3, groups=[Group(pattern="head.*", lr=0.1)]), length=1)
    assert (["embed.weight"], 0.1, 0.0) in list(named_groups(run))


PATTERNS = ["*", "*.bias", "blocks.*", "blocks.1.*", "norm.*", "*.weight", "head.weight", "e?bed.*"]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from(PATTERNS), max_size=4), st.sampled_from(["matrices", "all"]))
def test_each_parameter_is_in_exactly_one_group_for_any_patterns(
    tmp_path_factory: pytest.TempPathFactory, patterns: list[str], decay: Any
) -> None:
    groups = [Group(pattern=p, lr=float(i + 1)) for i, p in enumerate(patterns)]
    composed = compose_tiny(model(Net), SGD(lr=0.5, decay=decay, groups=groups), length=1)
    every = {n for n, _ in Net().named_parameters(remove_duplicate=False)}
    try:
        run = train(composed, run_dir=tmp_path_factory.mktemp("runs") / "run")
    except SettingsError as error:
        wins = [next((i for i, p in enumerate(patterns) if fnmatchcase(n, p)), -1) for n in every]
        assert all(f"groups.{i}.pattern" in str(error) for i in {*range(len(patterns))} - {*wins})
        return
    found = [name for names, _, _ in named_groups(run) for name in names]
    assert sorted(found) == sorted(every - {"head.weight"})
    for names, lr, _ in named_groups(run):
        for name in names:
            known = (name, "head.weight") if name == "embed.weight" else (name,)
            place = [i for i, p in enumerate(patterns) if any(fnmatchcase(k, p) for k in known)]
            assert lr == (place[0] + 1 if place else 0.5)


def test_every_empty_group_is_reported_with_the_reason(tiny_run: TinyRun) -> None:
    groups = [
        Group(pattern="block.0.*"),
        Group(pattern="blocks.*"),
        Group(pattern="blocks.1.*"),
    ]
    with pytest.raises(SettingsError) as caught:
        tiny_run(model(Net), AdamW(groups=groups), settings={}, length=1)
    missing, shadowed = caught.value.problems
    assert "groups.0.pattern: 'block.0.*' matches no parameter" in missing
    assert "did you mean 'blocks.0.*'?" in missing
    assert "groups.2.pattern: 'blocks.1.*' matches only parameters of earlier groups" in shadowed


def test_a_model_without_trainable_parameters_is_an_error(tiny_run: TinyRun) -> None:
    def frozen() -> nn.Module:
        return Net().requires_grad_(requires_grad=False)

    with pytest.raises(SettingsError, match="the model has no trainable parameter"):
        tiny_run(model(frozen), SGD(lr=0.1), length=1)


class Complex(nn.Module):
    """A model with a parameter that no fused kernel accepts."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(8, 1, dtype=torch.complex64))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss((inputs.to(torch.complex64) @ self.phase).real, targets)


def test_fused_kernels_are_used_only_where_all_parameters_have_them(tiny_run: TinyRun) -> None:
    run = tiny_run(model(Complex), AdamW(), length=1)
    assert run.optimizer.defaults["fused"] is None


def test_demanding_a_fused_kernel_that_does_not_exist_is_an_error(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError, match=r"fused: needs floating point .* phase is .*complex64"):
        tiny_run(model(Complex), AdamW(fused=True), length=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fused_kernels_accept_every_floating_point_type(tiny_run: TinyRun, dtype: Any) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 1).to(dtype)

        def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.mse_loss(self.layer(inputs.to(dtype)).float(), targets)

    for plugin_of in (AdamW(), Adam(), SGD(lr=0.1), SGD(lr=0.1, momentum=0.9, fused=True)):
        run = tiny_run(model(Cast), plugin_of, length=2)
        assert run.optimizer.defaults["fused"] is True
        assert run.outcome == "finished"


@pytest.mark.parametrize(
    ("name", "table", "complaint"),
    [
        ("sgd", {}, "sgd.lr: is missing, and has no default"),
        ("sgd", {"lr": 0.1, "nesterov": True}, "sgd.nesterov: needs a momentum above 0"),
        (
            "sgd",
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "nesterov": True},
            "sgd.dampening: must be 0 with nesterov",
        ),
        ("adamw", {"lr": 0}, "adamw.lr: must be > 0"),
        ("adamw", {"beta2": 1.0}, "adamw.beta2: must be < 1"),
        ("adam", {"weight_decay": -0.1}, "adam.weight_decay: must be >= 0"),
        (
            "adam",
            {"decay": "matrix"},
            "adam.decay: unknown value \"matrix\" (did you mean 'matrices'?)",
        ),
        ("adamw", {"groups": [{"patern": "*"}]}, "adamw.groups.0.patern: unknown setting"),
        (
            "adamw",
            {"groups": [{"pattern": "*", "lr": 1.0, "lr_scale": 1.0}]},
            "adamw.groups.0.lr_scale: set lr or lr_scale, not both",
        ),
    ],
)
def test_wrong_settings_are_reported_before_anything_starts(
    name: str, table: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        compose({"plugins": [name], "run": {"length": 1}, name: table})
    assert any(complaint in problem for problem in caught.value.problems), caught.value.problems


class Words(Net):
    """A model with an embedding, a head, a norm and matrices between them."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.lm_head = nn.Linear(8, 8, bias=False)
        self.head = self.lm_head
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = inputs @ self.embed.weight
        for block in self.blocks:
            hidden = hidden + block(hidden).relu()
        out = self.lm_head(self.norm(hidden))
        return nn.functional.mse_loss(out.mean(1, keepdim=True), targets)


def trained_by(run: Run, part: type[optim.Optimizer]) -> set[str]:
    """Return the names of the parameters that one of the optimizers trains."""
    assert isinstance(run.optimizer, CombinedOptimizer)
    (one,) = [one for one in run.optimizer.parts if type(one) is part]
    names = {id(p): name for name, p in run.model.named_parameters()}
    return {names[id(p)] for group in one.param_groups for p in group["params"]}


@pytest.mark.parametrize("tied", [False, True])
def test_muon_trains_matrices_except_embeddings_and_output_layers(
    tiny_run: TinyRun, tied: bool
) -> None:
    run = tiny_run(model(lambda: Words(tied=tied)), Muon(), length=2)
    matrices = {"blocks.0.weight", "blocks.1.weight", "frozen.weight"}
    assert trained_by(run, optim.Muon) == matrices
    every = {name for name, _ in run.model.named_parameters()}
    assert trained_by(run, optim.AdamW) == every - matrices


def test_patterns_select_the_matrices_of_muon_and_adamw_trains_the_biases(
    tiny_run: TinyRun,
) -> None:
    run = tiny_run(model(Words), Muon(matrices=["blocks.1.*", "embed.*"]), length=2)
    assert trained_by(run, optim.Muon) == {"blocks.1.weight", "embed.weight"}
    assert "blocks.1.bias" in trained_by(run, optim.AdamW)


def test_a_model_of_matrices_only_has_no_adamw(tiny_run: TinyRun) -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 1, bias=False)

        def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.mse_loss(self.layer(inputs), targets)

    assert type(tiny_run(model(Line), Muon(), length=2).optimizer) is optim.Muon


def test_patterns_that_match_no_matrix_are_reported_with_the_reason(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError) as caught:
        tiny_run(model(Words), Muon(matrices=["block.*", "blocks.*", "*.bias"]), length=1)
    missing, flat = caught.value.problems
    assert "muon.matrices.0: 'block.*' matches no parameter" in missing
    assert "muon.matrices.2: '*.bias' matches no parameter of two dimensions" in flat


def test_muon_without_a_matrix_to_train_is_an_error(tiny_run: TinyRun) -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(8))

        def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.mse_loss((inputs * self.gain).sum(1, keepdim=True), targets)

    with pytest.raises(SettingsError, match="muon: the model has no matrix for Muon"):
        tiny_run(model(Line), Muon(), length=1)


def combined() -> CombinedOptimizer:
    torch.manual_seed(1)
    one, other = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    made = CombinedOptimizer([optim.Muon([one], 0.1), optim.AdamW([other], 0.1)])
    for parameter in (one, other):
        parameter.grad = torch.randn_like(parameter)
    made.step()
    return made


def values(optimizer: optim.Optimizer) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


CHANGED: dict[str, Callable[[CombinedOptimizer], Any]] = {
    "as made": lambda one: one,
    "with a state loaded": lambda one: one.load_state_dict(copy.deepcopy(one.state_dict())) or one,
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_combined_optimizer_shares_groups_and_state_with_its_parts(case: str) -> None:
    plain, changed = combined(), CHANGED[case](combined())
    groups = [group for part in changed.parts for group in part.param_groups]
    assert all(a is b for a, b in zip(groups, changed.param_groups, strict=True))
    assert all(part.state is changed.state for part in changed.parts)
    for one in (plain, changed):
        for group in one.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
            group["lr"] = 0.01
        one.step()
    assert all(a.equal(b) for a, b in zip(values(plain), values(changed), strict=True))
    assert len(changed.state) == 2


def test_a_combined_optimizer_accepts_no_later_group() -> None:
    with pytest.raises(TypeError, match="add the group to one of the optimizers"):
        combined().add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_a_combined_optimizer_calls_a_closure_once() -> None:
    calls: list[int] = []
    assert combined().step(lambda: calls.append(1) or 7.0) == 7.0
    assert calls == [1]
