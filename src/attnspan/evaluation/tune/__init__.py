"""Which policy, storage and budgets by layer: chosen on one part of a text, tested on another."""

from attnspan.evaluation.tune.run import PASSAGES, tune
from attnspan.evaluation.tune.space import FAMILIES, STORAGES

__all__ = ["FAMILIES", "PASSAGES", "STORAGES", "tune"]
