"""Layouts deal every token to one rank, evenly, and give the whole back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnspan.ring.layout import Contiguous, Striped, ZigZag


@pytest.mark.parametrize("layout", [Contiguous(), ZigZag(), Striped()], ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shards_make_up_the_whole(layout, world) -> None:
    n = 6 * world
    places = [layout.positions(n, rank, world) for rank in range(world)]
    assert {len(each) for each in places} == {6}
    assert sorted(np.concatenate(places)) == list(range(n))
    for whole in (np.arange(2 * n * 3).reshape(2, n, 3), torch.arange(2 * n * 3).view(2, n, 3)):
        parts = [layout.shard(whole, 1, rank, world) for rank in range(world)]
        assert (np.asarray(parts[0]) == np.asarray(whole)[:, places[0]]).all()
        assert (np.asarray(layout.unshard(parts, 1)) == np.asarray(whole)).all()


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="ZigZag: 20 tokens on 4 ranks; a multiple of 8"):
        ZigZag().chunks(20, 4)
    with pytest.raises(ValueError, match="Contiguous: 21 tokens on 4 ranks; a multiple of 4"):
        Contiguous().chunks(21, 4)
