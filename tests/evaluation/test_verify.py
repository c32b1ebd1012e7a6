"""`attnspan verify`: plans beside what is really allocated, with the misses shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import planned

from attnspan.cache import Dense, Int4, Int8
from attnspan.cli import main
from attnspan.evaluation import verify as module
from attnspan.evaluation.verify import Row, verify
from attnspan.models.loading import made_up
from attnspan.planner.held import CacheBytes
from attnspan.policies import HeavyHitter, KeepAll, SinkWindow

POLICIES = (KeepAll(), SinkWindow(4, 60))


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in result["rows"]}


def test_every_figure_of_a_small_model() -> None:
    loaded = planned("llama")
    loaded.set_attn_implementation("sdpa")
    result = verify(loaded, context=300, policies=POLICIES, storages=(Dense(), Int4()), batch=2)
    found = rows(result)
    assert result["meta"]["misses"] == 0
    assert result["refused"] == []
    # By hand: 2 layers, keys and values of 2 heads of 32, fp32, 2 sequences.
    token = 2 * 2 * 2 * 32 * 4 * 2
    assert found["transformers' cache after prefill"]["measured"] == 300 * token
    assert found["transformers' cache 3 tokens on"]["measured"] == 303 * token
    assert found["transformers: a further token"]["measured"] == token
    # Room for 64 tokens, and the sinks' keys once more.
    sinks = found["attnspan, sinks:4+window:60, dense: cache after prefill"]
    assert sinks["planned"] == sinks["measured"] == 64 * token + 4 * token // 2
    assert found["weights"]["measured"] == sum(x.nbytes for x in loaded.parameters())
    assert found["prefill's peak, eager"]["measured"] > found["prefill's peak, sdpa"]["measured"]
    assert loaded.config._attn_implementation == "sdpa"


def test_a_hybrid_model_in_chunks() -> None:
    found = verify(
        planned("gemma3"), context=400, chunk=150, policies=[HeavyHitter(16, 16)], storages=[Int8()]
    )
    assert found["meta"]["misses"] == 0
    assert len(found["rows"]) == 10
    # With the cache as the prefill leaves it, where a sliding layer keeps its last call's slice.
    of = rows(found)
    for name in ("sdpa", "eager"):
        both, peak = of[f"prefill's peak with its cache, {name}"], of[f"prefill's peak, {name}"]
        cache = of["transformers' cache after prefill"]
        assert both["planned"] == peak["planned"] + cache["planned"]
        assert both["measured"] == peak["measured"] + cache["measured"]
        assert cache["planned"] > of["transformers' cache 3 tokens on"]["planned"]


def test_what_cannot_run_is_told() -> None:
    oss = verify(planned("gpt_oss"), context=64, policies=[SinkWindow(4, 10)], storages=[Dense()])
    assert oss["meta"]["misses"] == 0
    assert "prefill's peak, sdpa" not in rows(oss)
    assert "transformers' cache after prefill" in rows(oss)
    assert len(oss["refused"]) == 1
    assert oss["refused"][0].startswith("prefill with sdpa: GptOssForCausalLM does not support")
    latent = verify(planned("deepseek_v3"), context=64, policies=POLICIES, storages=[Dense()])
    assert latent["meta"]["misses"] == 0
    assert len(latent["refused"]) == 1
    assert latent["refused"][0].startswith("attnspan.Cache: model type 'deepseek_v3' has keys of")
    narrow = verify(
        planned("mistral-sliding"), context=64, policies=[SinkWindow(4, 500)], storages=[Dense()]
    )
    assert "trained with a sliding window of 128" in narrow["refused"][0]


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("something was run, or allocated")


def test_what_would_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free", lambda device: 1_000_000)
    monkeypatch.setattr(module._Run, "_call", never)
    monkeypatch.setattr(module._Run, "_ids", property(never))
    found = verify(planned("llama"), context=300, policies=POLICIES, storages=[Dense(), Int8()])
    assert [line.split(": ")[0] for line in found["refused"]] == [
        "prefill with sdpa",
        "prefill with eager",
        "attnspan, keep-all, dense",
        "attnspan, keep-all, int8",
        "attnspan, sinks:4+window:60, dense",
        "attnspan, sinks:4+window:60, int8",
    ]
    assert all("a smaller batch or a smaller chunk is allowed" in x for x in found["refused"])
    assert [row["what"] for row in found["rows"]] == ["weights"]


def test_a_cache_or_the_ids_alone_can_be_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of 10 tokens takes little; 2,000 tokens' cache is 2 MB, and their ids 16 kB."""
    free = 2_000_000
    monkeypatch.setattr(module, "_free", lambda device: free)
    loaded = planned("llama")
    wide = verify(
        loaded, policies=[KeepAll(), SinkWindow(4, 60)], storages=[Dense()], context=2000, chunk=10
    )
    refused = [line.split(": ")[0] for line in wide["refused"]]
    assert refused == ["prefill with sdpa", "prefill with eager", "attnspan, keep-all, dense"]
    assert wide["meta"]["misses"] == 0
    # 64 slots and a call of one token: the ids of 2,000 are what doesn't fit.
    run = module._Run(loaded, "llama", module.from_config(loaded.config.to_dict()), 2000, 1, 1)
    free = 20_000
    assert run._short(0) == ""
    free = 19_999
    assert run._short(0).startswith("16000 bytes are planned and 19999 are free here")


def test_a_family_without_sdpa_is_no_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caches are filled by eager attention, which must fit."""
    monkeypatch.setattr(module, "_free", lambda device: 1_000_000)
    monkeypatch.setattr(module._Run, "_call", never)
    found = verify(planned("gpt_oss"), context=300)
    assert [row["what"] for row in found["rows"]] == ["weights"]
    assert "bytes are planned" in found["refused"][1]


def fails(*_: Any, **__: Any) -> None:
    raise RuntimeError("mat1 and mat2 cannot be multiplied\nat some line")


def test_a_model_whose_forward_fails(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = planned("llama")
    loaded.register_forward_pre_hook(fails)
    monkeypatch.setattr("attnspan.models.loading.load", lambda *_: (loaded, None))
    assert main(["verify", "mine", "--context", "20"]) == 2
    printed, errors = capfd.readouterr()
    assert printed == ""
    assert errors == ("attnspan: model mine can't be run: mat1 and mat2 cannot be multiplied\n")
    with pytest.raises(ValueError, match="model LlamaForCausalLM can't be run: mat1"):
        verify(loaded, context=20)


def test_a_failure_of_our_own_cache_is_not_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Cache, "update", fails)
    with pytest.raises(RuntimeError, match="mat1"):
        verify(planned("llama"), context=20, policies=[KeepAll()], storages=[Dense()])


def test_each_run_is_reported() -> None:
    told: list[tuple[int, int | None, str]] = []
    verify(
        planned("llama"),
        context=8,
        policies=POLICIES,
        storages=[Dense(), Int8()],
        report=lambda at: told.append((at.done, at.total, at.unit)),
    )
    assert told == [(done, 6, "runs") for done in range(7)]


def test_a_plan_that_is_a_byte_off_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.cache_bytes

    def wrong(*args: Any, **kwargs: Any) -> CacheBytes:
        plan = right(*args, **kwargs)
        return CacheBytes(plan.engine, plan.layers, plan.other + 1)

    monkeypatch.setattr(module, "cache_bytes", wrong)
    found = verify(planned("llama"), context=40, policies=[KeepAll()], storages=[Dense()])
    missed = {row["what"] for row in found["rows"] if row["miss"]}
    assert missed == {
        "transformers' cache after prefill",
        "transformers' cache 3 tokens on",
        "attnspan, keep-all, dense: cache after prefill",
        "attnspan, keep-all, dense: cache 3 tokens on",
    }
    assert found["meta"]["misses"] == 4


def test_a_peak_that_holds_more_is_a_miss() -> None:
    loaded = planned("llama")
    kept: list[torch.Tensor] = []
    mlp = loaded.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda _, args: kept.append(torch.ones(1_000_000)))
    found = rows(verify(loaded, context=300))["prefill's peak, sdpa"]
    assert found["miss"]
    assert found["measured"] - found["planned"] > 3_900_000


@pytest.mark.parametrize(
    ("row", "off", "miss"),
    [
        (Row("a cache", 100, 100), 0.0, False),
        (Row("a cache", 101, 100), 0.01, True),
        (Row("a cache", 1, 0), None, True),
        (Row("a cache", 0, 0), 0.0, False),
        (Row("a peak", 109, 100, 0.1), 0.09, False),
        (Row("a peak", 91, 100, 0.1), -0.09, False),
        (Row("a peak", 89, 100, 0.1), -0.11, True),
    ],
)
def test_rows(row: Row, off: float | None, miss: bool) -> None:
    assert row.off == (None if off is None else pytest.approx(off))
    assert row.miss is miss


@pytest.fixture
def config(tmp_path: Path) -> Path:
    planned("qwen3").config.save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_the_command(config: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    options = ["--random", "--context", "100", "--policy", "window:20", "--storage", "int8"]
    assert main(["verify", str(config), *options, "--device", "cpu", "--json", str(file)]) == 0
    printed, errors = capfd.readouterr()
    assert errors == ""
    assert "0 of 10 miss: caches and weights must match to the byte, a peak to 10%." in printed
    assert "attnspan, window:20, int8: cache after prefill" in printed
    assert "(qwen3), 100 tokens x 1, float32 on cpu" in printed
    written = json.loads(file.read_text())
    assert written["meta"]["command"] == "verify"
    assert written["meta"]["misses"] == 0
    assert len(written["rows"]) == 10


def test_the_bundled_model_and_a_miss(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Row, "miss", property(lambda self: "peak" in self.what))
    options = ["--context", "64", "--policy", "keep-all", "--storage", "dense", "--device", "cpu"]
    assert main(["verify", *options]) == 0  # a miss is shown, and no error
    printed = capfd.readouterr().out
    assert printed.count("  miss") == 4
    assert "bundled (llama), 64 tokens x 1" in printed
    assert "4 of 10 miss" in printed


def test_a_share_of_nothing_is_no_figure(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Run, "weights", lambda _: Row("weights", 7, 0))
    options = ["--context", "8", "--policy", "keep-all", "--storage", "dense", "--device", "cpu"]
    assert main(["verify", *options]) == 0
    line = next(x for x in capfd.readouterr().out.splitlines() if x.startswith("weights"))
    assert line.split() == ["weights", "7", "0", "-", "miss"]


BAD: list[tuple[list[str], str]] = [
    (["nowhere"], "model nowhere: there is no such folder"),
    (["--context", "many"], "context 'many' is no number of tokens"),
    (["--policy", "windows:8"], "policy 'windows:8' is not known"),
    (["--storage", "fp4"], "storage 'fp4' is not known"),
    (["--batch", "0"], "0 is given; a whole number of at least 1 is allowed"),
    (["--json", "nowhere/figures.json"], "there is no folder nowhere"),
    (["nowhere.json", "--random"], "model nowhere.json: there is no such file; a config"),
    (["--device", "meta"], "device 'meta' holds no numbers"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD)
def test_bad_input(arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == 2
    printed, errors = capfd.readouterr()
    assert printed == ""
    assert sentence in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"context": 0}, "context is 0; a whole number of at least 1 is allowed"),
        ({"chunk": True}, "chunk is True; a whole number of at least 1 is allowed"),
    ],
)
def test_bad_sizes(sizes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        verify(planned("llama"), **sizes)


def test_models_made_up_from_a_config(config: Path, tmp_path: Path) -> None:
    made: Any = made_up(config, "cpu")
    assert made.config.model_type == "qwen3"
    assert made.dtype == torch.float32
    assert not made.training
    named = tmp_path / "other.json"
    named.write_text(config.read_text())
    for same in (named, tmp_path):
        other: Any = made_up(same, "cpu")
        assert other.config.to_diff_dict() == made.config.to_diff_dict()
    given = json.loads(config.read_text())
    named.write_text(json.dumps({**given, "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(ValueError, match=r"other\.json asks for remote code \(auto_map\)"):
        made_up(named, "cpu")
    for changes, sentence in (
        ({"hidden_size": 65_536, "intermediate_size": 65_536}, "random weights would take"),
        ({"auto_map": {"AutoModel": "x.Y"}}, r"asks for remote code \(auto_map\)"),
        ({"attn_implementation": "someone/kernel"}, "asks for remote code"),
        ({"hidden_act": "nonsense"}, "the model can't be made"),
        # Its first line ends in a colon, and the reason follows.
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}},
            "the model can't be made: .*validator 'validate_rope': TypeError: '<' not supported",
        ),
    ):
        config.write_text(json.dumps({**given, **changes}))
        with pytest.raises(ValueError, match=sentence):
            made_up(config, "cpu")


def test_the_bundled_models_shape_with_random_weights() -> None:
    from attnspan.models.loading import load

    trained, random = load("bundled", "cpu")[0].state_dict(), made_up("bundled", "cpu").state_dict()
    assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in random.items()}
    name = "model.embed_tokens.weight"
    assert not torch.equal(trained[name], random[name])


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_on_a_gpu(family: str) -> None:
    """Caches to the byte; peaks are compared, and a miss is shown rather than hidden."""
    loaded = planned(family).to("cuda", torch.bfloat16)
    loaded.set_attn_implementation("sdpa")
    found = verify(loaded, context=1024, policies=POLICIES, storages=(Dense(), Int8()))
    assert all(not row["miss"] for row in found["rows"] if "peak" not in row["what"])
    assert {"prefill's peak, sdpa", "prefill's peak, eager"} <= rows(found).keys()
    assert found["meta"]["threads"] is None


def test_a_device_that_cannot_be_watched() -> None:
    nothing: Callable[[], None] = lambda: None  # noqa: E731
    with pytest.raises(ValueError, match="device 'meta': memory is measured on cpu and cuda alone"):
        module.peak_bytes(nothing, torch.device("meta"))
