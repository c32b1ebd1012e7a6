"""Claims of an article on long contexts: what attention, its cache and its optimisations cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from attnspan.planner.held import bytes_per_token
from attnspan.planner.plan import Plan, plan
from attnspan.planner.presets import model
from attnspan.planner.seen import CAUSAL, of_pattern, of_window
from attnspan.planner.stack import CACHE

Verdict = Literal["right", "wrong", "needs a condition", "no source"]

MISTRAL = "https://arxiv.org/abs/2310.06825"
MISTRAL_CODE = "https://github.com/mistralai/mistral-inference/blob/main/one_file_ref.py"
HUGGING_FACE = (
    "https://github.com/huggingface/transformers/blob/main/src/transformers/masking_utils.py"
)
FLASH = "https://arxiv.org/abs/2205.14135"
ONLINE = "https://arxiv.org/abs/1805.02867"
GQA = "https://arxiv.org/abs/2305.13245"
SPARSE = "https://arxiv.org/abs/1904.10509"
LONGFORMER = "https://arxiv.org/abs/2004.05150"
STREAMING = "https://arxiv.org/abs/2309.17453"
RING = "https://arxiv.org/abs/2310.01889"
STRIPED = "https://arxiv.org/abs/2311.09431"
REACH = "https://guangxuanx.com/blog/stacking-swa.html"
LLAMA_2 = "https://arxiv.org/abs/2307.09288"
KIVI = "https://arxiv.org/abs/2402.02750"


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        claim: as the article makes it, its figure included.
        right: the figure, computed.
        verdict: what of the claim holds.
        why: in a sentence or two.
        sources: addresses.
        figures: the numbers in `right`, by name, unrounded.
    """

    claim: str
    right: str
    verdict: Verdict
    why: str
    sources: tuple[str, ...]
    figures: Mapping[str, float]


def unwindowed(tokens: int) -> Plan:
    """Mistral 7B as if it had no window."""
    spec = model("mistral-7b")
    return plan(replace(spec, windows=(None,) * spec.layers), tokens)


def _windowed(tokens: int) -> Plan:
    return plan("mistral-7b", tokens)


def _scores() -> Claim:
    decimal, binary = (unwindowed(n).working.head // 2 for n in (128_000, 131_072))
    return Claim(
        "128K x 128K = 16.3 billion numbers, 64 GB",
        f"128,000 squared is {decimal / 1e9:.3f}e9 ({4 * decimal / 1e9:.1f} GB in fp32); 131,072 "
        f"squared is {binary / 1e9:.2f}e9 ({4 * binary / 2**30:.0f} GiB)",
        "needs a condition",
        "It takes the count of the one and the bytes of the other. That is one head of one layer, "
        "and flash attention never stores it.",
        (FLASH,),
        {"numbers_128000": decimal, "bytes_128000": 4 * decimal, "numbers_131072": binary}
        | {"bytes_131072": 4 * binary},
    )


def _operations() -> Claim:
    n, window = 100_000, model("mistral-7b").windows[0] or 0
    full, causal, seen = n * n, CAUSAL.pairs(n), of_window(window).pairs(n)
    whole = unwindowed(n).prefill.operations / _windowed(n).prefill.operations
    return Claim(
        "Attention over 100,000 tokens: 10 billion operations against 409 million, 24 times less",
        f"causal: {causal / 1e9:.3f}e9 pairs against {seen / 1e6:.1f}e6, {causal / seen:.1f} times "
        f"less; the whole prefill about {whole:.1f} times less",
        "wrong",
        f"n/W = {n / window:.1f} sets full attention that isn't causal ({full / 1e9:.0f}e9 pairs) "
        f"against n * W = {n * window / 1e6:.1f}e6. A decoder's is causal on both sides. The "
        "matrix products of the prefill stay as they are.",
        (MISTRAL,),
        {"full": full, "n_times_w": n * window, "ratio_claimed": n / window, "causal": causal}
        | {"window": seen, "ratio": causal / seen, "prefill_ratio": whole},
    )


def _cache() -> Claim:
    spec = model("mistral-7b")
    full, seen = (of(100_000).cache.total for of in (unwindowed, _windowed))
    return Claim(
        "KV cache at 100,000 tokens: 20 GB against 800 MB, 25 times less",
        f"{full / 1e9:.2f} GB ({full / 2**30:.1f} GiB) against {seen / 1e6:.1f} MB "
        f"({seen / 2**20:.0f} MiB), {full / seen:.1f} times less",
        "wrong",
        f"2 * {spec.layers} layers * {spec.kv_heads} KV heads * {spec.head_dim} channels * 2 bytes "
        f"are {spec.kv_bytes():,} bytes a token, for 100,000 tokens or for a window of "
        f"{spec.windows[0]:,}.",
        (MISTRAL, "https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json"),
        {"full": full, "window": seen, "ratio": full / seen},
    )


def _decoded(of: Plan) -> int:
    assert of.decode is not None, "a causal model decodes"
    return of.decode.bytes


def _speed() -> Claim:
    full, seen = unwindowed(100_000), _windowed(100_000)
    ratio = (full.weights + full.cache.total) / (seen.weights + seen.cache.total)
    read = _decoded(full) / _decoded(seen)
    pairs = full.kinds[0].pairs / seen.kinds[0].pairs
    prefill = full.prefill.seconds / seen.prefill.seconds
    return Claim(
        "A window makes it 24 to 100 times faster",
        f"at 100,000 tokens: attention's pairs {pairs:.1f} times fewer; a prefill on an H100 "
        f"{prefill:.1f} times faster; a decoded token moves {ratio:.2f} times fewer bytes",
        "wrong",
        "At batch 1 a decoded token reads all weights besides the cache, and those stay "
        f"(weights and cache; {read:.2f} without the embedding, of which it needs a row).",
        (MISTRAL,),
        {"pairs_ratio": pairs, "prefill_ratio": prefill, "decode_ratio": ratio}
        | {"decode_ratio_without_embedding": read},
    )


def _convention() -> Claim:
    from attnspan.patterns.library import SlidingWindow

    window = model("mistral-7b").windows[0] or 0
    without, own = of_pattern(SlidingWindow(window, include_self=False)), of_window(window)
    first, later = without.read(1), without.read(100_000)
    reference = of_pattern(SlidingWindow(window + 1)).read(100_000)
    return Claim(
        "Token i attends to the positions max(0, i-W) to i-1",
        f"that leaves the token itself out, and leaves token 0 with {first} keys; Hugging Face "
        f"sees W = {own.read(100_000):,} keys with itself, Mistral's reference prefill "
        f"{reference:,}",
        "wrong",
        f"So written it is SlidingWindow({window}, include_self=False), {later:,} keys before the "
        "token. A query that sees no key has no softmax; attnspan gives it zeros.",
        (MISTRAL_CODE, HUGGING_FACE),
        {"first": first, "before": later, "hugging_face": own.read(100_000)}
        | {"mistral_prefill": reference},
    )


def _reach() -> Claim:
    spec = model("mistral-7b")
    window = spec.windows[0] or 0
    bound = spec.reach or 0
    return Claim(
        "Stacked layers reach W * L = 131,072 tokens",
        f"L * (W - 1) = {bound:,} with the token itself in the window, and that is a bound",
        "needs a condition",
        "Beyond it influence is exactly zero. Within it most comes from about 1.5 windows, "
        "whatever the depth; `attnspan doctor` measures a model's.",
        (REACH, MISTRAL),
        {"claimed": spec.layers * window, "bound": bound},
    )


def _llama_2() -> Claim:
    spec = model("llama-2-70b")
    full = sum(window is None for window in spec.windows)
    return Claim(
        "Llama 2 70B: full attention, 80 layers, 4,096 tokens",
        f"{full} layers, all of them full, trained for {spec.trained_length:,} positions",
        "right",
        "As its config and paper say.",
        (spec.source, LLAMA_2),
        {"full_layers": full, "trained_length": spec.trained_length or 0},
    )


def _llama_3() -> Claim:
    large, small = model("llama-3-70b"), model("llama-3-8b")
    slides = sum(window is not None for window in (*large.windows, *small.windows))
    length = large.trained_length or 0
    return Claim(
        "Llama 3: window 8,192, 80 layers, so it reaches 655K tokens",
        f"{slides} layers slide; {length:,} is its context; {large.layers} layers are the 70B's, "
        f"the 8B has {small.layers}",
        "wrong",
        f"{length:,} * {large.layers} = {length * large.layers:,} multiplies a context length as "
        "if it were a window. A full layer sees its whole context at once, and nothing beyond it.",
        (large.source, small.source),
        {"sliding_layers": slides, "trained_length": length, "layers_70b": large.layers}
        | {"layers_8b": small.layers, "claimed": length * large.layers},
    )


def _gqa() -> Claim:
    ratios = {n: _factor(n) for n in ("llama-2-70b", "llama-3-70b", "mistral-7b", "llama-3-8b")}
    large, small = model("llama-2-70b"), model("mistral-7b")
    return Claim(
        "GQA makes the KV cache 8 times smaller",
        f"{ratios['llama-2-70b']:.0f} times with {large.heads} query and {large.kv_heads} KV "
        f"heads; {ratios['mistral-7b']:.0f} times for Mistral 7B and Llama 3 8B, {small.heads} and "
        f"{small.kv_heads}",
        "needs a condition",
        "The factor is query heads over KV heads, of cache bytes. It leaves the operations of "
        "attention as they are.",
        (GQA,),
        ratios,
    )


def _factor(name: str) -> float:
    first = next(each for each in plan(name, 4096).stack if each.quantity == CACHE)
    return first.ratio


def _int8() -> Claim:
    dim = model("mistral-7b").head_dim
    dense, coded = bytes_per_token("dense", dim, 2), bytes_per_token("int8", dim, 2)
    zero = coded + 2 * 2  # a key's and a value's zero point, fp16
    return Claim(
        "INT8 halves the KV cache",
        f"{dense / coded:.2f} times less with an fp16 scale for each token and head, "
        f"{dense / zero:.2f} with a zero point besides",
        "needs a condition",
        f"{dim} codes and their scale are {coded // 2} bytes instead of {dense // 2}.",
        (KIVI,),
        {"scale": dense / coded, "scale_and_zero_point": dense / zero},
    )


def _flash() -> Claim:
    working = unwindowed(131_072).working
    return Claim(
        "FlashAttention makes memory 4 times smaller",
        f"at 131,072 tokens a layer's scores of {working.standard / 2**30:,.0f} GiB in bf16 become "
        f"{working.flash / 2**20:.0f} MiB, and the KV cache stays as it is",
        "wrong",
        "It turns O(n^2) of working memory into O(n): the factor grows with n and is no factor of "
        "the cache.",
        (FLASH,),
        {"standard": working.standard, "flash": working.flash}
        | {"ratio": working.standard / working.flash, "cache_ratio": 1},
    )


def _product() -> Claim:
    gqa, dim = round(_factor("llama-2-70b")), model("llama-2-70b").head_dim
    int8 = bytes_per_token("dense", dim, 2) / bytes_per_token("int8", dim, 2)
    halved = gqa * 16 // 8  # bits
    return Claim(
        "GQA, INT8 and FlashAttention together make it 64 times smaller; figure 5 says 16",
        f"the cache: {gqa} * 2 = {halved}, with its scales {gqa * int8:.1f}",
        "wrong",
        "Figure 5 is right, for 64 query heads and 8 KV heads: flash attention's factor is of "
        "working memory and can't be multiplied with those of the cache.",
        (GQA, FLASH),
        {"product": halved, "product_with_scales": gqa * int8},
    )


COST = (
    _scores,
    _operations,
    _cache,
    _speed,
    _convention,
    _reach,
    _llama_2,
    _llama_3,
    _gqa,
    _int8,
    _flash,
    _product,
)
