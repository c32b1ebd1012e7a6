"""Configs that are stretched, and streams past the trained length against fresh forwards."""

import shutil

import pytest
import torch
from tiny import random_ids, tiny, tiny_llama
from transformers import Gemma3TextConfig, LlamaConfig, OPTConfig, PreTrainedConfig

from attnspan.models import Cache, attach, bundled
from attnspan.models.loading import load
from attnspan.models.stretch import Stretch, parse_stretch
from attnspan.policies import KeepAll
from attnspan.positions import NTK, Linear, Rope, Yarn

TRAINED = 16
N = 40


def config(**changes):
    return LlamaConfig(max_position_embeddings=TRAINED, head_dim=8, **changes)


@pytest.mark.parametrize(
    ("text", "interpolation"), [("linear:2.5", Linear(2.5)), ("yarn:4", Yarn(4.0, TRAINED))]
)
def test_a_config_gets_the_interpolation(text, interpolation):
    changed = config()
    parse_stretch(text).apply(changed)
    assert Rope.from_config(changed) == Rope(8, 10_000.0, interpolation)
    assert changed.max_position_embeddings == TRAINED * interpolation.factor
    assert str(parse_stretch(text)) == text


def test_ntk_is_a_larger_base():
    changed = config()
    Stretch("ntk", 4.0).apply(changed)
    frequencies = Rope(8, 10_000.0, NTK(4.0)).inverse_frequencies()
    torch.testing.assert_close(Rope.from_config(changed).inverse_frequencies(), frequencies)
    assert changed.max_position_embeddings == 4 * TRAINED


@pytest.mark.parametrize(
    "text", ["", "yarn", "yarn:", "yarn:x", "yarn:0.5", "yarn:nan", "yarn:inf", "dynamic:2", "4"]
)
def test_another_text_is_refused(text):
    with pytest.raises(ValueError, match=r"^rope is .* such as yarn:4, is allowed$"):
        parse_stretch(text)


def without_length():
    made = PreTrainedConfig()
    made.head_dim, made.rope_parameters = 8, {"rope_type": "default", "rope_theta": 1e4}
    return made


REFUSED = {
    "stretched already": (
        lambda: config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        "needs plain rotary positions; the config's are Linear already",
    ),
    "by layer type": (Gemma3TextConfig, "can't be put into the config: layer_type must be one of"),
    "no rotation": (OPTConfig, "can't be put into the config: .* has no rope_parameters"),
    "no trained length": (
        without_length,
        "needs the config's max_position_embeddings",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_configs_are_refused_unchanged(case):
    make, sentence = REFUSED[case]
    refused = make()
    before = refused.to_dict()
    with pytest.raises(ValueError, match=f"^rope yarn:4 {sentence}"):
        Stretch("yarn", 4.0).apply(refused)
    assert refused.to_dict() == before


def test_a_model_loads_stretched(tmp_path):
    model, _ = load("bundled", "cpu", stretch=Stretch("yarn", 2.0))
    assert model.config.max_position_embeddings == 2048
    ours = model.model.rotary_emb.inv_freq.double()
    expected = Rope(64, 10_000.0, Yarn(2.0, 1024)).inverse_frequencies()
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6)
    assert load("bundled", "cpu")[0].config.max_position_embeddings == 1024
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path() / name, tmp_path)
    with pytest.raises(ValueError, match=r"^model .*: rope yarn:4 needs plain rotary positions"):
        load(tmp_path, "cpu", stretch=Stretch("yarn", 4.0))


def through_cache(model, ids, cuts):
    cache = Cache(model, KeepAll())
    with attach(model), torch.inference_mode():
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids.split(list(cuts), dim=1)
        ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("text", ["linear:2.5", "ntk:2.5", "yarn:2.5", "llama3"])
@torch.inference_mode()
def test_past_the_trained_length_a_stream_is_one_fresh_forward(text):
    changed = config()
    if text == "llama3":
        scales = {"factor": 2.5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        changed.rope_parameters = {
            **{"rope_type": "llama3", "rope_theta": 1e4, **scales},
            "original_max_position_embeddings": TRAINED,
        }
    else:
        parse_stretch(text).apply(changed)
    model = tiny("llama", rope_parameters=changed.rope_parameters, max_position_embeddings=N)
    ids = random_ids(N)
    expected = model(input_ids=ids, use_cache=False).logits
    for cuts in ((N,), (1,) * N, (TRAINED, 1, N - TRAINED - 1)):
        torch.testing.assert_close(through_cache(model, ids, cuts), expected, atol=3e-5, rtol=3e-5)
    plain = tiny_llama(max_position_embeddings=N, num_hidden_layers=4)
    other = plain(input_ids=ids, use_cache=False).logits
    assert (other - expected).abs().max() > 1e-2


DIVISORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LENGTHS = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": TRAINED,
        "factor": 2.5,
        **DIVISORS,
    },
}


@pytest.mark.parametrize("kind", LENGTHS)
@torch.inference_mode()
def test_angles_that_depend_on_length_are_each_tokens_own(kind):
    """Token i of a stream sees all before it at the angles of i + 1 tokens, in every layer.

    What it sees came out of the layer before when those tokens were the last, so past the trained
    length this is not one fresh forward of all tokens; how the calls cut them makes no difference.
    """
    trained = TRAINED if kind == "dynamic" else N

    def make():
        return tiny_llama(rope_parameters=LENGTHS[kind], max_position_embeddings=trained)

    model, ids = make(), random_ids(N)
    hidden = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        last = []
        for i in range(N):
            rotary = make().model.rotary_emb  # transformers' dynamic angles only ever grow
            angles = rotary(hidden, torch.arange(i + 1)[None])
            mask = torch.full((i + 1, i + 1), -torch.inf).triu(1)[None, None]
            out = layer(hidden[:, : i + 1], attention_mask=mask, position_embeddings=angles)
            last.append((out if isinstance(out, torch.Tensor) else out[0])[:, -1:])
        hidden = torch.cat(last, dim=1)
    expected = model.lm_head(model.model.norm(hidden))
    for cuts in ((N,), (1,) * N, (TRAINED, 1, N - TRAINED - 1)):
        torch.testing.assert_close(through_cache(model, ids, cuts), expected, atol=3e-5, rtol=3e-5)
    one = make()(input_ids=ids, use_cache=False).logits
    assert (one - expected)[:, -1].abs().max() > 1e-3
    if kind == "dynamic":  # up to the trained length all lengths have the same angles
        one = make()(input_ids=ids[:, :TRAINED], use_cache=False).logits
        torch.testing.assert_close(one, expected[:, :TRAINED], atol=3e-5, rtol=3e-5)
