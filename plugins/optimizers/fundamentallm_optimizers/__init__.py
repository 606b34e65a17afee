"""PyTorch's own optimizers, with parameter groups by name."""

from fundamentallm_optimizers.adafactor import Adafactor
from fundamentallm_optimizers.adam import Adam, AdamW
from fundamentallm_optimizers.group import Group
from fundamentallm_optimizers.muon import Muon, MuonAdamW
from fundamentallm_optimizers.sgd import SGD

__all__ = ["SGD", "Adafactor", "Adam", "AdamW", "Group", "Muon", "MuonAdamW"]
