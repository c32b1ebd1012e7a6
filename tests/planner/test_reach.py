"""The bound of the reach, against the paths that masks really leave."""

import itertools

import numpy as np
import pytest

from attnspan.planner.reach import bound


def farthest(masks):
    """The farthest (query, key) that a product of masks connects: the oracle, by counting paths."""
    paths = np.eye(len(masks[0]), dtype=int)
    for mask in masks:
        paths = np.minimum(mask.astype(int) @ paths, 1)
    queries, keys = paths.nonzero()
    return int((queries - keys).max())


def band(n, window):
    distance = np.subtract.outer(np.arange(n), np.arange(n))
    return (distance >= 0) & (distance < window)


def chunks(n, size):
    place = np.arange(n)
    return (place[:, None] // size == place // size) & (place[:, None] >= place)


@pytest.mark.parametrize("windows", [[1], [4], [5, 3], [1, 1, 1], [2, 7, 3], [6] * 4])
def test_windows_reach_as_far_as_paths_do(windows):
    n = 40
    assert bound(windows) == farthest([band(n, window) for window in windows])
    # The oracle can fail: a window one larger reaches further.
    assert bound(windows) < farthest([band(n, windows[0] + 1), *(band(n, w) for w in windows[1:])])


@pytest.mark.parametrize("sizes", [[4], [4, 4, 4], [4, 8], [4, 6], [3, 5], [2, 2, 12]])
def test_chunks_never_cross_where_all_of_them_begin(sizes):
    got = bound(sizes, chunked=True)
    exact = farthest([chunks(60, size) for size in sizes])
    assert got is not None
    assert got >= exact
    # A stack of equal chunks doesn't grow, and where they share their places the bound is exact.
    if len(set(sizes)) == 1 or max(sizes) % min(sizes) == 0:
        assert got in (exact, sum(size - 1 for size in sizes))
    if len(set(sizes)) == 1:
        assert got == exact == sizes[0] - 1


def test_sinks_reach_everywhere_and_all_others_stay_within_the_bound():
    n, sinks, windows = 40, 2, [4, 3, 5]
    paths = np.eye(n, dtype=int)
    for window in windows:
        mask = band(n, window)
        mask[:, :sinks] = np.tril(np.ones((n, n), dtype=bool))[:, :sinks]
        paths = np.minimum(mask.astype(int) @ paths, 1)
    queries, keys = paths.nonzero()
    rest = keys >= sinks
    assert int((queries - keys)[rest].max()) == bound(windows)
    assert int((queries - keys).max()) == n - 1


def test_a_full_layer_has_no_bound():
    for place in range(3):
        windows = [8, 8, 8]
        windows[place] = None
        assert bound(windows) is None
    assert bound([None], chunked=True) is None


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "8"])
def test_wrong_windows(wrong):
    with pytest.raises(ValueError, match=r"windows holds .*; None or a whole number of at least 1"):
        bound([4, wrong])
    with pytest.raises(ValueError, match="windows is empty"):
        bound([])


def test_known_models():
    # Mistral 7B v0.1: 32 layers of 4,096, so 32 * 4,095; the product 131,072 is one too many each.
    assert bound([4096] * 32) == 131_040
    # Gemma 3: five sliding layers to a full one.
    assert bound(list(itertools.islice(itertools.cycle([512] * 5 + [None]), 26))) is None
