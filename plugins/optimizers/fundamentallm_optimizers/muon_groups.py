"""Divide a model's parameters between Muon and AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fundamentallm import SettingsError, matches
from fundamentallm_optimizers.param_groups import (
    Defaults,
    checked_parameters,
    make_groups,
    no_match,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fundamentallm import Run
    from fundamentallm_optimizers import Muon
    from fundamentallm_optimizers.param_groups import Parameters

# Usual names of an output layer: its rows stand for tokens, like those of an embedding.
OUTPUT_LAYERS = ("head.*", "*.head.*", "*_head.*", "output.weight")


def muon_and_adamw_groups(
    run: Run, settings: Muon
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups of parameters for Muon and those for AdamW.

    Raises ``SettingsError`` if nothing is trainable, if a group would be empty, if a pattern
    matches no matrix, or if Muon would get no parameter.
    """
    parameters = checked_parameters(run, settings)
    chosen = _matrices(run, settings, parameters)
    matrices = {p: names for p, names in parameters.items() if p in chosen}
    others = {p: names for p, names in parameters.items() if p not in chosen}
    muon = Defaults(settings.lr, settings.weight_decay, settings.decay)
    lr, decay = settings.adamw.lr, settings.adamw.weight_decay
    adamw = muon._replace(
        lr=muon.lr if lr is None else lr,
        weight_decay=muon.weight_decay if decay is None else decay,
    )
    return make_groups(matrices, settings.groups, muon), make_groups(others, settings.groups, adamw)


def _matrices(run: Run, settings: Muon, parameters: Parameters) -> set[nn.Parameter]:
    candidates = {p: n for p, n in parameters.items() if p.ndim == 2 and p.is_floating_point()}
    patterns = settings.matrices
    if patterns is None:
        embeddings = _embeddings(run.model)
        chosen = {
            p
            for p, names in candidates.items()
            if p not in embeddings and not matches(names, OUTPUT_LAYERS)
        }
    else:
        chosen = {p for p, names in candidates.items() if matches(names, patterns)}
        _check_patterns(run, settings, parameters, chosen)
    if not chosen:
        raise SettingsError(
            f"{run.name_of(settings)}: the model has no matrix for Muon; set matrices, or list "
            f"adamw instead"
        )
    return chosen


def _embeddings(model: nn.Module) -> set[Tensor]:
    """Return the weights of embeddings, also those that are tied to an output layer."""
    from torch import nn

    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {module.weight for module in model.modules() if isinstance(module, kinds)}


def _check_patterns(
    run: Run, settings: Muon, parameters: Parameters, chosen: set[nn.Parameter]
) -> None:
    problems: list[str] = []
    for index, pattern in enumerate(settings.matrices or ()):
        matched = {p for p, names in parameters.items() if matches(names, [pattern])}
        if matched.isdisjoint(chosen):
            setting = f"{run.name_of(settings)}.matrices.{index}"
            problems += no_match(run, pattern, setting) or [
                f"{setting}: {pattern!r} matches no parameter of two dimensions"
            ]
    if problems:
        raise SettingsError(problems)
