"""Windows as other libraries count them.

Here, and in Hugging Face's `sliding_window`, a window of W holds the token itself and the W - 1
before it. Positions are those of the whole sequence, queries the last ones of the keys, as in
FlashAttention since 2.1 and in `attnspan.attention`.
"""

from __future__ import annotations

from attnspan.patterns.algebra import Pattern
from attnspan.patterns.library import Blockwise, Causal, Full, SlidingWindow


def from_hugging_face(
    sliding_window: int | None = None, attention_chunk_size: int | None = None
) -> Pattern:
    """A layer's pattern from a transformers config: a window, chunks (Llama 4), or causal.

    >>> from_hugging_face(sliding_window=4096)
    SlidingWindow(4096)
    >>> from_hugging_face(attention_chunk_size=8192)
    Blockwise(8192)
    """
    if sliding_window is not None and attention_chunk_size is not None:
        raise ValueError(
            f"sliding_window is {sliding_window} and attention_chunk_size {attention_chunk_size}; "
            "one of them is allowed"
        )
    if attention_chunk_size is not None:
        return Blockwise(attention_chunk_size)
    return Causal() if sliding_window is None else SlidingWindow(sliding_window)


def from_flash_attention(window_size: tuple[int, int] = (-1, -1), causal: bool = False) -> Pattern:
    """FlashAttention's `window_size=(left, right)`: `i - left <= j <= i + right`, -1 for no bound.

    With `causal=True` nothing lies to the right, whatever `right` says.

    Raises:
        ValueError: a window that is open to the left alone, which has no name here.

    >>> from_flash_attention((4095, 0), causal=True), from_flash_attention((64, 64))
    (SlidingWindow(4096), SlidingWindow(65, right=64))
    """
    if not (
        isinstance(window_size, tuple | list)
        and len(window_size) == 2
        and all(isinstance(x, int) and not isinstance(x, bool) and x >= -1 for x in window_size)
    ):
        raise ValueError(
            f"window_size is {window_size!r}; two whole numbers of at least -1 are allowed"
        )
    left, right = window_size
    right = 0 if causal else right
    if left == -1 and right in (-1, 0):
        return Full() if right == -1 else Causal()
    if -1 in (left, right):
        raise ValueError(
            f"window_size is {window_size}: no pattern has a window that is bounded on one side; "
            "both bounds, or (-1, 0) and (-1, -1), are allowed"
        )
    return SlidingWindow(left + 1, right=right)


def to_flash_attention(pattern: Pattern) -> tuple[tuple[int, int], bool]:
    """`(window_size, causal)` of FlashAttention for a pattern that it has.

    Raises:
        ValueError: it has no such pattern.

    >>> to_flash_attention(SlidingWindow(4096))
    ((4095, 0), True)
    """
    match pattern:
        case Full():
            return (-1, -1), False
        case Causal():
            return (-1, -1), True
        case SlidingWindow(window, True, 1, right):
            return (window - 1, right), right == 0
    raise ValueError(
        f"pattern is {pattern}; FlashAttention has Full(), Causal() and SlidingWindow with the "
        "token itself and without dilation"
    )


def from_flashinfer(window_left: int = -1) -> Pattern:
    """FlashInfer's causal `window_left`: the keys before the token that it sees; -1 for all.

    >>> from_flashinfer(4095)
    SlidingWindow(4096)
    """
    return from_flash_attention((window_left, 0), causal=True)


def from_cudnn(left_bound: int | None = None, right_bound: int | None = 0) -> Pattern:
    """cuDNN's diagonal band: `i - left_bound < j <= i + right_bound`; None for no bound.

    >>> from_cudnn(left_bound=4096)
    SlidingWindow(4096)
    """
    if left_bound is not None and left_bound < 1:
        raise ValueError(f"left_bound is {left_bound}; None or at least 1 is allowed")
    left = -1 if left_bound is None else left_bound - 1
    return from_flash_attention((left, -1 if right_bound is None else right_bound))


def from_mistral_reference(sliding_window: int) -> Pattern:
    """What Mistral's reference code computes at prefill: a key more than its buffer holds.

    https://github.com/mistralai/mistral-inference masks by xformers' local attention of W, which
    sees W keys before the token; decoding from its buffer of W sees W with the token, as
    `SlidingWindow(W)` does.

    >>> from_mistral_reference(4096)
    SlidingWindow(4097)
    """
    return SlidingWindow(sliding_window + 1)


def from_slice(window: int) -> Pattern:
    """`K[max(0, i - window):i]`, which leaves the token itself out.

    >>> from_slice(3)
    SlidingWindow(3, include_self=False)
    """
    return SlidingWindow(window, include_self=False)
