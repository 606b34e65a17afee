"""Which parameters Muon trains, and which AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fundamentallm import SettingsError
from fundamentallm_optimizers.parameters import (
    Own,
    checked,
    grouped,
    matches,
    name_of,
    unmatched,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fundamentallm import Run
    from fundamentallm_optimizers import Muon
    from fundamentallm_optimizers.parameters import Parameters

# What models call their last layer: its rows stand for tokens, as those of an embedding do.
HEADS = ("head.*", "*.head.*", "*_head.*", "output.weight")


def divide_in_two(run: Run, choices: Muon) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups of parameters for Muon and those for AdamW.

    Raises ``SettingsError`` if nothing is trainable, if a group would be empty, if a pattern names
    no matrix, or if there is nothing for Muon.
    """
    parameters = checked(run, choices)
    chosen = _chosen(run, choices, parameters)
    matrices = {p: names for p, names in parameters.items() if p in chosen}
    others = {p: names for p, names in parameters.items() if p not in chosen}
    own = Own(choices.lr, choices.weight_decay, choices.decay)
    lr, decay = choices.adamw.lr, choices.adamw.weight_decay
    adamw = own._replace(
        lr=own.lr if lr is None else lr,
        weight_decay=own.weight_decay if decay is None else decay,
    )
    return grouped(matrices, choices.groups, own), grouped(others, choices.groups, adamw)


def _chosen(run: Run, choices: Muon, parameters: Parameters) -> set[nn.Parameter]:
    flat = {p: n for p, n in parameters.items() if p.ndim == 2 and p.is_floating_point()}
    wanted = choices.matrices
    if wanted is None:
        embeddings = _embeddings(run.model)
        chosen = {
            p
            for p, names in flat.items()
            if p not in embeddings and not any(matches(names, h) for h in HEADS)
        }
    else:
        chosen = {p for p, names in flat.items() if any(matches(names, w) for w in wanted)}
        _check(run, choices, parameters, chosen)
    if not chosen:
        raise SettingsError(
            f"{name_of(run, choices)}: the model has no matrix for Muon; state matrices, or list "
            f"adamw in its place"
        )
    return chosen


def _embeddings(model: nn.Module) -> set[Tensor]:
    """Return what looks tokens up, also where a head shares it."""
    from torch import nn

    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {module.weight for module in model.modules() if isinstance(module, kinds)}


def _check(run: Run, choices: Muon, parameters: Parameters, chosen: set[nn.Parameter]) -> None:
    problems = []
    for index, pattern in enumerate(choices.matrices or ()):
        named = {p for p, names in parameters.items() if matches(names, pattern)}
        if named.isdisjoint(chosen):
            only = f"{pattern!r} matches only parameters of other than two dimensions"
            text = only if named else unmatched(run, pattern)
            problems.append(f"{name_of(run, choices)}.matrices.{index}: {text}")
    if problems:
        raise SettingsError(problems)
