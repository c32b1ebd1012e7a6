"""The article's claims: each figure against hand arithmetic written out here."""

import math
import re
from pathlib import Path

import pytest

from attnspan.planner import article
from attnspan.planner.claims import Claim

CLAIMS = article.claims()
DOCS = Path(__file__).parents[2] / "docs" / "article.md"


def claim(words: str) -> Claim:
    (found,) = [each for each in CLAIMS if words in each.claim]
    return found


def figures(words: str, **expected: float) -> Claim:
    found = claim(words)
    assert set(expected) <= set(found.figures)
    for name, value in expected.items():
        assert found.figures[name] == pytest.approx(value, rel=1e-12), name
    return found


def says(found: Claim, verdict: str, *words: str) -> None:
    assert found.verdict == verdict
    for each in words:
        assert each in found.right or each in found.why, each


def test_scores() -> None:
    found = figures(
        "16.3 billion",
        numbers_128000=128_000**2,
        bytes_128000=4 * 128_000**2,
        numbers_131072=131_072**2,
        bytes_131072=64 * 2**30,
    )
    says(found, "needs a condition", "16.384e9", "65.5 GB", "17.18e9", "64 GiB", "one layer")


def test_operations() -> None:
    n, w, matrices = 100_000, 4096, 6_979_588_096
    causal, window = n * (n + 1) // 2, n * w - w * (w - 1) // 2
    products = 2 * (n * matrices + 32_000 * 4096)
    each = 32 * 32 * 4 * 128  # layers, query heads, operations of a pair
    found = figures(
        "409 million",
        full=10**10,
        n_times_w=409_600_000,
        ratio_claimed=n / w,
        causal=5_000_050_000,
        window=401_213_440,
        ratio=causal / window,
        prefill_ratio=(products + each * causal) / (products + each * window),
    )
    says(found, "wrong", "24.4", "5.000e9", "401.2e6", "12.5 times", "about 2.5 times")


def test_cache_and_speed() -> None:
    token = 2 * 32 * 8 * 128 * 2
    full, window, weights = 100_000 * token, 4096 * token, 14_483_464_192
    found = figures("20 GB", full=full, window=window, ratio=full / window)
    says(found, "wrong", "13.11 GB", "12.2 GiB", "536.9 MB", "512 MiB", "24.4 times")
    embedding = 2 * 32_000 * 4096
    found = figures(
        "24 to 100 times",
        pairs_ratio=5_000_050_000 / 401_213_440,
        decode_ratio=(weights + full) / (weights + window),
        decode_ratio_without_embedding=(weights - embedding + full)
        / (weights - embedding + window),
    )
    says(found, "wrong", "12.5 times fewer", "1.84 times fewer", "1.85")


def test_windows_and_reach() -> None:
    found = figures("i-W", first=0, before=4096, hugging_face=4096, mistral_prefill=4097)
    says(found, "wrong", "leaves the token itself out", "4,097")
    found = figures("reach W * L", claimed=131_072, bound=32 * 4095)
    says(found, "needs a condition", "131,040", "1.5 windows")


def test_models() -> None:
    says(
        figures("Llama 2 70B", full_layers=80, trained_length=4096),
        "right",
        "80 layers, all of them full, trained for 4,096",
    )
    found = figures(
        "window 8,192",
        sliding_layers=0,
        trained_length=8192,
        layers_70b=80,
        layers_8b=32,
        claimed=655_360,
    )
    says(found, "wrong", "8,192 is its context", "80 layers are the 70B's")


def test_optimisations() -> None:
    found = claim("GQA makes the")
    assert dict(found.figures) == {
        "llama-2-70b": 64 / 8,
        "llama-3-70b": 64 / 8,
        "mistral-7b": 32 / 8,
        "llama-3-8b": 32 / 8,
    }
    says(found, "needs a condition", "8 times with 64", "4 times for Mistral 7B and Llama 3 8B")
    # 128 numbers of 2 bytes against 128 codes and a scale of 2 bytes, and a zero point of 2.
    found = figures("INT8 halves", scale=256 / 130, scale_and_zero_point=256 / 132)
    says(found, "needs a condition", "1.97", "1.94")
    scores, rest = 32 * 131_072**2 * 2, 32 * 131_072 * 4
    found = figures("FlashAttention makes", standard=scores, flash=rest, ratio=scores / rest)
    says(found, "wrong", "1,024 GiB", "16 MiB", "the KV cache stays")
    found = figures("together make it 64", product=16, product_with_scales=8 * 256 / 130)
    says(found, "wrong", "8 * 2 = 16", "Figure 5 is right")


def test_patterns() -> None:
    n, b = 131_072, 4096
    found = figures(
        "Blockwise",
        pairs=n * b,
        causal=n * (b + 1) // 2,
        one_block=b * b,
        blocks=32,
        doubled=2,
    )
    assert n * b == n * n // 32
    says(found, "wrong", "O(n * b)", "n^2/B for B blocks")
    # Causal: the window's pairs, and of each multiple of 64 from 2,048 on as many as there are
    # queries beyond it.
    window, stride = 2048, 64
    pairs = n * window - window * (window - 1) // 2
    pairs += sum(n - d for d in range(window, n, stride))
    found = figures("Strided", pairs=pairs, formula=n * window + n * n // stride)
    says(found, "right", "Up to a constant")
    # 2,048 keys on either side of a query and its own, cut by the sequence's ends; 64 tokens that
    # see all and are seen by all. What both say counts once.
    w, g, half = 4096, 64, 2048
    band = n * (2 * half + 1) - 2 * (half * (half + 1) // 2)
    lines = 2 * n * g - g * g  # rows and columns
    rows = sum(i + half + 1 for i in range(g))  # of the band, the global tokens' rows
    both = 2 * rows - g * g
    seen = band + lines - both
    found = figures("Longformer costs", pairs=seen, formula=n * w + 2 * n * g)
    says(found, "right", "Up to a constant")


def test_rings() -> None:
    says(claim("reconstructed"), "wrong", "it never is")
    found = figures("takes N steps", devices=8, computations=8, sends=7)
    says(found, "needs a condition", "N computations and N - 1 sends")
    # The last of 8 contiguous shards has 15 of its half blocks' 2 * 8 - 1 where the mean is 8.
    n, shard = 131_072, 131_072 // 8
    last = shard * (n - shard) + shard * (shard + 1) // 2
    found = figures(
        "overhead",
        idle_contiguous=1 - n * (n + 1) / 2 / 8 / last,
        imbalance_zigzag=0,
        exposed=0,
    )
    assert 0.46 < found.figures["idle_contiguous"] < 0.48
    says(found, "no source", "47%", "zigzag 0%")


def test_streaming_and_quality() -> None:
    found = figures("4 + (W-4)", inside=4096, besides=4100)
    says(found, "needs a condition", "holds 4,096 tokens", "4,100")
    says(claim("95 %"), "no source", "5.40 against 5158", "Llama-2-13B")
    says(claim("0-3 %"), "no source", "window +12 %", "blockwise +35 %")


def test_every_claim_is_whole() -> None:
    assert len(CLAIMS) == 21
    for each in CLAIMS:
        assert each.right
        assert each.why.endswith(".")
        assert all(source.startswith("https://") for source in each.sources)
        assert each.sources or "measured" in each.right
        assert all(math.isfinite(value) for value in each.figures.values())


def test_a_wrong_formula_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnspan.planner import claims

    seen = claims.of_window
    monkeypatch.setattr(claims, "of_window", lambda window: seen(window + 1))
    assert claims._operations() != claim("409 million")


def test_text_is_a_hundred_columns_wide() -> None:
    lines = article.text().splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(bool(re.match(r"\d+\. ", line)) for line in lines) == len(CLAIMS)


def test_the_document_holds_what_the_command_prints() -> None:
    assert article.markdown() in DOCS.read_text(encoding="utf-8")
