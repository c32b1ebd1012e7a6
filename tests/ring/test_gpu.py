"""Rings on a GPU: ranks as threads of one process, kernels of the GPU for each part."""

from __future__ import annotations

import pytest
import ring_oracle as oracle
import torch

from attnspan.patterns import Causal, Documents, Longformer, Sinks, SlidingWindow, Strided
from attnspan.ring import Contiguous, Striped, ZigZag

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("schedule", ["ring", "allgather", "ulysses", "2x2"])
@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        (Causal(), ZigZag()),
        (Causal(), Striped()),
        (SlidingWindow(200) | Sinks(4), Contiguous()),
        (SlidingWindow(700), ZigZag()),
        (Longformer(90, (5, 600)), ZigZag()),
        (Documents((300, 700)), Contiguous()),
        (Strided(64, 32), Contiguous()),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_is_what_one_process_computes(pattern, layout, schedule, head_dim) -> None:
    given = oracle.problem(pattern, 1024, (8, 4), torch.bfloat16, head_dim=head_dim, device="cuda")
    # Alone first: Triton's first compilation of a kernel is not safe among threads.
    for world, each in ((1, "ring"), (4, schedule)):
        got, _ = oracle.ringed(given, pattern, layout, world, each)
        oracle.check(got, given, world)


def test_int8_in_flight_is_near() -> None:
    given = oracle.problem(Causal(), 1024, (8, 4), torch.bfloat16, head_dim=64, device="cuda")
    exact, _ = oracle.ringed(given, Causal(), ZigZag(), 4, "ring")
    coded, _ = oracle.ringed(given, Causal(), ZigZag(), 4, "ring", wire="int8")
    for name, a, b in zip(oracle.NAMES, coded, exact, strict=True):
        assert 1e-5 < float((a - b).norm() / b.norm()) < 0.03, name
