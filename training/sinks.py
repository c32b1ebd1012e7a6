"""How much attention goes to BOS, and how hard training pushes it there."""

import torch
from torch import Tensor

from training.batches import Text
from training.model import Llama, rotary, rotate

SINK = 0.3
BEGIN, RAMP = 0.25, 0.04


@torch.no_grad()
def attention_to_bos(model: Llama, text: Text, rows: int = 8) -> Tensor:
    """`(layers, heads)`: each head's mean attention to BOS from queries 64 on."""
    length = model.shape.length
    tokens = text.spread(rows, length)[:, :-1]
    x = model.embed(tokens)
    cos, sin = rotary(torch.arange(length, device=x.device), model.shape.head_dim)
    hidden = torch.ones(length, length, device=x.device, dtype=torch.bool).triu(1)
    shares = []
    for block in model.layers():
        q, k, _ = block.project(x)
        q, k = rotate(q.float(), cos, sin), rotate(k.float(), cos, sin)
        scores = q @ k.transpose(-1, -2) / model.shape.head_dim**0.5
        attention = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        shares.append(attention[:, :, min(64, length // 2) :, 0].mean((0, 2)))
        x = block(x, cos, sin)[0]
    return torch.stack(shares)


def sink_share(attention: Tensor) -> float:
    """The share of heads that give BOS more than 0.3 of their attention."""
    return (attention > SINK).float().mean().item()


class Penalty:
    """The weight of the attention penalty as training goes on.

    Nothing for the first quarter, then a ramp up to `peak`. From there on `steer` takes it back
    while over 0.55 of the heads are sinks, and raises it again under 0.45: sinks that are there
    stay with far less, and less penalty is better text.
    """

    def __init__(self, peak: float) -> None:
        self.peak = self.level = peak

    def __call__(self, progress: float) -> float:
        """The weight at `progress`, from 0 to 1."""
        return self.level * min(1.0, max(0.0, progress - BEGIN) / RAMP)

    def steer(self, progress: float, share: float) -> None:
        """Take note of the share of sink heads."""
        if progress < BEGIN + RAMP:
            return
        if share > 0.55:
            self.level *= 0.85
        elif share < 0.45:
            self.level = min(self.peak, self.level / 0.85)
