"""Conversions beside the libraries that install on a CPU, or their documented inequality."""

import pytest
import torch
from transformers.masking_utils import (
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from attnspan.patterns import Blockwise, Causal, Documents, Full, Pattern, SlidingWindow
from attnspan.patterns.conventions import (
    from_cudnn,
    from_flash_attention,
    from_flashinfer,
    from_hugging_face,
    from_mistral_reference,
    from_slice,
    to_flash_attention,
)

N = 24


def seen(pattern: Pattern) -> list[list[bool]]:
    return [[pattern.sees(i, j) for j in range(N)] for i in range(N)]


@pytest.mark.parametrize("window", [1, 5, 40])
def test_hugging_faces_windows(window) -> None:
    theirs = sliding_window_causal_mask_function(window)
    i, j = torch.arange(N)[:, None], torch.arange(N)
    assert seen(from_hugging_face(window)) == theirs(0, 0, i, j).tolist()


@pytest.mark.parametrize("size", [1, 5, 40])
def test_hugging_faces_chunks(size) -> None:
    theirs = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
    i, j = torch.arange(N)[:, None], torch.arange(N)
    assert seen(from_hugging_face(attention_chunk_size=size)) == theirs(0, 0, i, j).tolist()
    assert from_hugging_face() == Causal()


@pytest.mark.parametrize("left", [-1, 0, 3])
@pytest.mark.parametrize("right", [-1, 0, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_as_its_documentation_says(left, right, causal) -> None:
    expected = [
        [
            (left == -1 or j >= i - left) and (right == -1 or j <= i + right)
            if not causal
            else (left == -1 or j >= i - left) and j <= i
            for j in range(N)
        ]
        for i in range(N)
    ]
    one_sided = not causal and (left == -1) != (right == -1) and (left, right) != (-1, 0)
    if one_sided:
        with pytest.raises(ValueError, match="bounded on one side"):
            from_flash_attention((left, right), causal)
        return
    pattern = from_flash_attention((left, right), causal)
    assert seen(pattern) == expected
    assert from_flash_attention(*to_flash_attention(pattern)) == pattern


def test_the_others_by_their_inequalities() -> None:
    assert seen(from_flashinfer(3)) == [[0 <= i - j <= 3 for j in range(N)] for i in range(N)]
    assert from_flashinfer() == Causal()
    band = [[i - 4 < j <= i + 2 for j in range(N)] for i in range(N)]
    assert seen(from_cudnn(left_bound=4, right_bound=2)) == band
    assert (from_cudnn(), from_cudnn(None, None)) == (Causal(), Full())
    assert seen(from_mistral_reference(4)) == [
        [0 <= i - j <= 4 for j in range(N)] for i in range(N)
    ]
    assert seen(from_slice(4)) == [
        [j in range(N)[max(0, i - 4) : i] for j in range(N)] for i in range(N)
    ]


def test_what_can_not_be_said_is_refused() -> None:
    for pattern in (
        SlidingWindow(3, include_self=False),
        SlidingWindow(3, dilation=2),
        Blockwise(4),
    ):
        with pytest.raises(ValueError, match="FlashAttention has Full"):
            to_flash_attention(pattern)
    with pytest.raises(ValueError, match="FlashAttention has"):
        to_flash_attention(Documents((3,)))
    with pytest.raises(ValueError, match="window_size is 3; two whole numbers"):
        from_flash_attention(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"window_size is \(-2, 0\)"):
        from_flash_attention((-2, 0))
    with pytest.raises(ValueError, match="left_bound is 0"):
        from_cudnn(0)
    with pytest.raises(ValueError, match="one of them is allowed"):
        from_hugging_face(4, 8)
