"""The bundled model: its bytes are its tokens, it loads like any model, and it has sinks."""

import json
import logging
import math
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from attnspan.evaluation.texts import python_heldout
from attnspan.models import bundled

BOS, EOS, PAD = 256, 257, 258
TOKENIZER: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(bundled.path())
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        bundled.path(), dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """1,024 tokens of held-out Python, BOS first."""
    text = python_heldout()
    return torch.tensor([TOKENIZER.encode(text[len(text) // 2 :][:1500])[:1024]])


def bos_attention(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Each head's mean attention to the first token from queries 64 on, `(layers, heads)`."""
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    return torch.stack([layer[0, :, 64:, 0].mean(-1) for layer in attentions])


def masked_nll(model: PreTrainedModel, tokens: Tensor, window: int, sinks: int) -> float:
    """Nats a token, from `window` on, where a query sees the first `sinks` and the latest tokens.

    Positions are those of the text, all of them trained.
    """
    place = torch.arange(tokens.shape[1])
    back = place[:, None] - place
    seen = (back >= 0) & ((back < window - sinks) | (place < sinks))
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask[None, None]).logits
    nll = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
    return nll[window:].mean().item()


@settings(deadline=None, max_examples=200)
@given(st.text())
@example("")
@example(" a  b .\r\n\t\u00a0 n't ! ?\u200d\0é漢字🎉 ")
@example("".join(TOKENIZER.all_special_tokens) + "<s></s><bos><|endoftext|>")
def test_a_token_is_a_byte_and_bos_comes_first_once(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == [BOS, *text.encode()]
    assert TOKENIZER.encode(text, add_special_tokens=False) == [*text.encode()]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@settings(deadline=None, max_examples=200)
@given(st.binary())
def test_invalid_bytes_decode_with_replacement(data: bytes) -> None:
    assert TOKENIZER.decode([*data]) == data.decode(errors="replace")


def test_the_tokenizer_is_fast_and_names_its_specials() -> None:
    assert TOKENIZER.is_fast
    specials = (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
    assert specials == (BOS, EOS, PAD)
    assert TOKENIZER(["a", "bcd"], padding=True)["input_ids"] == [
        [PAD, PAD, BOS, 97],
        [BOS, 98, 99, 100],
    ]


def test_it_loads_without_network_or_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("loading the bundled model opened a socket")

    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(socket, "socket", refuse)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        AutoTokenizer.from_pretrained(bundled.path())
        model = AutoModelForCausalLM.from_pretrained(bundled.path())
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.config.bos_token_id == model.generation_config.bos_token_id == BOS


def test_the_weights_are_finite_and_small(model: PreTrainedModel) -> None:
    assert model.dtype == torch.float32
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    assert (bundled.path() / "model.safetensors").stat().st_size <= 20_000_000
    assert sum(file.stat().st_size for file in bundled.path().iterdir()) <= 20_000_000


def test_three_heads_in_ten_are_sinks(model: PreTrainedModel, tokens: Tensor) -> None:
    attention = bos_attention(model, tokens)
    assert attention.shape == (10, 4)
    assert (attention > 0.3).float().mean() >= 0.3


def test_a_model_without_training_has_no_sinks(model: PreTrainedModel, tokens: Tensor) -> None:
    torch.manual_seed(0)
    untrained = LlamaForCausalLM(model.config).eval()
    assert (bos_attention(untrained, tokens) > 0.3).float().mean() == 0


def test_a_window_needs_the_sink(model: PreTrainedModel, tokens: Tensor) -> None:
    alone = masked_nll(model, tokens, window=256, sinks=0)
    with_sinks = masked_nll(model, tokens, window=256, sinks=4)
    assert math.exp(alone - with_sinks) >= 1.2


def test_a_continuation_is_deterministic_and_goes_on_as_python(model: PreTrainedModel) -> None:
    prompt = TOKENIZER("import os\nimport sys\nimport ", return_tensors="pt")
    texts = [
        TOKENIZER.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False)[0])
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert texts[0].split("sys\nimport ")[1].split("\n")[0].isidentifier()


def test_it_predicts_held_out_python(model: PreTrainedModel, tokens: Tensor) -> None:
    with torch.no_grad():
        bits = model(tokens, labels=tokens).loss.item() / math.log(2)
    # 1.25 on the Python that it was written with; 8.04 without training.
    assert bits < 1.6


def test_the_card_credits_every_source_and_gives_the_measured_numbers() -> None:
    card = (bundled.path() / "README.md").read_text()
    result = ROOT / "training" / "result"
    corpus = json.loads((result / "corpus.json").read_text())
    for source in corpus["sources"]:
        assert f"| {source['name']} | {source['version']} | {source['licence']} |" in card
    measured = json.loads((result / "evaluation.json").read_text())
    for language in ("python", "english"):
        assert f"{measured[language]['bits_per_byte']:.3f}" in card
        for row in measured[language]["stream_perplexity"]:
            assert f"{row['window']:.2f}" in card
            assert f"{row['sinks_4']:.3f}" in card
