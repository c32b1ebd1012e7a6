"""Bytes of a model's weights: what is held, and what a decoded token reads."""

from __future__ import annotations

from attnspan.planner.spec import ModelSpec

WEIGHTS = ("bf16", "int8", "int4")
GROUP = 128  # weights that share an fp16 scale
_BITS = {"bf16": 16, "int8": 8, "int4": 4}


def apart(spec: ModelSpec) -> int:
    """Weights that no layer multiplies with: the embedding, the output layer where it is another
    matrix, and what `spec.aside` counts."""
    return spec.vocabulary * spec.hidden * (1 if spec.tied else 2) + spec.aside


def weight_bytes(spec: ModelSpec, kind: str = "bf16") -> int:
    """Bytes of all weights.

    int8 and int4: codes with an fp16 scale for each 128 weights, as GPTQ and AWQ group them
    (https://arxiv.org/abs/2210.17323, https://arxiv.org/abs/2306.00978). Embeddings and the output
    layer stay in bf16; norms and biases, less than a thousandth, are counted with the codes.

    >>> from attnspan.planner.presets import model
    >>> weight_bytes(model("mistral-7b")), weight_bytes(model("mistral-7b"), "int4")
    (14483464192, 4123138112)
    """
    return coded(spec.parameters - apart(spec), kind) + 2 * apart(spec)


def coded(count: float, kind: str) -> int:
    """Bytes of so many weights with their scales.

    Raises:
        ValueError: no such kind.
    """
    if kind not in WEIGHTS:
        raise ValueError(f"weights {kind!r} is not known; allowed are {', '.join(WEIGHTS)}")
    codes = -(-count * _BITS[kind] // 8)
    return int(codes) if kind == "bf16" else int(codes + 2 * -(-count // GROUP))


def distinct(total: int, active: int, tokens: int) -> float:
    """Experts of a layer that some token takes: `total * (1 - (1 - active / total) ** tokens)`.

    It is the expectation where each token takes `active` of them, all alike probable, and no token
    minds what others take.

    >>> distinct(8, 2, 1), distinct(8, 2, 4)
    (2.0, 5.46875)
    """
    return total * (1 - (1 - active / total) ** tokens)


def expert(spec: ModelSpec) -> float:
    """Weights of one routed expert that may go unread, over all layers that have them."""
    if spec.experts is None or spec.active is None or spec.experts.total == spec.experts.active:
        return 0.0  # of experts that a token takes all of, none is ever left unread
    return (spec.parameters - spec.active) / (spec.experts.total - spec.experts.active)


def read_bytes(spec: ModelSpec, kind: str, tokens: int) -> int:
    """Bytes of weights that are read for so many tokens at once: a prompt's, or a batch's one each.

    All layers, the experts that some token takes, and the output layer. Of an embedding that is a
    matrix of its own a token needs one row, which isn't counted.
    """
    count: float = spec.parameters - apart(spec)
    if spec.experts is not None:
        unread = spec.experts.total - distinct(spec.experts.total, spec.experts.active, tokens)
        count -= unread * expert(spec)
    return coded(count, kind) + 2 * spec.vocabulary * spec.hidden
