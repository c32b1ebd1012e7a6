"""Rows of tokens from documents: each begins with BOS, documents end with EOS."""

import numpy as np
import torch
from torch import Tensor

from training.tokenizer import BOS, EOS


class Text:
    """Documents joined on the device, as bytes, a NUL after each, which stands for EOS."""

    def __init__(self, documents: list[bytes], device: torch.device) -> None:
        joined = np.frombuffer(b"".join(doc + b"\0" for doc in documents), dtype=np.uint8)
        self.bytes = torch.from_numpy(joined.copy()).to(device)
        ends = np.cumsum([len(doc) + 1 for doc in documents])
        self.starts = torch.from_numpy(np.concatenate([[0], ends[:-1]])).to(device)

    def __len__(self) -> int:
        return len(self.bytes)

    def rows(self, offsets: Tensor, length: int) -> Tensor:
        """`(rows, length + 1)` tokens: BOS, then the bytes from each offset on."""
        steps = torch.arange(length, device=offsets.device)
        tokens = self.bytes[offsets[:, None] + steps].long()
        tokens = torch.where(tokens == 0, EOS, tokens)
        return torch.cat([torch.full_like(tokens[:, :1], BOS), tokens], 1)

    def spread(self, count: int, length: int) -> Tensor:
        """`rows` at `count` evenly spaced offsets."""
        last = len(self) - length
        if last < 0:
            raise ValueError(f"a text of {len(self)} bytes has no row of {length}")
        offsets = torch.linspace(0, last, count, dtype=torch.float64).long()
        return self.rows(offsets.to(self.bytes.device), length)


def sample(python: Text, english: Text, count: int, length: int, share: float) -> Tensor:
    """`(count, length + 1)` random tokens, `share` of the rows English.

    A fifth of the Python rows begin where a document does, so that the model knows beginnings.
    """
    device = python.bytes.device
    last = len(python) - length
    starts = python.starts[python.starts < last]
    anywhere = torch.randint(0, last, (count,), device=device)
    at_start = starts[torch.randint(0, len(starts), (count,), device=device)]
    offsets = torch.where(torch.rand(count, device=device) < 0.2, at_start, anywhere)
    rows = python.rows(offsets, length)
    prose = english.rows(torch.randint(0, len(english) - length, (count,), device=device), length)
    return torch.where((torch.rand(count, device=device) < share)[:, None], prose, rows)
