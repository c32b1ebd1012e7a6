"""A longer context by a config alone: rotary positions interpolated, and the length that gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from attnspan.positions import Rope, ntk_theta

KINDS = ("linear", "ntk", "yarn")


@dataclass(frozen=True)
class Stretch:
    """How a model that isn't trained further is made to read `factor` times its trained length.

    Attributes:
        kind: "linear", "ntk" or "yarn", as `positions.Linear`, `NTK` and `Yarn` say. Dynamic NTK
            and LongRoPE, whose angles depend on the length, go into a model's own config.
        factor: at least 1.

    Raises:
        ValueError: either is another.
    """

    kind: str
    factor: float

    def __post_init__(self) -> None:
        good = self.kind in KINDS and math.isfinite(self.factor) and self.factor >= 1
        if not good:
            raise ValueError(_sentence(f"{self.kind}:{self.factor:g}"))

    def __str__(self) -> str:
        return f"{self.kind}:{self.factor:g}"

    def apply(self, config: Any) -> None:
        """Changes a transformers text config that no model was made from yet.

        ``rope_parameters`` gets the type and the factor; NTK, which transformers has no type for,
        is a larger ``rope_theta``. ``max_position_embeddings`` grows by the factor.

        Raises:
            ValueError: the config has no plain rotary positions, the same for all layers, or no
                trained length; it is unchanged.
        """
        try:
            rope = Rope.from_config(config)
        except ValueError as error:
            raise ValueError(f"rope {self} can't be put into the config: {error}") from None
        trained = getattr(config, "max_position_embeddings", None)
        if not trained:
            raise ValueError(f"rope {self} needs the config's max_position_embeddings: it has none")
        if rope.interpolation is not None:
            name = type(rope.interpolation).__name__
            raise ValueError(
                f"rope {self} needs plain rotary positions; the config's are {name} already"
            )
        parameters = {**config.rope_parameters, "rope_theta": rope.theta, "rope_type": "default"}
        if self.kind == "ntk":
            parameters["rope_theta"] = ntk_theta(rope.theta, self.factor, rope.rotary_dim)
        else:
            parameters |= {"rope_type": self.kind, "factor": float(self.factor)}
        if self.kind == "yarn":
            parameters["original_max_position_embeddings"] = trained
        config.rope_parameters = parameters
        config.max_position_embeddings = int(trained * self.factor)


def parse_stretch(text: str) -> Stretch:
    """What `str` of a `Stretch` gives.

    >>> parse_stretch("yarn:4")
    Stretch(kind='yarn', factor=4.0)

    Raises:
        ValueError: it is something else.
    """
    kind, _, factor = text.strip().partition(":")
    try:
        return Stretch(kind, float(factor))
    except ValueError:
        raise ValueError(_sentence(text)) from None


def _sentence(text: str) -> str:
    return (
        f"rope is {text!r}; linear, ntk or yarn with a factor of at least 1, such as yarn:4, is "
        "allowed"
    )
