"""Models equal but for their attention: what each sees, and how it is built and run.

All see about 128 keys a query where `full` sees 512 on average, of 1,024 tokens. Weights, batches
and their order are those of the seed alone, so two variants of one seed differ by their pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import attnspan as span
from attnspan.patterns import Pattern
from training.export import config
from training.model import Shape


@dataclass(frozen=True)
class Variant:
    """What the layers of a model see.

    Attributes:
        pattern: of most layers.
        fourth: of every fourth layer; None: as the others.
        learned_sinks: whether each head has a score more whose value is zero, as in gpt-oss
            (https://arxiv.org/abs/2508.10925); it starts from 0.
    """

    pattern: Pattern
    fourth: Pattern | None = None
    learned_sinks: bool = False

    def patterns(self, layers: int) -> list[Pattern]:
        return [
            self.fourth if self.fourth is not None and layer % 4 == 3 else self.pattern
            for layer in range(layers)
        ]


def variants(length: int) -> dict[str, Variant]:
    """The variants by name, for sequences of `length` tokens, of which windows see an eighth.

    >>> {name: str(variant.pattern) for name, variant in variants(32).items()}["strided"]
    'Strided(2, 16)'
    """
    window = length // 8
    return {
        "full": Variant(span.Causal()),
        "window": Variant(span.SlidingWindow(window)),
        "learned-sinks": Variant(span.SlidingWindow(window), learned_sinks=True),
        "first-token": Variant(span.SlidingWindow(window - 1) | span.Sinks(1)),
        "hybrid": Variant(span.SlidingWindow(window), fourth=span.Causal()),
        "strided": Variant(span.Strided(window // 2, 16)),
        "blockwise": Variant(span.Blockwise(window)),
        "longformer": Variant(span.Longformer(window - window // 8, window // 8)),
    }


def build(shape: Shape, seed: int, learned_sinks: bool) -> LlamaForCausalLM:
    """A model of the recipe's shape with the seed's weights, float32, on the CPU.

    Learned sinks are a parameter `sinks` of each attention; `running` hands them over.
    """
    torch.manual_seed(seed)
    fields = config(shape)
    for name in ("architectures", "dtype"):
        del fields[name]
    model = LlamaForCausalLM(LlamaConfig(**fields))
    if learned_sinks:
        for layer in model.model.layers:
            layer.self_attn.sinks = nn.Parameter(torch.zeros(shape.heads))
    return model


@contextmanager
def running(model: LlamaForCausalLM, variant: Variant) -> Iterator[None]:
    """For the block's length the model attends as the variant says, forward and backward."""
    patterns = variant.patterns(model.config.num_hidden_layers)
    with span.attach(model, patterns):
        # Only now: Llama's own attention, which attach holds its output against, has no sinks.
        hooks = [
            layer.self_attn.register_forward_pre_hook(_hand_over, with_kwargs=True)
            for layer in model.model.layers
            if variant.learned_sinks
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _hand_over(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]
) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    return args, kwargs | {"s_aux": module.sinks}
