"""Patterns select parameters and modules by name, and a pattern that matches nothing is an error."""

from __future__ import annotations

import pytest
from torch import nn

from fundamentallm import SettingsError, find_blocks, matches, parameter_names, unmatched


class Mixed(nn.Module):
    """Lists inside dicts inside a list, a shared layer, and an embedding tied to a head."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(4, 4)
        self.outer = nn.ModuleList(
            nn.ModuleDict({"list": nn.ModuleList([nn.Linear(4, 4)])}) for _ in range(2)
        )
        self.layers = nn.Sequential(shared, nn.ReLU(), shared)
        self.norms = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


class Stack(nn.Module):
    """A large and a small list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ModuleList([nn.Linear(2, 2)])
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))


def test_blocks_are_the_outermost_modules_that_match_each_once() -> None:
    assert list(find_blocks(Mixed(), ["layers.*"], "it.blocks")) == ["layers.0", "layers.1"]
    assert list(find_blocks(Mixed(), ["*list.0", "layers*"], "it.blocks")) == [
        "outer.0.list.0",
        "outer.1.list.0",
        "layers",
    ]


def test_the_default_blocks_are_the_list_with_the_most_parameters() -> None:
    assert list(find_blocks(Stack(), None, "it.blocks")) == [f"blocks.{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("patterns", "complaint"),
    [
        (
            ["outer"],
            "it.blocks: 'outer' is a container that is never called; name the modules in it: outer.*",
        ),
        (["outer.*"], "it.blocks: 'outer.0' is a container"),
        (["layer.*"], "it.blocks: 'layer.*' matches no module (did you mean 'layers.*'?)"),
        (["q"], "it.blocks: 'q' matches no module (known: outer, outer.*, "),
    ],
)
def test_patterns_that_select_no_block_are_an_error(patterns: list[str], complaint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        find_blocks(Mixed(), patterns, "it.blocks")
    assert complaint in str(caught.value)


def test_a_model_without_a_list_of_modules_has_no_default_blocks() -> None:
    with pytest.raises(SettingsError, match=r"it\.blocks: the model has no nn\.ModuleList"):
        find_blocks(nn.Linear(2, 2), None, "it.blocks")


def test_a_tied_parameter_is_listed_once_with_all_its_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    assert parameter_names(model) == {"embed.weight": ["embed.weight", "head.weight"]}
    assert matches(parameter_names(model)["embed.weight"], ["head.*"])


def test_a_pattern_that_matches_nothing_is_reported_with_the_closest_pattern() -> None:
    names = ["blocks.0.mlp.weight", "blocks.1.mlp.weight"]
    assert unmatched("it", ["block.*.mlp.weight", "blocks.*"], names) == [
        "it: 'block.*.mlp.weight' matches no parameter (did you mean 'blocks.*.mlp.weight'?)"
    ]
