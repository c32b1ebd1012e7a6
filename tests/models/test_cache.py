"""The cache in transformers' hands: padding, batches, beams, turns, undoing, budgets, refusals."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from tiny import COMMON, random_ids, tiny, tiny_llama

from attnspan.cache import Dense, Int4, Int8
from attnspan.cache.lane import Lane
from attnspan.models import Cache, attach
from attnspan.models.budget import planned_bytes
from attnspan.models.interface import cache_name
from attnspan.patterns import SlidingWindow
from attnspan.policies import KeepAll, SinkWindow, Window, parse

SPECS = (
    "keep-all",
    "window:9",
    "sinks:2+window:7",
    "sinks:2+window:7,block=4",
    "heavy:4+window:5,block=4",
    "compressive:window=6,memory=3,rate=2,pooling=most-used,block=4",
    "snap:4+window:5,observed=2,block=4",
    "heads(keep-all; heavy:3+window:4,block=4)",
)
STORAGES = (Dense(), Int8(), Int4(group=8))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def logits(model, cache, ids, **kwargs) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_runs(model, spec, side) -> None:
    lengths, turns = (23, 11, 23, 17), (8, 1, 1)
    rows = [random_ids(n + sum(turns), seed=i)[0] for i, n in enumerate(lengths)]
    width = max(lengths)
    ids, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    for i, n in enumerate(lengths):
        place = slice(width - n, width) if side == "left" else slice(0, n)
        ids[i, place], mask[i, place] = rows[i][:n], 1
    with attach(model):
        cache = Cache(model, parse(spec))
        got = [logits(model, cache, ids, attention_mask=mask)]
        marks = [mask]
        for start, stop in itertools.pairwise([0, *itertools.accumulate(turns)]):
            new = torch.stack([r[n + start : n + stop] for r, n in zip(rows, lengths, strict=True)])
            mask = torch.cat((mask, torch.ones_like(new)), 1)
            got.append(logits(model, cache, new, attention_mask=mask))
            marks.append(torch.ones_like(new))
        joined, seen = torch.cat(got, 1), torch.cat(marks, 1).bool()
        for i, row in enumerate(rows):
            alone = logits(model, Cache(model, parse(spec)), row[None])[0]
            torch.testing.assert_close(joined[i][seen[i]], alone, atol=2e-5, rtol=0)
        assert cache.tokens_seen == 33


@pytest.mark.parametrize("spec", SPECS)
def test_batched_greedy_equals_single_runs(model, spec) -> None:
    lengths = (14, 6, 9)
    rows = [random_ids(n, seed=i)[0] for i, n in enumerate(lengths)]
    ids, mask = torch.zeros(3, 14, dtype=torch.long), torch.zeros(3, 14, dtype=torch.long)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        ids[i, 14 - n :], mask[i, 14 - n :] = row, 1
    settings = {"max_new_tokens": 15, "do_sample": False}
    with attach(model):
        together = model.generate(
            ids, attention_mask=mask, past_key_values=Cache(model, parse(spec)), **settings
        )
        for i, row in enumerate(rows):
            alone = model.generate(row[None], past_key_values=Cache(model, parse(spec)), **settings)
            assert together[i, 14:].tolist() == alone[0, len(row) :].tolist()


def test_a_second_forward_at_once_is_refused(model) -> None:
    ids, inside, go_on = random_ids(9), threading.Event(), threading.Event()
    caches = [Cache(model, parse("window:4")) for _ in range(2)]

    def wait(*_) -> None:
        inside.set()
        assert go_on.wait(30)

    def run(cache: Cache):
        with torch.inference_mode():
            return model(input_ids=ids, past_key_values=cache).logits

    with attach(model), ThreadPoolExecutor(1) as pool:
        expected = run(Cache(model, parse("window:4")))
        hook = model.get_input_embeddings().register_forward_hook(wait)
        first = pool.submit(run, caches[0])
        assert inside.wait(30)
        try:
            with pytest.raises(RuntimeError, match="another thread's forward"):
                run(caches[1])
        finally:
            go_on.set()
        assert torch.equal(first.result(), expected)
        hook.remove()
        assert torch.equal(run(caches[1]), expected)


def test_any_thread_may_generate(model) -> None:
    # As where one thread generates and another shows the text.
    ids = random_ids(12, batch=2)

    def generate() -> torch.Tensor:
        cache = Cache(model, SinkWindow(2, 10))
        return model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)

    with attach(model), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(generate).result(), generate())


def test_autocast_changes_nothing_of_what_attaching_finds(model) -> None:
    ids = random_ids(20)
    with attach(model):
        found = Cache(model, KeepAll()).anatomy
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert Cache(model, KeepAll()).anatomy.layers == found.layers
        with attach(model):
            cache = Cache(model, KeepAll())
            assert cache.anatomy.layers == found.layers
            got = model(input_ids=ids, past_key_values=cache).logits
        expected = model(input_ids=ids, use_cache=False).logits
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_beams_equal_transformers_own(model) -> None:
    ids, mask = random_ids(12, batch=2), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    settings = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, **settings)
    with attach(model):
        cache = Cache(model, KeepAll())
        got = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("spec", SPECS)
def test_reordered_rows_go_on_as_their_sources(model, spec) -> None:
    ids, more = random_ids(19, batch=3), random_ids(6, batch=4, seed=9)
    mask = torch.ones(3, 19, dtype=torch.long)
    mask[1, :4] = 0
    order = torch.tensor([2, 1, 1, 0])
    with attach(model):
        cache = Cache(model, parse(spec))
        logits(model, cache, ids, attention_mask=mask)
        cache.reorder_cache(order)
        got = logits(model, cache, more)
        for i, source in enumerate(order.tolist()):
            alone = Cache(model, parse(spec))
            logits(model, alone, ids[source : source + 1, 4 * (source == 1) :])
            torch.testing.assert_close(got[i], logits(model, alone, more[i : i + 1])[0])


def test_turns_go_on_from_the_cache(model) -> None:
    ids = random_ids(10)
    # Token 0 is the pad: it must not be taken for padding where the model itself wrote it.
    settings = {"max_new_tokens": 6, "do_sample": False, "bad_words_ids": [[0]]}
    with attach(model):
        cache = Cache(model, SinkWindow(2, 9))
        first = model.generate(ids, past_key_values=cache, **settings)
        turn = torch.cat((first, random_ids(5, seed=4)), 1)
        second = model.generate(turn, past_key_values=cache, **settings)
        alone = model.generate(turn, past_key_values=Cache(model, SinkWindow(2, 9)), **settings)
        assert second.tolist() == alone.tolist()
        cache.reset()
        assert cache.tokens_seen == 0
        again = model.generate(ids, past_key_values=cache, **settings)
        assert again.tolist() == first.tolist()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("cuts", [(40,), (1,) * 40, (13, 20, 7), (30, 3, 3, 4)])
def test_undone_tokens_leave_no_trace(model, spec, cuts) -> None:
    ids, other = random_ids(40), random_ids(12, seed=5)
    with attach(model):
        cache = Cache(model, parse(spec), rollback=5)
        for part in ids.split(list(cuts), dim=1):
            logits(model, cache, part)
        cache.crop(-3)
        cache.crop(-2)
        assert cache.tokens_seen == 35
        with pytest.raises(ValueError, match="0 tokens can be taken back"):
            cache.crop(-1)
        got = torch.cat([logits(model, cache, part) for part in other.split([1, 1, 7, 3], 1)], 1)
        straight = Cache(model, parse(spec))
        logits(model, straight, ids[:, :35])
        torch.testing.assert_close(got, logits(model, straight, other), atol=2e-5, rtol=0)
        assert cache.nbytes > straight.nbytes


def test_assisted_generation_undoes(model) -> None:
    ids = torch.tensor([[5, 6, 7, 8] * 5])
    settings = {"max_new_tokens": 16, "do_sample": False}
    with attach(model):
        plain = model.generate(ids, past_key_values=Cache(model, SinkWindow(2, 12)), **settings)
        cache = Cache(model, SinkWindow(2, 12), rollback=10)
        guessed = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **settings)
    assert guessed.tolist() == plain.tolist()


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_stored_codes_do_not_depend_on_the_cuts(model, spec, storage) -> None:
    ids = random_ids(120)
    results = []
    with attach(model):
        for cuts in ((120,), (1,) * 120, (70, 1, 49)):
            cache = Cache(model, parse(spec), storage)
            parts = [logits(model, cache, part) for part in ids.split(list(cuts), dim=1)]
            results.append(torch.cat(parts, 1))
    for other in results[1:]:
        # A code may round the other way where the cuts change the last bit of a key: one level.
        step = {"dense": 2e-5, "int8": 0.05, "int4": 0.6}[str(storage)]
        torch.testing.assert_close(other, results[0], atol=step, rtol=0)
        assert (other - results[0]).abs().median() < 1e-5


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_saved_state_goes_on_bit_for_bit(model, spec, storage) -> None:
    ids = random_ids(150)
    with attach(model):
        for cut in (1, 3, 50, 99):
            cache = Cache(model, parse(spec), storage)
            logits(model, cache, ids[:, :cut])
            tensors, meta = cache.state()
            tensors = {name: x.clone() for name, x in tensors.items()}
            expected = logits(model, cache, ids[:, cut:])
            fresh = Cache(model, parse(spec), storage)
            fresh.load_state(tensors, meta)
            assert torch.equal(logits(model, fresh, ids[:, cut:]), expected)
            assert fresh.nbytes == cache.nbytes
        with pytest.raises(ValueError, match="policy"):
            Cache(model, Window(3), storage).load_state(tensors, meta)
        other = tiny_llama(seed=3)
        with pytest.raises(ValueError, match="model"):
            Cache(other, parse(spec), storage).load_state(tensors, meta)


def test_long_prompts_go_in_by_chunks(model) -> None:
    ids = random_ids(90)
    with attach(model):
        cache, whole = (Cache(model, SinkWindow(2, 9), chunk=c) for c in (16, 1000))
        expected = logits(model, whole, ids)
        torch.testing.assert_close(logits(model, cache, ids), expected, atol=2e-5, rtol=0)
        cache.reset()
        last = logits(model, cache, ids, logits_to_keep=1)
        torch.testing.assert_close(last, expected[:, -1:], atol=2e-5, rtol=0)
        cache.reset()
        with pytest.raises(ValueError, match="labels"):
            logits(model, cache, ids, labels=ids)
        with torch.inference_mode():
            hidden = model.model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
        assert hidden.last_hidden_state.shape == (1, 5, 32)


def test_layers_may_have_budgets_of_their_own(model) -> None:
    ids = random_ids(30)
    with attach(model):
        cache = Cache(model, parse("layers(window:4; sinks:2+window:20)"))
        logits(model, cache, ids)
        assert [c.lanes[0].tokens_held for c in cache.caches] == [4, 22]
        with pytest.raises(ValueError, match="policy has 1 layers"):
            Cache(model, parse("layers(window:4)"))


def test_heads_may_have_budgets_of_their_own(model) -> None:
    ids = random_ids(30)
    with attach(model):
        cache = Cache(model, parse("layers(heads(keep-all; window:4); heads(window:4; window:4))"))
        logits(model, cache, ids)
        first, second = (c.lanes[0] for c in cache.caches)
        assert [lane.tokens_held for lane in first.lanes] == [30, 4]
        assert (first.tokens_held, second.tokens_held) == (30, 4)
        assert isinstance(second, Lane), "heads that are alike share a lane"
        with pytest.raises(ValueError, match="has 3 heads; the layer's 2 KV heads are allowed"):
            Cache(model, parse("heads(keep-all; window:4; window:4)"))
        tensors, meta = cache.state()
        for heads in (None, [], [{"batch": 1, "seen": 30}] * 3, [{"batch": 1, "seen": 29}] * 2):
            layers = [[counts[0] | {"heads": heads}, *counts[1:]] for counts in meta["layers"]]
            with pytest.raises(ValueError, match="the counts of a layer's heads are missing"):
                Cache(model, cache.policy).load_state(tensors, meta | {"layers": layers})
        stray = tensors | {"0.0.2.fields.key": tensors["0.0.0.fields.key"]}
        with pytest.raises(ValueError, match="of no heads of this layer"):
            Cache(model, cache.policy).load_state(stray, meta)


def test_heads_within_a_budget_of_bytes(model) -> None:
    policy = parse("heads(keep-all; sinks:2+window:20)")
    with attach(model), torch.inference_mode():
        cache = Cache(model, policy, max_bytes=4_000_000)
        with pytest.raises(RuntimeError, match="all that max_bytes allows"):
            stream(model, cache, random_ids(20_000))
        assert cache.peak_bytes <= 4_000_000
        assert min(lane.tokens_held for c in cache.caches for lane in c.lanes[0].lanes) == 22


def test_hybrid_models_keep_the_band_they_were_trained_with() -> None:
    hybrid, ids = tiny("gemma3"), random_ids(40)
    with attach(hybrid):
        cache = Cache(hybrid, SinkWindow(2, 20))
        logits(hybrid, cache, ids)
        assert [c.lanes[0].tokens_held for c in cache.caches] == [12, 22, 12, 22]
    sliding = tiny("mistral-sliding")
    with pytest.raises(ValueError, match="sliding window of 12"):
        Cache(sliding, SinkWindow(2, 20))


def renamed(module: torch.nn.Module) -> None:
    """Gives a module a forward that calls its cache `cache`, as from transformers 5.24 on."""
    forward, old = module.forward, cache_name(module)

    def call(input_ids=None, attention_mask=None, cache=None, **kwargs):
        if old != "cache":
            assert kwargs.pop(old, None) is None
        return forward(input_ids, attention_mask, **{old: cache}, **kwargs)

    module.__dict__["forward"] = call


@pytest.mark.parametrize("new", [False, True])
def test_a_cache_goes_by_either_name(new) -> None:
    model, ids = tiny_llama(), random_ids(9, batch=1)
    if new:
        renamed(model.model)
        renamed(model)
    assert cache_name(model) == ("cache" if new else cache_name(tiny_llama()))
    found = []
    with attach(model), torch.no_grad():
        for name in ("past_key_values", "cache"):
            cache = Cache(model, Window(4))
            found.append(model(input_ids=ids, use_cache=True, **{name: cache}).logits)
            assert cache.tokens_seen == 9
        with pytest.raises(ValueError, match="past_key_values and cache are given; one of them"):
            model(input_ids=ids, past_key_values=Cache(model, Window(4)), cache=cache)
    torch.testing.assert_close(*found)


def test_an_unattached_model_is_told_so(model) -> None:
    with attach(model):
        cache = Cache(model, Window(4))
    with pytest.raises(RuntimeError, match="not attached"):
        logits(model, cache, random_ids(3))


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "hole"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask"),
        ({"position_ids": torch.tensor([[5, 6, 7]])}, "position_ids"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_what_a_cache_cannot_honour_is_refused(model, kwargs, named) -> None:
    with attach(model):
        cache = Cache(model, Window(4))
        with pytest.raises(ValueError, match=named):
            logits(model, cache, random_ids(3), **kwargs)
        assert cache.tokens_seen == 0
        assert logits(model, cache, random_ids(3)).isfinite().all()


def test_misuse_is_named(model) -> None:
    other = tiny_llama(seed=2)
    with attach(model):
        with pytest.raises(ValueError, match="another model"):
            logits(model, Cache(other, Window(4)), random_ids(3))
        with pytest.raises(ValueError, match="attached already"), attach(model):
            pass
        cache = Cache(model, Window(4))
        with pytest.raises(RuntimeError, match="no_grad"):
            model(input_ids=random_ids(3), past_key_values=cache, use_cache=True)
        with pytest.raises(RuntimeError, match="reset"):
            logits(model, cache, random_ids(3))
        cache.reset()
        logits(model, cache, random_ids(3))
        with pytest.raises(ValueError, match="batch has 2 rows"):
            logits(model, cache, random_ids(3, batch=2))
    for name, value in (("max_bytes", 0), ("rollback", -1), ("chunk", 0), ("chunk", 1.5)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            Cache(model, Window(4), **{name: value})
    with pytest.raises(TypeError, match="policy is 'window:4'"):
        Cache(model, "window:4")
    model.train()
    with pytest.raises(ValueError, match="eval"), attach(model):
        pass
    model.eval()


def test_without_a_cache_of_ours_nothing_changes(model) -> None:
    ids = random_ids(12)
    with torch.inference_mode():
        expected = model(input_ids=ids, labels=ids)
        with attach(model):
            got = model(input_ids=ids, labels=ids)
            generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.loss, expected.loss)
        assert torch.equal(generated, model.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("policy", ["heavy:4+window:5", "heads(keep-all; heavy:4+window:5)"])
@pytest.mark.parametrize("family", ["granite", "gpt_oss", "gemma2"])
def test_undoing_runs_forward_again_with_the_layers_own_options(family, policy) -> None:
    # granite scales by its own factor, gpt_oss has learned sinks, gemma2 caps its logits: heavy
    # hitters are found by the weights that come of that.
    if family == "gemma2":
        sizes = {**COMMON, "sliding_window": 12, "layer_types": ["full_attention"] * 4}
        config = transformers.Gemma2Config(
            **sizes, attn_logit_softcapping=0.5, query_pre_attn_scalar=8
        )
        torch.manual_seed(0)
        model = transformers.Gemma2ForCausalLM(config).eval()
    else:
        model = tiny(family)
    policy, ids = parse(policy), random_ids(40)
    with attach(model):
        cache, straight = Cache(model, policy, rollback=9), Cache(model, policy)
        logits(model, cache, ids)
        cache.crop(-1)
        logits(model, straight, ids[:, :39])
        for ours, theirs in zip(cache.caches, straight.caches, strict=True):
            for name, x in ours.lanes[0].tensors().items():
                torch.testing.assert_close(x, theirs.lanes[0].tensors()[name])


def test_undone_columns_are_each_rows_own_tokens(model) -> None:
    ids, other = random_ids(20, batch=2), random_ids(4, batch=2, seed=5)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 17:] = 0  # the last three columns brought row 1 nothing
    with attach(model):
        cache = Cache(model, SinkWindow(2, 9), rollback=5)
        logits(model, cache, ids, attention_mask=mask)
        cache.crop(-4)
        assert sorted(cache.seen) == [16, 16]
        got = logits(model, cache, other)
        straight = Cache(model, SinkWindow(2, 9))
        logits(model, straight, ids[:, :16])
        torch.testing.assert_close(got, logits(model, straight, other), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["smollm3", "cohere2"])
@pytest.mark.parametrize("spec", SPECS)
def test_int4_holds_layers_that_do_not_rotate(family, spec) -> None:
    model, ids = tiny(family), random_ids(120)
    with attach(model):
        got = [
            torch.cat([logits(model, cache, part) for part in ids.split(cuts, dim=1)], 1)
            for cuts in (120, 7)
            for cache in [Cache(model, parse(spec), Int4(group=8))]
        ]
    assert (got[1] - got[0]).abs().median() < 1e-5


def test_lengths_that_change_the_angles_count_among_the_sinks_too() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = tiny("llama", num_hidden_layers=1, rope_parameters=rope, max_position_embeddings=12)
    ids = random_ids(30)
    with attach(model):
        whole, steps = (Cache(model, SinkWindow(20, 5)) for _ in range(2))
        expected = torch.cat([logits(model, steps, part) for part in ids.split(1, 1)], 1)
        torch.testing.assert_close(logits(model, whole, ids), expected, atol=2e-5, rtol=0)


def test_a_saved_journal_is_not_promised(model) -> None:
    ids = random_ids(30)
    with attach(model):
        cache, fresh = (Cache(model, SinkWindow(2, 9), rollback=4) for _ in range(2))
        logits(model, cache, ids)
        fresh.load_state(*cache.state())
        with pytest.raises(ValueError, match="0 tokens can be taken back"):
            fresh.crop(-2)
        logits(model, fresh, ids[:, :3])
        fresh.crop(-2)
        logits(model, cache, ids[:, :1])
        torch.testing.assert_close(
            logits(model, fresh, ids[:, 5:9]), logits(model, cache, ids[:, 5:9]), atol=2e-5, rtol=0
        )


def test_a_state_stays_what_it_was(model) -> None:
    ids = random_ids(40)
    with attach(model):
        cache, fresh = (Cache(model, SinkWindow(2, 9)) for _ in range(2))
        logits(model, cache, ids[:, :30])
        state = cache.state()
        expected = logits(model, cache, ids[:, 30:])
        fresh.load_state(*state)
        assert torch.equal(logits(model, fresh, ids[:, 30:]), expected)


def least_bytes(model, policy, storage) -> int:
    """The smallest max_bytes, as its refusal names it."""
    with pytest.raises(ValueError, match="needs at least") as caught:
        Cache(model, policy, storage, max_bytes=1)
    return int(str(caught.value).split("at least ")[1].split(" ")[0])


def stream(model, cache, ids) -> None:
    """Token by token at first, so that every count is met, then by the hundred."""
    for part in (*ids[:, :500].split(1, 1), *ids[:, 500:].split(100, 1)):
        logits(model, cache, part)


def test_states_that_do_not_fit_change_nothing(model) -> None:
    ids = random_ids(600)
    with attach(model):
        big = Cache(model, KeepAll())
        logits(model, big, ids)
        tensors, meta = big.state()
        small = Cache(model, KeepAll(), max_bytes=least_bytes(model, KeepAll(), Dense()) + 50_000)
        before = logits(model, small, ids[:, :5])
        with pytest.raises(ValueError, match="more than max_bytes allows"):
            small.load_state(tensors, meta)
        fresh = Cache(model, KeepAll())
        logits(model, fresh, ids[:, :5])
        broken = {
            "a layer less": {n: x for n, x in tensors.items() if not n.startswith("1.")},
            "another dtype": {n: x.half() for n, x in tensors.items()},
            "another shape": {n: x[..., :4] for n, x in tensors.items()},
        }
        for state in broken.values():
            with pytest.raises(ValueError, match="tensors don't fit"):
                fresh.load_state(state, meta)
        with pytest.raises(ValueError, match="counts are missing"):
            fresh.load_state(tensors, meta | {"layers": [[{}] for _ in meta["layers"]]})
        window = Cache(model, SinkWindow(2, 9))
        logits(model, window, ids[:, :30])
        tensors, meta = window.state()
        fewer = {n: x[:, :, :6] if ".fields." in n else x for n, x in tensors.items()}
        with pytest.raises(ValueError, match="tensors don't fit"):
            window.load_state(fewer, meta)
        for cache in (small, fresh):
            assert cache.tokens_seen == 5
            assert logits(model, cache, ids[:, 5:6]).isfinite().all()
        assert before.isfinite().all()


def test_growing_the_batch_stays_within_max_bytes(model) -> None:
    ids = random_ids(100)
    with attach(model):
        cache = Cache(model, KeepAll(), max_bytes=4_000_000)
        logits(model, cache, ids)
        with pytest.raises(ValueError, match=r"max_bytes is 4000000; .* for a batch of 500"):
            cache.batch_repeat_interleave(500)
        assert cache.batch_size == 1
        one = cache.caches[0].limit
        cache.batch_repeat_interleave(3)
        limit = cache.caches[0].limit
        assert limit < one
        assert all(lane.limit == cache.caches[0].limit for lane in cache.caches[0].lanes)
        with pytest.raises(RuntimeError, match="all that max_bytes allows"):
            stream(model, cache, random_ids(20_000, batch=3))
        fresh = Cache(model, KeepAll(), max_bytes=4_000_000)
        logits(model, fresh, random_ids(5, batch=3))
        assert limit == fresh.caches[0].limit, "as if it had started with three rows"
        assert cache.tokens_held <= limit
        assert all(x.shape[2] <= limit for x in cache.caches[0].lanes[0].fields.values())
        assert cache.peak_bytes <= 4_000_000


def test_beams_fit_the_budget_that_their_rows_were_planned_for() -> None:
    deep = tiny_llama(num_hidden_layers=16)
    ids = random_ids(20)
    settings = {"max_new_tokens": 6, "num_beams": 4, "do_sample": False}
    with attach(deep):
        with pytest.raises(ValueError, match="needs at least") as caught:
            logits(deep, Cache(deep, SinkWindow(2, 50), max_bytes=5_200_000), random_ids(4, 9999))
        assert "for a batch of 9999" in str(caught.value)
        plain = deep.generate(ids, past_key_values=Cache(deep, SinkWindow(2, 50)), **settings)
        planned = planned_bytes(Cache(deep, SinkWindow(2, 50)), 4, None)
        cache = Cache(deep, SinkWindow(2, 50), max_bytes=planned)
        assert deep.generate(ids, past_key_values=cache, **settings).tolist() == plain.tolist()
        cache.batch_select_indices(torch.tensor([0, 1, 3]))
        assert cache.batch_size == 3


def test_int4_under_a_budget_plans_its_warm_up(model) -> None:
    ids = random_ids(500)
    with attach(model):
        least = least_bytes(model, KeepAll(), Int4(group=8))
        cache = Cache(model, KeepAll(), Int4(group=8), max_bytes=least)
        limit = cache.caches[0].limit
        with pytest.raises(RuntimeError, match=f"full with {limit} tokens"):
            stream(model, cache, ids)
        assert cache.caches[0].limit == limit
        assert cache.tokens_seen >= 68, "what learns the means must fit"


def test_tables_go_with_their_forward(model) -> None:
    ids = random_ids(900)
    with attach(model):
        cache = Cache(model, SinkWindow(2, 300), max_bytes=30_000_000)
        logits(model, cache, ids)
        assert cache.tables.nbytes == 0
        with pytest.raises(ValueError, match="takes the cache's chunk of 64 or less"):
            logits(model.model, Cache(model, Window(9), chunk=64), ids)


class Hooked(torch.nn.Module):
    """Stands for what other libraries do to a module: a forward on the instance."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.calls, forward = 0, module.forward

        def counted(*args, **kwargs):
            self.calls += 1
            return forward(*args, **kwargs)

        module.forward = counted


def test_forwards_that_others_put_on_instances_come_back() -> None:
    model = tiny_llama()
    hooks = [Hooked(m) for m in (model, model.model, model.model.rotary_emb)]
    ids = random_ids(5)
    own = [m.__dict__["forward"] for m in (model, model.model, model.model.rotary_emb)]
    with attach(model):
        logits(model, Cache(model, Window(4)), ids)
    with attach(model, SlidingWindow(3)):
        model(input_ids=ids)
    assert own == [m.__dict__["forward"] for m in (model, model.model, model.model.rotary_emb)]
    before = [hook.calls for hook in hooks]
    model(input_ids=ids)
    assert [hook.calls for hook in hooks] == [n + 1 for n in before]


@pytest.mark.parametrize("chunk", [4, 1000])
def test_masks_are_held_to_what_went_by(model, chunk) -> None:
    ids = random_ids(9, batch=2)
    wide = torch.ones(2, 14, dtype=torch.long)
    left = torch.ones(2, 9, dtype=torch.long)
    left[0, :6] = 0  # the padding ends within the second chunk
    hole, rows = left.clone(), left[:1]
    hole[1, 4] = 0  # at the first chunk's edge
    changed = torch.cat((torch.ones(2, 9, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)), 1)
    with attach(model):
        cache = Cache(model, SinkWindow(2, 9), chunk=chunk)
        for mask, message in (
            (wide, r"attention_mask is \(2, 14\); .*\(2, 9\) is allowed"),
            (rows, r"attention_mask is \(1, 9\)"),
            (hole, "attention_mask has a hole in row 1"),
        ):
            with pytest.raises(ValueError, match=message):
                logits(model, cache, ids, attention_mask=mask)
            assert cache.tokens_seen == 0
        logits(model, cache, ids, attention_mask=left)
        with pytest.raises(ValueError, match="marks past columns otherwise"):
            logits(model, cache, ids[:, :5], attention_mask=changed)
        kept = torch.cat((left, changed[:, 9:]), 1)
        assert logits(model, cache, ids[:, :5], attention_mask=kept).isfinite().all()


def test_a_chunk_that_fails_leaves_no_half_stream(model) -> None:
    ids = random_ids(12)
    with attach(model):
        cache = Cache(model, Window(5), chunk=4)
        with pytest.raises(ValueError, match="position_ids"):
            logits(model, cache, ids, position_ids=torch.arange(12)[None] + (torch.arange(12) > 8))
        assert cache.tokens_seen == 0
        bad = ids.clone()
        bad[0, 9] = 10_000
        with pytest.raises(IndexError):
            logits(model, cache, bad)
        with pytest.raises(RuntimeError, match="half-updated"):
            logits(model, cache, ids)
        cache.reset()
        with pytest.raises(ValueError, match="logits_to_keep is a tensor with 12 tokens"):
            logits(model, cache, ids, logits_to_keep=torch.tensor([3]))
        other = tiny_llama(output_hidden_states=True)
        with attach(other), pytest.raises(ValueError, match="output_hidden_states is given"):
            logits(other, Cache(other, Window(5), chunk=4), ids)


def test_an_error_after_tokens_went_in_is_not_forgotten(model) -> None:
    ids = random_ids(12)
    with attach(model):
        for chunk in (4, 100):
            cache = Cache(model, Window(5), chunk=chunk)
            model.lm_head.forward = lambda x: 1 / 0
            try:
                with pytest.raises(ZeroDivisionError):
                    logits(model, cache, ids)
            finally:
                del model.lm_head.forward
            with pytest.raises(RuntimeError, match="half-updated"):
                logits(model, cache, ids)
        cache = Cache(model, Window(5), chunk=4)
        for wanted, value in (("logits_to_keep", -3), ("output_router_logits", True)):
            with pytest.raises(ValueError, match=f"{wanted} is"):
                logits(model, cache, ids, **{wanted: value})
        bias = torch.zeros(1, 12).masked_fill(torch.arange(12) < 3, -torch.inf)
        with pytest.raises(ValueError, match="attention_mask has other numbers than 0 and 1"):
            logits(model, cache, ids, attention_mask=bias)
        assert cache.tokens_seen == 0
        other = tiny_llama(output_attentions=True)
        with pytest.raises(ValueError, match="output_attentions is True"), attach(other):
            pass


def test_a_decoder_without_a_head_attaches(model) -> None:
    base, ids = tiny_llama().model, random_ids(11)
    with torch.inference_mode():
        expected = base(input_ids=ids).last_hidden_state
        with attach(base):
            cache = Cache(base, KeepAll(), chunk=4)
            got = base(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    with pytest.raises(TypeError, match="storage is 'int8'; Dense"):
        Cache(model, Window(4), "int8")


def test_an_empty_call_of_a_filled_cache_is_refused(model) -> None:
    """What `generate` makes of a prompt that the cache has seen already."""
    with attach(model) as own:
        cache = Cache(own, Window(8))
        logits(own, cache, random_ids(12))
        with pytest.raises(ValueError, match="input_ids has 0 tokens for a cache that has seen 12"):
            logits(own, cache, random_ids(12)[:, :0])
        assert cache.tokens_seen == 12
