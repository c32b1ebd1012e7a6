"""Families of transformers against references that share nothing with the cache."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import COMMON, FAMILIES, random_ids, tiny
from torch import Tensor

from attnspan.models import Cache, attach
from attnspan.policies import KeepAll, Policy, SinkWindow, Window

N = 40


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny(request.param)


def through_cache(model, ids: Tensor, policy: Policy, cuts: tuple[int, ...]) -> Tensor:
    cache = Cache(model, policy)
    with attach(model), torch.inference_mode():
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids.split(list(cuts), dim=1)
        ]
    return torch.cat(parts, dim=1)


def banded(model, ids: Tensor, window: int) -> Tensor:
    """The untouched model under a dense mask: a band on full layers, the model's own on others."""
    n = ids.shape[1]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    masks = {}
    for kind, width in (
        ("full_attention", window),
        ("sliding_attention", own_window(model, window)),
    ):
        seen = (distance >= 0) & (distance < width)
        masks[kind] = torch.zeros(1, 1, n, n).masked_fill(~seen, -torch.inf)
    hybrid = len(set(getattr(model.config, "layer_types", None) or [])) > 1
    mask = masks if hybrid else masks["sliding_attention"]
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def own_window(model, window: int) -> int:
    return getattr(model.config, "sliding_window", None) or window


@torch.inference_mode()
def test_keep_all_equals_the_untouched_model(model) -> None:
    ids = random_ids(N)
    expected = model(input_ids=ids, use_cache=False).logits
    for cuts in ((N,), (1,) * N, (7, 1, 20, 12)):
        torch.testing.assert_close(through_cache(model, ids, KeepAll(), cuts), expected, **close())


@torch.inference_mode()
def test_a_window_equals_a_dense_band(model) -> None:
    ids = random_ids(N)
    hybrid = len(set(getattr(model.config, "layer_types", None) or [])) > 1
    window = 9 if hybrid or not getattr(model.config, "sliding_window", None) else 12
    expected = banded(model, ids, window)
    for cuts in ((N,), (1,) * N, (7, 1, 20, 12)):
        got = through_cache(model, ids, Window(window), cuts)
        torch.testing.assert_close(got, expected, **close())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mistral-sliding"])
@torch.inference_mode()
def test_sinks_and_window_equal_a_fresh_forward(family) -> None:
    # With one layer, keys and values depend on their own tokens alone, so what a query sees is a
    # fresh forward over the held tokens, positions counted inside the cache.
    model = tiny(family, num_hidden_layers=1)
    ids = random_ids(30)
    for cuts in ((30,), (1,) * 30, (5, 25)):
        got = through_cache(model, ids, SinkWindow(3, 8), cuts)
        for i in range(30):
            held = [j for j in range(i + 1) if j < 3 or j > i - 8]
            fresh = model(input_ids=ids[:, held], use_cache=False).logits[0, -1]
            torch.testing.assert_close(got[0, i], fresh, **close())


LENGTHS = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 12,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 12,
        "factor": 4.0,
    },
}


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("policy", [KeepAll(), Window(15), SinkWindow(3, 13)], ids=str)
@torch.inference_mode()
def test_angles_that_depend_on_length_are_those_of_a_fresh_forward(kind, policy) -> None:
    trained = 12 if kind == "dynamic" else 32
    changes = {"rope_parameters": LENGTHS[kind], "max_position_embeddings": trained}
    model = tiny("llama", num_hidden_layers=1, **changes)
    ids, sinks = random_ids(26), getattr(policy, "sinks", 0)
    window = getattr(policy, "window", 26)
    got = [through_cache(model, ids, policy, cuts) for cuts in ((26,), (1,) * 26, (5, 21))]
    for i in range(26):
        held = [j for j in range(i + 1) if j < sinks or j > i - window]
        # A model of its own: transformers' angles depend on what a model was shown before.
        fresh = tiny("llama", num_hidden_layers=1, **changes)
        expected = fresh(input_ids=ids[:, held], use_cache=False).logits[0, -1]
        for logits in got:
            torch.testing.assert_close(logits[0, i], expected, **close())


@torch.inference_mode()
def test_generate_equals_transformers_own_cache(model) -> None:
    ids = random_ids(9)
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **settings)
    with attach(model):
        got = model.generate(ids, past_key_values=Cache(model, KeepAll()), **settings)
    assert got.tolist() == expected.tolist()


def test_nothing_is_left_behind(model) -> None:
    before = dict(model.__dict__), dict(model.model.__dict__) if hasattr(model, "model") else {}
    with pytest.raises(KeyError), attach(model):
        raise KeyError
    after = dict(model.__dict__), dict(model.model.__dict__) if hasattr(model, "model") else {}
    assert [list(x) for x in after] == [list(x) for x in before]
    assert model.config._attn_implementation == "eager"


MORE = {
    "Cohere": {},
    "Ernie4_5": {},
    "Exaone4": {},
    "Gemma": {},
    "Gemma2": {},
    "Glm": {},
    "Glm4": {},
    "Mixtral": {},
    "Nemotron": {},
    "Olmo3": {},
    "Phi": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "SeedOss": {},
    "StableLm": {},
    "Starcoder2": {},
}


@pytest.mark.parametrize("name", MORE)
@torch.inference_mode()
def test_more_families_keep_what_the_untouched_model_gives(name) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **MORE[name])
    more, ids = getattr(transformers, f"{name}ForCausalLM")(config).eval(), random_ids(30)
    expected = more(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(
        through_cache(more, ids, KeepAll(), (11, 1, 18)), expected, **close()
    )


REFUSED = {
    "falcon": ("FalconForCausalLM", "FalconConfig", {"alibi": True}),
    "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
        },
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 4}),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_done_exactly_is_refused(family) -> None:
    model_name, config_name, changes = REFUSED[family]
    sizes = {k: v for k, v in COMMON_SIZES.items() if k not in changes}
    config = getattr(transformers, config_name)(**sizes, **changes)
    model = getattr(transformers, model_name)(config).eval()
    with pytest.raises(ValueError, match=r"^[^\n]+$"), attach(model):
        pass


COMMON_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def close() -> dict[str, float]:
    """fp32 logits of size 10 or so; the reference itself is off by about 5e-6 here."""
    return {"atol": 2e-5, "rtol": 2e-5}


def test_a_model_that_was_cast_is_told_why_it_is_refused() -> None:
    cast = tiny("llama", max_position_embeddings=4096).half()
    with pytest.raises(ValueError, match="frequencies were cast to float16: load it with dtype="):
        Cache(cast, KeepAll())
