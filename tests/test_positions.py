"""Positions against transformers' own modules, and against a 50-digit oracle."""

import doctest
import importlib

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf
from torch import Tensor
from transformers import (
    Cohere2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    SmolLM3Config,
)

from attnspan import positions
from attnspan.positions import (
    NTK,
    DynamicNTK,
    Interpolation,
    Linear,
    Llama3,
    LongRoPE,
    Rope,
    Yarn,
    rotate,
)

TINY = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "vocab_size": 32,
}
SHORT = [1 + i / 20 for i in range(32)]
LONG = [1 + i / 3 for i in range(32)]
THETA = 5e5
ROPE_PARAMETERS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn without factor": {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 512,
    },
    "yarn mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "beta_fast": 20,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.25,
        "mscale": 1.0,
    },
    "yarn mscale alone": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "mscale": 0.7,
    },
    # the blend ends beyond the last index
    "yarn low theta": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 20.0,
        "original_max_position_embeddings": 3096,
    },
    # both ends of the blend fall on index 0
    "yarn singular": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 512,
    },
    "longrope shrunk": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 4096,
    },
    "longrope factor": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 32.0,
        "original_max_position_embeddings": 512,
    },
    "longrope attention factor": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 32.0,
        "attention_factor": 1.5,
        "original_max_position_embeddings": 512,
    },
}


def llama(parameters: dict) -> LlamaConfig:
    parameters = {"rope_theta": THETA, **parameters}
    return LlamaConfig(max_position_embeddings=2048, rope_parameters=parameters, **TINY)


def modeling(name: str):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def module_cos_sin(
    name: str, config: PreTrainedConfig, ids: Tensor, layer_type: str | None = None
) -> tuple[Tensor, Tensor]:
    """What a fresh forward of the model's rotary module gives, one column per pair."""
    module_classes = [v for k, v in vars(modeling(name)).items() if k.endswith("RotaryEmbedding")]
    layers = () if layer_type is None else (layer_type,)
    cos, sin = module_classes[0](config)(torch.zeros(1), ids[None], *layers)
    cos, sin = cos[0], sin[0]
    if name == "gpt_oss":
        return cos, sin
    if name == "cohere2":
        return cos[..., ::2], sin[..., ::2]
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


def assert_equals_module(
    rope: Rope, name: str, config: PreTrainedConfig, length: int, layer_type: str | None = None
) -> None:
    """Within position * 2**-23 of transformers, at every position of a fresh forward.

    Their angle is ``p * f`` with ``f <= 1`` and ``f`` off by a few roundings of 2**-24 ``f``; a
    difference in the results' own last bit is within one position's worth. Position 0 is equal.
    """
    ids = torch.arange(length)
    cos, sin = rope.cos_sin(ids, length)
    expected_cos, expected_sin = module_cos_sin(name, config, ids, layer_type)
    assert cos.shape == expected_cos.shape
    error = torch.maximum((cos - expected_cos).abs(), (sin - expected_sin).abs()).amax(-1)
    excess = error.double() - ids * 2.0**-23
    assert excess.max() <= 0, f"position {int(excess.argmax())} is off by {error.max():.3g}"


@pytest.mark.parametrize("length", [1, 512, 513, 2048, 2049, 5000])
@pytest.mark.parametrize("kind", ROPE_PARAMETERS)
def test_llama_equals_transformers(kind, length):
    config = llama(ROPE_PARAMETERS[kind])
    rope = Rope.from_config(config)
    assert rope.rotary_dim == 64
    assert_equals_module(rope, "llama", config, length)


def test_comparison_with_transformers_can_fail():
    config = llama(ROPE_PARAMETERS["yarn"])
    wrong = Rope.from_config(llama(ROPE_PARAMETERS["yarn"] | {"truncate": False}))
    with pytest.raises(AssertionError, match="is off by"):
        assert_equals_module(wrong, "llama", config, 2048)


@pytest.mark.parametrize("length", [256, 257, 1000])
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_phi3_longrope_equals_transformers_on_both_sides(partial, length):
    config = Phi3Config(
        max_position_embeddings=2048,
        original_max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": partial,
            "short_factor": SHORT[: int(32 * partial)],
            "long_factor": LONG[: int(32 * partial)],
        },
        **{**TINY, "pad_token_id": 0},
    )
    rope = Rope.from_config(config)
    assert rope.rotary_dim == 64 * partial
    assert rope.depends_on_length
    assert_equals_module(rope, "phi3", config, length)


@pytest.mark.parametrize(
    "parameters",
    [None, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}],
)
def test_gpt_neox_partial_equals_transformers(parameters):
    sizes = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}
    config = GPTNeoXConfig(max_position_embeddings=512, rope_parameters=parameters, **sizes)
    rope = Rope.from_config(config)
    assert rope.rotary_dim == 16
    assert_equals_module(rope, "gpt_neox", config, 1500)


@pytest.mark.parametrize(
    "full",
    [
        {"rope_type": "linear", "factor": 8.0},
        {"rope_type": "dynamic", "factor": 8.0},
        # transformers 5.23 passes over this `truncate`
        ROPE_PARAMETERS["yarn"] | {"truncate": False},
        ROPE_PARAMETERS["llama3"],
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_gemma3_equals_transformers_per_layer_type(full):
    config = Gemma3TextConfig(
        head_dim=64,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=1024,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_theta": 1e6, **full},
        },
        **TINY,
    )
    sliding = Rope.from_config(config, "sliding_attention")
    assert sliding == Rope(64, 1e4)
    for layer_type in ("sliding_attention", "full_attention"):
        rope = Rope.from_config(config, layer_type)
        assert_equals_module(rope, "gemma3", config, 1500, layer_type)


def test_gpt_oss_yarn_equals_transformers():
    config = GptOssConfig()
    rope = Rope.from_config(config, "full_attention")
    assert rope == Rope(64, 150000.0, Yarn(32.0, 4096, truncate=False))
    assert_equals_module(rope, "gpt_oss", config, 5000)


@pytest.mark.parametrize(("name", "kind"), [("cohere2", Cohere2Config), ("smollm3", SmolLM3Config)])
def test_other_families_equal_transformers(name, kind):
    config = kind(**{**TINY, "pad_token_id": 0, "head_dim": 64})
    assert_equals_module(Rope.from_config(config, interleaved=True), name, config, 1500)


def test_from_config_leaves_the_config_alone():
    config = llama(ROPE_PARAMETERS["default"])
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": THETA}
    before = config.to_dict()
    assert Rope.from_config(config) == Rope(64, THETA, Yarn(4.0, config.max_position_embeddings))
    assert config.to_dict() == before


def oracle_frequencies(rope: Rope, length: int) -> tuple[list[mpf], mpf]:
    """Frequencies and the factor on cos and sin in 50 digits, written from the papers."""
    d, theta = rope.rotary_dim, mpf(rope.theta)
    factor = mpf(getattr(rope.interpolation, "factor", 1))

    def plain(base=theta):
        return [1 / base ** (mpf(2 * i) / d) for i in range(d // 2)]

    match rope.interpolation:
        case None:
            return plain(), mpf(1)
        case Linear():
            return [f / factor for f in plain()], mpf(1)
        case NTK():
            return plain(theta * factor ** (mpf(d) / (d - 2))), mpf(1)
        case DynamicNTK(original_length=original):
            if length <= original:
                return plain(), mpf(1)
            grown = 1 + factor * (mpf(length) / original - 1)
            return plain(theta * grown ** (mpf(d) / (d - 2))), mpf(1)
        case Yarn() as yarn:

            def dimension(rotations):  # solves original_length = rotations * wavelength
                wavelength = mpf(yarn.original_length) / rotations
                return d * mpmath.log(wavelength / (2 * mpmath.pi), theta) / 2

            start, end = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
            if yarn.truncate:
                start, end = mpmath.floor(start), mpmath.ceil(end)
            start, end = max(start, 0), min(end, d - 1)
            blended = []
            for i, f in enumerate(plain()):
                gamma = 1 - min(max((i - start) / (end - start), 0), 1)
                blended.append((1 - gamma) * f / factor + gamma * f)
            return blended, mpf("0.1") * mpmath.log(factor) + 1
        case Llama3() as llama3:
            scaled = []
            for f in plain():
                wavelength = 2 * mpmath.pi / f
                ratio = llama3.original_length / wavelength
                if ratio < llama3.low_freq_factor:
                    scaled.append(f / factor)
                elif ratio > llama3.high_freq_factor:
                    scaled.append(f)
                else:
                    low, high = llama3.low_freq_factor, llama3.high_freq_factor
                    smooth = (ratio - low) / (high - low)
                    scaled.append((1 - smooth) * f / factor + smooth * f)
            return scaled, mpf(1)
        case LongRoPE() as longrope:
            divisors = longrope.long if length > longrope.original_length else longrope.short
            growth = mpmath.log(factor) / mpmath.log(longrope.original_length)
            return [f / mpf(s) for f, s in zip(plain(), divisors, strict=True)], mpmath.sqrt(
                1 + growth
            )
    raise AssertionError(rope)


def oracle_cos_sin(rope: Rope, ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    with mpmath.workdps(50):
        frequencies, factor = oracle_frequencies(rope, length)
        angles = [[p * f for f in frequencies] for p in ids.tolist()]
        cos = [[float(factor * mpmath.cos(a)) for a in row] for row in angles]
        sin = [[float(factor * mpmath.sin(a)) for a in row] for row in angles]
    return torch.tensor(cos, dtype=torch.float64), torch.tensor(sin, dtype=torch.float64)


def assert_equals_oracle(rope: Rope, cos: Tensor, sin: Tensor, ids: Tensor, length: int) -> None:
    expected_cos, expected_sin = oracle_cos_sin(rope, ids, length)
    error = torch.maximum((cos - expected_cos).abs(), (sin - expected_sin).abs()).max()
    # float64: an angle of up to 1e7 radians, four roundings of 2**-53 each, is 4.5e-9 off at most;
    # float32 adds half a unit in the last place of numbers up to 2, 6e-8; the issue asks for 1e-6
    bound = 1e-8 if cos.dtype == torch.float64 else 1e-7
    assert error <= bound, f"off by {error:.3g}"


TEN_MILLION = torch.tensor([0, 1, 2, 99, 4095, 65537, 1_000_000, 4_194_303, 9_999_991, 10_000_000])
INTERPOLATIONS: list[Interpolation | None] = [
    None,
    Linear(8),
    NTK(8.0),
    DynamicNTK(4.0, 4096),
    Yarn(40.0, 4096),
    Yarn(32.0, 4096, truncate=False),
    Llama3(8.0, 1.0, 4.0, 8192),
    LongRoPE(tuple(SHORT), tuple(LONG), 4096, 32.0),
]


@pytest.mark.parametrize("length", [1, 4096, 4097, 10_000_001])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS, ids=repr)
def test_equals_the_oracle_to_ten_million(interpolation, length):
    rope = Rope(64, THETA, interpolation)
    for dtype in (torch.float64, torch.float32):
        cos, sin = rope.cos_sin(TEN_MILLION, length, dtype)
        assert cos.dtype == sin.dtype == dtype
        assert_equals_oracle(rope, cos, sin, TEN_MILLION, length)


def test_float32_angles_fail_the_oracle_at_one_million():
    rope = Rope(64, THETA)
    ids = torch.tensor([999_983, 1_000_000])
    angles = ids[:, None].float() * rope.inverse_frequencies().float()
    with pytest.raises(AssertionError, match="off by"):
        assert_equals_oracle(rope, angles.cos(), angles.sin(), ids, 1)
    cos, sin = module_cos_sin("llama", llama({"rope_type": "default"}), ids)
    with pytest.raises(AssertionError, match=r"off by 0\.0"):  # what a model itself computes
        assert_equals_oracle(rope, cos, sin, ids, 1)
    assert_equals_oracle(rope, *rope.cos_sin(ids), ids, 1)


def test_frequencies_are_a_function_of_length_not_of_calls():
    dynamic = Rope(64, THETA, DynamicNTK(4.0, 100))
    longrope = Rope(64, THETA, LongRoPE(tuple(SHORT), tuple(LONG), 100, 4.0))
    assert [dynamic.regime(n) for n in (1, 100, 101, 102)] == [0, 0, 101, 102]
    assert [longrope.regime(n) for n in (1, 100, 101, 102)] == [0, 0, 101, 101]
    for rope in (dynamic, longrope):
        assert rope.depends_on_length
        fresh = {n: rope.inverse_frequencies(n) for n in (1, 100, 101, 150, 1000)}
        for n in (1000, 1, 150, 101, 100, 150):
            assert rope.inverse_frequencies(n).equal(fresh[n])
        assert fresh[1].equal(fresh[100])
        assert not fresh[100].equal(fresh[101])
    assert not dynamic.inverse_frequencies(101).equal(dynamic.inverse_frequencies(102))
    assert not Rope(64, THETA, Yarn(4.0, 100)).depends_on_length
    assert Rope(64, THETA).regime(10**9) == 0


def test_kept_frequencies_cannot_be_spoilt():
    with torch.inference_mode(), torch.device("meta"):
        rope = Rope(8, 123.0, LongRoPE((1, 2, 3, 4), (5, 6, 7, 8), 16, 2.0))
        rope.cos_sin(torch.tensor([1], device="cpu"))
    expected = rope.inverse_frequencies().clone()
    rope.inverse_frequencies().zero_()
    rope.cos_sin(torch.tensor([1]), dtype=torch.float64)[0].zero_()
    assert expected.device.type == "cpu"
    assert not expected.is_inference()
    assert rope.inverse_frequencies().equal(expected)
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (weight * rope.cos_sin(torch.tensor([5]), dtype=torch.float64)[0]).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_cos_sin_takes_any_shape(shape, dtype):
    rope = Rope(8, 100.0, Yarn(4.0, 16))
    ids = torch.randint(0, 200, shape).to(dtype)
    cos, sin = rope.cos_sin(ids)
    assert cos.shape == sin.shape == (*shape, 4)
    flat = rope.cos_sin(ids.reshape(-1).long())
    assert cos.reshape(-1, 4).equal(flat[0])
    assert sin.reshape(-1, 4).equal(flat[1])


def test_half_precision_is_rounded_once():
    ids = torch.arange(1000)
    exact = Rope(64, THETA).cos_sin(ids, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        cos, sin = Rope(64, THETA).cos_sin(ids, dtype=dtype)
        assert cos.equal(exact[0].to(dtype))
        assert sin.equal(exact[1].to(dtype))


ropes = st.builds(
    Rope,
    rotary_dim=st.sampled_from([4, 16, 64]),
    theta=st.floats(2, 1e7),
    interpolation=st.one_of(
        st.none(),
        st.builds(Linear, st.floats(1, 64)),
        st.builds(NTK, st.floats(1, 64)),
        st.builds(DynamicNTK, st.floats(1, 64), st.integers(1, 10**5)),
        st.builds(Yarn, st.floats(1, 64), st.integers(8, 10**5), truncate=st.booleans()),
        st.builds(Llama3, st.floats(1, 64), st.just(1.0), st.just(4.0), st.integers(8, 10**5)),
    ),
    interleaved=st.booleans(),
)


@given(
    rope=ropes,
    i=st.integers(0, 10**6),
    j=st.integers(0, 10**6),
    shift=st.integers(-(10**6), 10**6),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=150)
def test_rotation_keeps_norms_and_sees_distances_only(rope, i, j, shift, seed):
    length = 10**6
    q, k = torch.randn(
        2, rope.rotary_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )

    def turned(x: Tensor, position: int) -> Tensor:
        cos, sin = rope.cos_sin(torch.tensor([position]), length, torch.float64)
        return rotate(x[None], cos, sin, rope.interleaved)[0]

    factor = rope.attention_factor(length)
    norms = factor**2 * q.norm() * k.norm()
    # angles of up to 2e6 radians are rounded to 2**-33 (half a unit in the last place), four of
    # them make a score; 2**-40 covers the sums
    bound = norms * (4 * 2.0**-33 + 2.0**-40)
    assert (turned(q, i).norm() - factor * q.norm()).abs() <= 2.0**-45 * factor * q.norm()
    score = turned(q, i) @ turned(k, j)
    assert (turned(q, i + shift) @ turned(k, j + shift) - score).abs() <= bound
    if i == j:
        assert (score - factor**2 * (q @ k)).abs() <= bound


def test_scores_from_float32_angles_see_more_than_the_distance():
    frequencies = Rope(64, THETA).inverse_frequencies().float()
    q, k = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).double()

    def score(i: int, j: int) -> Tensor:
        a, b = ((torch.tensor([p]).float() * frequencies).double() for p in (i, j))
        return rotate(q[None], a.cos(), a.sin()) @ rotate(k[None], b.cos(), b.sin()).mT

    assert (score(10**6 + 7, 10**6) - score(7, 0)).abs() > 2.0**-20 * q.norm() * k.norm()


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "phi3", "cohere2"])
def test_rotate_equals_each_family(name):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
    ids = torch.randint(0, 5000, (2, 9))
    rotary_dim = 32 if name == "phi3" else 64
    rope = Rope(rotary_dim, THETA, interleaved=name == "cohere2")
    cos, sin = rope.cos_sin(ids)
    if name == "cohere2":
        theirs = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    elif name == "gpt_oss":
        theirs = cos, sin
    else:
        theirs = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    expected = modeling(name).apply_rotary_pos_emb(q, k, *theirs)
    for x, want in zip((q, k), expected, strict=True):
        out = rotate(x, cos[:, None], sin[:, None], rope.interleaved)
        assert out.shape == x.shape
        # x cos - y sin of float32: either side rounds two products and a sum, of |x| + |y| at most
        assert ((out - want).abs() <= 2 * 3 * 2.0**-24 * 2 * x.abs().max()).all()
        assert (out[..., rotary_dim:] == x[..., rotary_dim:]).all()
        other = rotate(x, cos[:, None], sin[:, None], not rope.interleaved)
        assert not torch.allclose(other, want, atol=1e-2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_rotate_strided_and_odd_inputs(interleaved, rotary_dim):
    rope = Rope(rotary_dim, 100.0)
    cos, sin = rope.cos_sin(torch.arange(5))
    whole = torch.randn(2, 5, 3, 19)
    for x in (whole[..., 1:9], whole[..., 3:14], whole[..., :8]):
        x = x.transpose(1, 2)
        out = rotate(x, cos, sin, interleaved)
        assert out.equal(rotate(x.contiguous(), cos, sin, interleaved))
        assert out[..., rotary_dim:].equal(x[..., rotary_dim:])
        alone = rotate(x[..., :rotary_dim].contiguous(), cos, sin, interleaved)
        assert out[..., :rotary_dim].equal(alone)
    assert rotate(whole[:0, ..., :8].transpose(1, 2), cos, sin, interleaved).shape == (0, 3, 5, 8)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("cos_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rotate_computes_in_float32_at_least(x_dtype, cos_dtype, interleaved):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 20).to(x_dtype)
    cos, sin = Rope(16, 100.0).cos_sin(torch.arange(7), dtype=cos_dtype)
    out = rotate(x, cos, sin, interleaved)
    assert out.dtype == x_dtype
    assert out[..., 16:].equal(x[..., 16:])
    exact = rotate(x.double(), cos.double(), sin.double(), interleaved)
    working = torch.finfo(torch.float64 if x_dtype == torch.float64 else torch.float32).eps
    # two products and a sum of at most 2 max|x|, then the rounding of the result
    bound = 3 * working * x.double().abs().max() + exact.abs() * torch.finfo(x_dtype).eps / 2
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [4, 6])
def test_gradients(interleaved, head_dim):
    torch.manual_seed(0)
    x = torch.randn(2, 3, head_dim, dtype=torch.float64, requires_grad=True)
    cos, sin = Rope(4, 100.0).cos_sin(torch.arange(3), dtype=torch.float64)
    before = x.detach().clone()
    cos.requires_grad_()
    sin.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: rotate(*a, interleaved), (x, cos, sin))
    assert x.equal(before)
    x32 = x.detach().float().requires_grad_()
    rotate(x32, cos.detach().float(), sin.detach().float(), interleaved).square().sum().backward()
    assert torch.allclose(x32.grad, 2 * x32.detach(), atol=1e-5)  # norms are kept


ROPE = Rope(4, 100.0)
ONE = torch.ones(1, 2)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: Rope(5, 1e4), ValueError, "rotary_dim must be even, got 5"),
        (lambda: Rope(0, 1e4), ValueError, "rotary_dim must be at least 2"),
        (lambda: Rope(4.0, 1e4), TypeError, "rotary_dim must be an integer, got 4.0"),
        (lambda: Rope(True, 1e4), TypeError, "rotary_dim must be an integer, got True"),
        (lambda: Rope(4, 1.0), ValueError, "theta must be above 1 "),
        (lambda: Rope(4, float("nan")), ValueError, "theta must be above 1 and finite, got nan"),
        (lambda: Rope(4, "1e4"), TypeError, "theta must be a number, got '1e4'"),
        (lambda: Rope(4, 1e4, "yarn"), TypeError, "interpolation must be an Interpolation or None"),
        (lambda: Rope(2, 1e4, NTK(2.0)), ValueError, "rotary_dim of at least 4, got 2"),
        (lambda: Rope(2, 1e4, DynamicNTK(2.0, 9)), ValueError, "rotary_dim of at least 4, got 2"),
        (
            lambda: Rope(4, 1e4, LongRoPE((1.0, 1.0), (1.0,), 9, 2.0)),
            ValueError,
            "long has 1 numbers, but rotary_dim=4 needs 2",
        ),
        (lambda: Linear(0.5), ValueError, "factor must be at least 1 and finite, got 0.5"),
        (lambda: NTK(float("inf")), ValueError, "factor must be at least 1 and finite, got inf"),
        (lambda: DynamicNTK(2.0, 0), ValueError, "original_length must be at least 1"),
        (lambda: DynamicNTK(2.0, 2.5), TypeError, "original_length must be an integer, got 2.5"),
        (lambda: Yarn(None, 9), TypeError, "factor must be a number, got None"),
        (
            lambda: Yarn(2.0, 9, beta_fast=1, beta_slow=2),
            ValueError,
            "beta_fast must be at least 2",
        ),
        (lambda: Yarn(2.0, 9, attention_factor=-1.0), ValueError, "attention_factor must be"),
        (lambda: Yarn(2.0, 9, mscale=-1.0), ValueError, "mscale must be at least 0"),
        (lambda: Llama3(2.0, 4.0, 4.0, 9), ValueError, "high_freq_factor must be above 4.0"),
        (lambda: LongRoPE((1.0,), (0.0,), 9, 2.0), ValueError, "long must be above 0"),
        (
            lambda: LongRoPE((1.0,), (1.0,), 1, 2.0),
            ValueError,
            "original_length must be at least 2",
        ),
        (lambda: ROPE.regime(0), ValueError, "length must be at least 1, got 0"),
        (lambda: ROPE.inverse_frequencies(-3), ValueError, "length must be at least 1, got -3"),
        (lambda: ROPE.regime(2.5), TypeError, "float"),
        (lambda: ROPE.cos_sin(torch.ones(3)), TypeError, "positions must be integers"),
        (lambda: ROPE.cos_sin(torch.ones(3) > 0), TypeError, "positions must be integers"),
        (lambda: ROPE.cos_sin(torch.arange(3), 0), ValueError, "length must be at least 1"),
        (
            lambda: ROPE.cos_sin(torch.arange(3), dtype=torch.int32),
            TypeError,
            "dtype must be a floating point type, got torch.int32",
        ),
        (lambda: rotate(torch.ones(1, 3), ONE, ONE), ValueError, "x has 3 dimensions"),
        (lambda: rotate(torch.arange(4)[None], ONE, ONE), TypeError, "x must be floating point"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


GEMMA3 = Gemma3TextConfig(**TINY, head_dim=64)
GEMMA3_WITHOUT_SLIDING = Gemma3TextConfig(**TINY, head_dim=64)
GEMMA3_WITHOUT_SLIDING.rope_parameters["sliding_attention"] = None


@pytest.mark.parametrize(
    ("config", "layer_type", "says"),
    [
        (GPTJConfig(), None, "GPTJConfig has no rope_parameters"),
        (GEMMA3, None, r"layer_type must be one of \['full_attention', 'sliding_attention'\]"),
        (GEMMA3, "chunked_attention", "layer_type must be one of"),
        (GptOssConfig(), "chunked_attention", "layer_type must be one of"),
        (GEMMA3_WITHOUT_SLIDING, "sliding_attention", "have no rotary positions"),
        (llama({"rope_type": "default", "mrope_section": [16, 8, 8]}), None, "mrope_section"),
        (llama(ROPE_PARAMETERS["dynamic"] | {"alpha": 1000.0}), None, "alpha"),
        (llama(ROPE_PARAMETERS["longrope"] | {"short_mscale": 1.1}), None, "short_mscale"),
        (llama({"rope_type": "proportional"}), None, "rope type 'proportional' isn't done exactly"),
        (llama({"rope_type": "axial"}), None, "rope type 'axial' isn't done exactly"),
        (
            llama({"rope_type": "default", "partial_rotary_factor": 0.05}),
            None,
            "rotary_dim must be even, got 3",
        ),
        (Gemma4TextConfig(), "full_attention", "Gemma4TextConfig differs by layer"),
    ],
)
def test_from_config_refuses(config, layer_type, says):
    with pytest.raises(ValueError, match=says):
        Rope.from_config(config, layer_type)


def test_doctests():
    result = doctest.testmod(positions)
    assert result.attempted > 0
    assert result.failed == 0
