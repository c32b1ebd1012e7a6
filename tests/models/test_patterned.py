"""Models under patterns against the same models under dense masks."""

from __future__ import annotations

import copy
import gc
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny import FAMILIES, random_ids, tiny, tiny_llama
from torch import Tensor

import attnspan.models.patterned
from attnspan import Cache, KeepAll, attach
from attnspan.patterns import (
    Blockwise,
    Causal,
    Documents,
    Pattern,
    Sinks,
    SlidingWindow,
    Strided,
)

N = 40
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def own(model) -> list[Pattern]:
    """The patterns that the model has by itself."""
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 4
    sliding = len(set(kinds)) > 1 or kinds[0] == "sliding_attention"
    window = getattr(model.config, "sliding_window", None)
    return [
        SlidingWindow(window)
        if window and (kind == "sliding_attention" or not sliding)
        else Causal()
        for kind in kinds
    ]


def dense(pattern: Pattern, n: int = N) -> Tensor:
    """An additive mask of `(1, 1, n, n)`."""
    seen = pattern.sees(torch.arange(n)[:, None], torch.arange(n))
    return torch.zeros(1, 1, n, n).masked_fill(~seen, -torch.inf)


def gradients(model, **inputs) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_its_own_patterns_give_the_untouched_model_and_gradients(family) -> None:
    model, ids = tiny(family).train(), random_ids(N, batch=2)
    logits, grads = gradients(model, input_ids=ids, labels=ids)
    with attach(model, own(model)):
        got, got_grads = gradients(model, input_ids=ids, labels=ids)
    torch.testing.assert_close(got, logits, **CLOSE)
    torch.testing.assert_close(got_grads, grads, **CLOSE)
    assert model.training
    torch.testing.assert_close(gradients(model, input_ids=ids, labels=ids)[0], logits)


@pytest.mark.parametrize(
    "pattern", [SlidingWindow(7) | Sinks(2), Strided(3, 5), Blockwise(8, before=True)], ids=str
)
def test_any_pattern_equals_its_dense_mask(pattern) -> None:
    model, ids = tiny("llama"), random_ids(N)
    logits, grads = gradients(model, input_ids=ids, labels=ids, attention_mask=dense(pattern))
    with attach(model, pattern):
        got, got_grads = gradients(model, input_ids=ids, labels=ids)
    torch.testing.assert_close(got, logits, **CLOSE)
    torch.testing.assert_close(got_grads, grads, **CLOSE)


def test_layers_may_differ_by_list_or_by_layer_type() -> None:
    model, ids = tiny("cohere2"), random_ids(N)
    kinds = {"sliding_attention": SlidingWindow(5), "full_attention": SlidingWindow(9) | Sinks(1)}
    masks = {kind: dense(pattern) for kind, pattern in kinds.items()}
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=masks).logits
        with attach(model, kinds):
            torch.testing.assert_close(model(input_ids=ids).logits, expected, **CLOSE)
        with attach(model, [kinds[kind] for kind in model.config.layer_types]):
            torch.testing.assert_close(model(input_ids=ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "cohere2", "gpt_oss"])
def test_padding_and_packed_documents_stand_for_themselves(family) -> None:
    model, ids = tiny(family), random_ids(N, batch=3)
    mask = torch.ones(3, N, dtype=torch.long)
    mask[0, :7], mask[1, 33:] = 0, 0
    # Places count from a document's first token, so sinks are its own.
    pattern = SlidingWindow(6) | Sinks(2)
    packed = torch.cat([torch.arange(15), torch.arange(25)])[None]
    with torch.no_grad(), attach(model, pattern):
        padded = model(input_ids=ids, attention_mask=mask).logits
        documents = model(input_ids=ids, position_ids=packed).logits
        for row, tokens in ((0, slice(7, N)), (1, slice(0, 33)), (2, slice(0, N))):
            alone = model(input_ids=ids[row : row + 1, tokens]).logits
            torch.testing.assert_close(padded[row : row + 1, tokens], alone, **CLOSE)
        for tokens in (slice(0, 15), slice(15, N)):
            torch.testing.assert_close(
                documents[:, tokens], model(input_ids=ids[:, tokens]).logits, **CLOSE
            )
        whole = model(input_ids=ids).logits
    assert not torch.allclose(documents[:, 15:], whole[:, 15:], atol=1e-2)
    with torch.no_grad(), attach(tiny("llama"), Documents((15, 25))) as llama:
        torch.testing.assert_close(
            llama(input_ids=ids[:1]).logits[:, :15], tiny("llama")(input_ids=ids[:1, :15]).logits
        )


def checkpointed(family: str) -> Any:
    """A model in training whose layers run again for their gradients."""
    model = tiny(family).train()
    # Older releases of transformers know it by its older name, and newer ones warn of that.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()
    return model


def in_another_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_backward_may_run_in_another_thread(family) -> None:
    # As that of CUDA does: autograd has a thread of its own for each device.
    model, plain = checkpointed(family), tiny(family).train()
    ids, mask = random_ids(N, batch=2), torch.ones(2, N, dtype=torch.long)
    mask[0, :9] = 0
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    with attach(plain, SlidingWindow(5) | Sinks(1)):
        _, grads = gradients(plain, **inputs)
    with attach(model, SlidingWindow(5) | Sinks(1)):
        loss = model(**inputs, use_cache=False).loss
        in_another_thread(loss.backward)
    torch.testing.assert_close(
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        grads,
        **CLOSE,
    )


def test_forward_may_run_in_another_thread() -> None:
    model, ids = tiny("llama"), random_ids(N, batch=2)
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, 30:] = 0

    def forward() -> Tensor:
        with torch.no_grad():  # which each thread has for itself
            return model(input_ids=ids, attention_mask=mask).logits

    with attach(model, SlidingWindow(5)):
        torch.testing.assert_close(in_another_thread(forward), forward(), rtol=0, atol=0)


def test_two_models_at_once_have_a_pattern_each() -> None:
    models, ids = (tiny("llama", seed=0), tiny("llama", seed=1)), random_ids(N)
    patterns = (SlidingWindow(5), SlidingWindow(9) | Sinks(2))
    with torch.no_grad():
        alone = []
        for model, pattern in zip(models, patterns, strict=True):
            with attach(model, pattern):
                alone.append(model(input_ids=ids).logits)
        with attach(models[0], patterns[0]), attach(models[1], patterns[1]):
            together = [model(input_ids=ids).logits for model in models]
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_autocast_is_honoured_as_by_the_untouched_model(family) -> None:
    model, ids = tiny(family).train(), random_ids(N, batch=2)
    inputs = {"input_ids": ids, "labels": ids}
    exact, exact_grads = gradients(model, **inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, grads = gradients(model, **inputs)
        with attach(model, own(model)):
            got, got_grads = gradients(model, **inputs)
    # torch advises to leave autocast before the backward pass.
    model.zero_grad()
    with attach(model, own(model)), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, use_cache=False).loss
        with torch.autocast("cpu", enabled=False):
            loss.backward()
    outside = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.dtype == logits.dtype == torch.bfloat16
    assert got_grads.keys() == grads.keys() == outside.keys()
    # bfloat16 rounds both, each in its own way: neither may be much farther from the exact one.
    assert distance(got, exact) < 2 * distance(logits, exact)
    for name, grad in grads.items():
        allowed = 3 * distance(grad, exact_grads[name]) + 0.01
        assert distance(got_grads[name], exact_grads[name]) < allowed, name
        assert distance(outside[name], exact_grads[name]) < allowed, name


# The compiler's own: it asks tensors for a gradient, and imports what may be deprecated already.
@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore::DeprecationWarning")
def test_layers_compile_without_a_break() -> None:
    model, ids = tiny_llama().train(), random_ids(N, batch=2)
    with attach(model, SlidingWindow(8)):
        _, plain = gradients(model, input_ids=ids, labels=ids)
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend="eager")
        _, compiled = gradients(model, input_ids=ids, labels=ids)
    for name, grad in plain.items():
        torch.testing.assert_close(compiled[name], grad, **CLOSE)


def distance(x: Tensor, exact: Tensor) -> float:
    """The error's norm, as a share of the exact one's."""
    return float((x.float() - exact).norm() / exact.norm())


def test_nothing_grows_with_the_forwards() -> None:
    model, ids = tiny_llama(), random_ids(6)

    def held(forwards: int) -> int:
        for _ in range(forwards):
            model(input_ids=ids, use_cache=False)
        gc.collect()
        ours = tracemalloc.Filter(True, "*/attnspan/models/*")
        traces = tracemalloc.take_snapshot().filter_traces([ours])
        return sum(each.size for each in traces.statistics("filename"))

    tracemalloc.start()
    try:
        with torch.no_grad(), attach(model, SlidingWindow(3)):
            before = held(10)
            assert held(200) - before < 1000
    finally:
        tracemalloc.stop()


def test_activation_checkpoints_find_the_rows_of_their_own_forward() -> None:
    model, plain = checkpointed("llama"), tiny("llama").train()
    ids = random_ids(N, batch=2)
    masks = [torch.ones(2, N, dtype=torch.long) for _ in range(2)]
    masks[1][:, :9] = 0
    for each in (model, plain):
        with attach(each, SlidingWindow(5)):
            # Both forwards run before either backward.
            losses = [each(input_ids=ids, labels=ids, attention_mask=m).loss for m in masks]
            sum(losses).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)


@pytest.mark.parametrize("family", ["mistral-sliding", "gemma3"])
def test_fifty_steps_of_training_lose_as_under_a_dense_mask(family) -> None:
    torch.manual_seed(0)
    batches = torch.randint(2, 64, (50, 2, N), generator=torch.Generator().manual_seed(3))
    batches = batches // 8 * 8 + 2  # something to learn: eight tokens of sixty-four
    losses = []
    for under in (False, True):
        model = tiny(family).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        untouched = copy.deepcopy(model.config)
        with attach(model, own(model)) if under else torch.enable_grad():
            run = []
            for ids in batches:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.append(loss.item())
        losses.append(run)
        assert model.config.to_dict() == untouched.to_dict()
    assert losses[0][-1] < losses[0][0] - 1
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-4)


def test_all_is_undone_after_an_exception() -> None:
    model, ids = tiny("llama"), random_ids(5)
    before = model(input_ids=ids).logits
    with pytest.raises(RuntimeError, match="mine"), attach(model, Causal()):
        raise RuntimeError("mine")
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert not any("forward" in m.__dict__ for m in model.modules())
    with attach(model), pytest.raises(ValueError, match="attached already"), attach(model):
        pass


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("causal", TypeError, "pattern is 'causal'; a Pattern, a list of one for each layer"),
        ([Causal()], ValueError, "pattern has 1 layers; the model's 2 are allowed"),
        ({"full_attention": Causal()}, ValueError, "no mapping, since the config has none"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(pattern, error, message) -> None:
    with pytest.raises(error, match=message), attach(tiny_llama(), pattern):
        pass


def test_calls_that_a_pattern_can_not_honour_are_refused() -> None:
    model, ids = tiny_llama(), random_ids(6)
    with torch.no_grad(), attach(model, Causal()):
        past = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="past_key_values holds 6 tokens; none are allowed"):
            model(input_ids=ids, past_key_values=past)
        hole = torch.tensor([[1, 1, 0, 1, 1, 1]])
        with pytest.raises(ValueError, match="attention_mask has a hole"):
            model(input_ids=ids, attention_mask=hole)
        with pytest.raises(ValueError, match=r"attention_mask is \(1, 5\); .* \(1, 6\) is allowed"):
            model(input_ids=ids, attention_mask=hole[:, :5])
        with pytest.raises(ValueError, match="output_attentions is True"):
            model(input_ids=ids, output_attentions=True)
    with pytest.raises(RuntimeError, match="not attached"):
        model(input_ids=ids, past_key_values=Cache(model, KeepAll()))
    dropping = tiny_llama(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"drops out at random"), attach(dropping, Causal()):
        dropping(input_ids=ids)


def test_the_check_can_fail(monkeypatch) -> None:
    def wrong(q, k, v, pattern, **options):
        return right(q, k, v, SlidingWindow(3), **options)

    right = attnspan.models.patterned.attention
    monkeypatch.setattr(attnspan.models.patterned, "attention", wrong)
    with pytest.raises(ValueError, match="gives other outputs"), attach(tiny_llama(), Causal()):
        pass
