"""Claims of an article on long contexts: sparse patterns, rings, and what quality they keep."""

from __future__ import annotations

from attnspan.planner.claims import (
    LONGFORMER,
    ONLINE,
    RING,
    SPARSE,
    STREAMING,
    STRIPED,
    Claim,
    unwindowed,
)
from attnspan.planner.plan import plan
from attnspan.planner.presets import model
from attnspan.planner.quantities import scaled
from attnspan.planner.seen import of_pattern
from attnspan.policies import SinkWindow

_RANKS = 8


def _blockwise() -> Claim:
    from attnspan.patterns.library import Blockwise

    n, block = 131_072, 4096
    blocks = n // block
    pairs, causal = (of_pattern(Blockwise(block, causal=c)).pairs(n) for c in (False, True))
    doubled = of_pattern(Blockwise(block, causal=False)).pairs(2 * n)
    return Claim(
        "Blockwise attention costs O(n^2/B^2)",
        f"O(n * b) for blocks of b tokens, which is n^2/B for B blocks: {blocks} blocks of "
        f"{block:,} have {scaled(pairs)} pairs, n^2/B^2 would be {scaled((n // blocks) ** 2)}",
        "wrong",
        f"n^2/B^2 is one block's. Counted: n * b exactly, n * (b + 1) / 2 = {scaled(causal)} "
        "causal, and twice as many for twice the tokens.",
        (SPARSE,),
        {"pairs": pairs, "causal": causal, "one_block": (n // blocks) ** 2}
        | {"blocks": blocks, "doubled": doubled / pairs},
    )


def _strided() -> Claim:
    from attnspan.patterns.library import Strided

    n, window, stride = 131_072, 2048, 64
    pairs = of_pattern(Strided(window, stride)).pairs(n)
    formula = n * window + n * n // stride
    return Claim(
        "Strided attention costs O(n*W + n^2/k)",
        f"{scaled(pairs)} pairs for n = {n:,}, W = {window:,}, k = {stride}; n*W + n^2/k is "
        f"{scaled(formula)}",
        "right",
        f"Up to a constant: causal it is about n*W + n^2/(2k), {pairs / formula:.2f} of it. "
        "Distances count from the query, so the cache can drop no key.",
        (SPARSE,),
        {"pairs": pairs, "formula": formula, "share": pairs / formula},
    )


def _longformer() -> Claim:
    from attnspan.patterns.library import Longformer

    n, window, some = 131_072, 4096, 64
    right = window // 2
    pairs = of_pattern(Longformer(right + 1, some, right=right)).pairs(n)
    formula = n * window + 2 * n * some
    causal = of_pattern(Longformer(window, some)).pairs(n)
    return Claim(
        "Longformer costs O(n*W + n*G)",
        f"{scaled(pairs)} pairs for n = {n:,}, W = {window:,}, G = {some}; n*W + 2*n*G is "
        f"{scaled(formula)}",
        "right",
        "Up to a constant: global tokens see all and are seen by all. Causal it is "
        f"{scaled(causal)}.",
        (LONGFORMER,),
        {"pairs": pairs, "formula": formula, "share": pairs / formula, "causal": causal},
    )


def _ring_matrix() -> Claim:
    working = unwindowed(131_072).working
    return Claim(
        "In a ring the full attention matrix is reconstructed",
        "it never is: partial outputs are merged by their log-sum-exps, and a layer's scores, "
        f"{working.standard / 2**30:,.0f} GiB at 131,072 tokens, aren't there on any device",
        "wrong",
        "The online softmax joins the parts exactly, with the scores of one tile at a time.",
        (RING, ONLINE),
        {"scores": working.standard},
    )


def _ring_steps() -> Claim:
    from attnspan.patterns.library import Full
    from attnspan.planner.forms import work

    rounds = work(Full(), 131_072, _RANKS, "contiguous").rounds
    sends = sum(each.received > 0 for each in rounds)
    return Claim(
        "A ring of N devices takes N steps",
        f"N computations and N - 1 sends: on {_RANKS} devices {len(rounds)} and {sends}",
        "needs a condition",
        "The first computation is with a device's own keys, which nobody sends.",
        (RING,),
        {"devices": _RANKS, "computations": len(rounds), "sends": sends},
    )


def _ring_overhead() -> Claim:
    from attnspan.patterns.library import Causal
    from attnspan.planner.forms import work

    contiguous, zigzag = (
        work(Causal(), 131_072, _RANKS, layout).imbalance for layout in ("contiguous", "zigzag")
    )
    ring = plan(unwindowed(131_072).spec, 131_072, devices=_RANKS).ring
    assert ring is not None
    idle = 1 - 1 / (1 + contiguous)
    exposed = ring.exposed / ring.seconds
    return Claim(
        "A ring costs 10 to 30 % overhead",
        f"contiguous causal shards leave {idle:.0%} of {_RANKS} devices idle, zigzag {zigzag:.0%}; "
        f"for 131,072 tokens on {_RANKS} H100 over InfiniBand {exposed:.0%} of a prefill's time is "
        "communication that nothing hides",
        "no source",
        "What it costs depends on the layout, the length and the link; `attnspan ring simulate` "
        "counts it, `attnspan ring check` measures it.",
        (STRIPED, RING),
        {"idle_contiguous": idle, "imbalance_zigzag": zigzag, "exposed": exposed},
    )


def _streaming_sizes() -> Claim:
    window = model("mistral-7b").windows[0] or 0
    inside, besides = SinkWindow(4, window - 4).capacity, SinkWindow(4, window).capacity
    return Claim(
        "StreamingLLM holds 4 + (W-4) tokens; elsewhere 4 + W",
        f"sinks:4+window:{window - 4} holds {inside:,} tokens, sinks:4+window:{window} {besides:,}",
        "needs a condition",
        "Both are possible, and the article uses both names for one. attnspan's sizes are "
        "explicit: sinks + window tokens are held. Positions count inside the cache.",
        (STREAMING,),
        {"inside": inside, "besides": besides},
    )


def _streaming_quality() -> Claim:
    return Claim(
        "StreamingLLM keeps more than 95 % of the quality",
        "the paper gives perplexities: 5.40 against 5158 for the window alone (Llama-2-13B, 4 "
        "sinks and 1,020 tokens, table 1)",
        "no source",
        "The paper states no share of quality, and perplexity doesn't tell what of the dropped "
        "tokens could still be looked up: nothing. `attnspan compare` measures it on your text.",
        (STREAMING,),
        {},
    )


def _quality() -> Claim:
    return Claim(
        "Quality lost: window 0-3 %, strided 2-5 %, blockwise 5-10 %, Longformer 1-4 %",
        "measured on small models trained alike, each query seeing an eighth of 1,024 bytes or "
        "less: window +12 %, strided +13 %, blockwise +35 %, Longformer +13 % bits a byte of "
        "Python, and with 2 of 10 layers full nothing that shows",
        "no source",
        "It depends on model, text and length, and on whether the model was trained so: put on a "
        "full model afterwards, the same window costs 16 % and blocks 71 %. docs/variants.md has "
        "the seeds, `attnspan compare` measures policies on your model.",
        (),
        {},
    )


SPARSITY = (
    _blockwise,
    _strided,
    _longformer,
    _ring_matrix,
    _ring_steps,
    _ring_overhead,
    _streaming_sizes,
    _streaming_quality,
    _quality,
)
