"""Models over the processes of a ring against the same models in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ring import model_tasks as tasks
from ring.crew import Crew, crew
from tiny import random_ids, tiny, tiny_llama
from torch import Tensor

from attnspan.models.interface import Interface
from attnspan.models.ring_probe import examine
from attnspan.models.ringed import _layout_for
from attnspan.patterns import Causal, Documents, Full, Longformer, Sinks, SlidingWindow
from attnspan.ring.layout import Contiguous, Striped, ZigZag

N = 24
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "max_position_embeddings": 14,  # so that the last tokens change the frequencies of all
}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Iterator[Crew]:
    with crew(2, tmp_path_factory.mktemp("two")) as made:
        yield made


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Iterator[Crew]:
    with crew(4, tmp_path_factory.mktemp("four")) as made:
        yield made


def labelled(n: int = N, batch: int = 2) -> dict[str, Any]:
    """Targets across all edges of shards, and ignored ones on either side of an edge."""
    ids = random_ids(n, batch)
    labels = ids.clone()
    labels[0, n // 4 : n // 4 + 3] = -100
    labels[-1, n // 2 - 2 : n // 2] = -100
    return {"input_ids": ids, "labels": labels}


def mean(answers: list[tasks.Answer]) -> dict[str, Tensor]:
    """What DDP or FSDP2 make of the gradients."""
    return {name: sum(a[2][name] for a in answers) / len(answers) for name in answers[0][2]}  # type: ignore[misc]


def assert_same(answers: list[tasks.Answer], expected: tasks.Answer, layout: Any) -> None:
    logits, loss, grads = expected
    torch.testing.assert_close(layout.unshard([a[0] for a in answers], 1), logits, **CLOSE)
    for answer in answers:
        torch.testing.assert_close(answer[1], loss, **CLOSE)
        assert loss is None or torch.equal(answer[1], answers[0][1])
    torch.testing.assert_close(mean(answers), grads, **CLOSE)


@pytest.mark.parametrize(
    ("family", "layout", "changes"),
    [
        ("llama", Contiguous(), {}),
        ("llama", ZigZag(), {}),
        ("llama", Striped(), {}),
        ("llama", ZigZag(), DYNAMIC),
        ("llama", Contiguous(), DYNAMIC),
        ("mistral-sliding", Contiguous(), {}),
        ("mistral-sliding", ZigZag(), {}),
        ("qwen3", ZigZag(), {}),
        ("gemma3", Contiguous(), {}),
        ("gemma3", ZigZag(), {}),
        ("gpt_oss", ZigZag(), {}),
    ],
    ids=str,
)
def test_two_processes_give_what_one_gives(two, family, layout, changes) -> None:
    inputs = labelled()
    answers = two.run(tasks.in_ring, family, layout, inputs, None, changes)
    assert_same(answers, tasks.alone(family, inputs, **changes), layout)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_four_processes_give_what_one_gives(four, family) -> None:
    answers = four.run(tasks.in_ring, family, ZigZag(), labelled())
    assert_same(answers, tasks.alone(family, labelled()), ZigZag())


def test_a_bare_group_has_the_layout_that_suits_the_patterns(two) -> None:
    for family, layout in (("mistral-sliding", Contiguous()), ("llama", ZigZag())):
        answers = two.run(tasks.in_ring, family, None, labelled())
        assert_same(answers, tasks.alone(family, labelled()), layout)
    window = SlidingWindow(4096)
    assert _layout_for((window, window | Sinks(4))) == Contiguous()
    assert _layout_for((Longformer(512, global_tokens=(0,)),)) == Contiguous()
    for far in (Causal(), Full(), Documents((40,)), SlidingWindow(2**19)):
        assert _layout_for((window, far)) == ZigZag()


@pytest.mark.parametrize("layout", [Contiguous(), ZigZag()], ids=str)
def test_any_pattern_takes_the_place_of_the_models_own(two, layout) -> None:
    pattern = SlidingWindow(7) | Sinks(2)
    answers = two.run(tasks.in_ring, "qwen2", layout, labelled(), pattern)
    assert_same(answers, tasks.alone("qwen2", labelled(), pattern), layout)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_that_run_again_for_their_gradients_exchange_again(two, family) -> None:
    answers = two.run(tasks.in_ring, family, ZigZag(), labelled(), None, {}, True)
    assert_same(answers, tasks.alone(family, labelled()), ZigZag())


@pytest.mark.parametrize("batch", [1, 2])
def test_positions_that_start_again_are_documents(two, batch) -> None:
    lengths = [(15, 9), (5, 19)][:batch]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    inputs = {**labelled(batch=batch), "position_ids": positions}
    answers = two.run(tasks.in_ring, "mistral-sliding", Contiguous(), inputs)
    own = SlidingWindow(12)
    expected = tasks.alone("mistral-sliding", inputs, own)
    assert_same(answers, expected, Contiguous())
    whole = {**inputs, "position_ids": torch.arange(N)[None]}
    assert abs(tasks.alone("mistral-sliding", whole, own)[1] - expected[1]) > 1e-3
    # The same documents as a pattern of its own.
    if batch == 1:
        pattern = own & Documents((15, 9))
        answers = two.run(tasks.in_ring, "mistral-sliding", Contiguous(), inputs, pattern)
        assert_same(answers, expected, Contiguous())


def test_labels_may_come_shifted_or_counted_or_all_on_one_process(two) -> None:
    inputs = labelled()
    alone = tasks.alone("llama", inputs)
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    given = {"input_ids": inputs["input_ids"], "labels": shifted, "shift_labels": shifted}
    assert_same(two.run(tasks.in_ring, "llama", ZigZag(), given), alone, ZigZag())
    counted = {**inputs, "num_items_in_batch": 100}
    expected = tasks.alone("llama", counted)
    assert expected[1] < alone[1] / 2
    assert_same(two.run(tasks.in_ring, "llama", ZigZag(), counted), expected, ZigZag())
    inputs["labels"][:, : N // 2 + 1] = -100
    expected = tasks.alone("llama", inputs)
    assert_same(two.run(tasks.in_ring, "llama", Contiguous(), inputs), expected, Contiguous())


def test_embeddings_and_calls_without_labels(two) -> None:
    embeds = tiny("llama").get_input_embeddings()(random_ids(N, 2)).detach()
    ones = torch.ones(2, N, dtype=torch.long)
    for inputs in ({"inputs_embeds": embeds}, {"inputs_embeds": embeds, "attention_mask": ones}):
        answers = two.run(tasks.in_ring, "llama", ZigZag(), inputs)
        assert_same(answers, tasks.alone("llama", inputs), ZigZag())


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("over", ["all processes", "both dimensions", "rows", "ring"])
def test_fsdp_and_rings_on_a_mesh_of_two_dimensions(four, over, again) -> None:
    inputs = labelled()
    inputs["labels"][0, :3] = -100  # as many targets in both rows: the mean of means is the mean
    inputs["labels"][1, :4] = -100
    answers = four.run(tasks.sharded, "llama", over, inputs, again)
    _, loss, grads = tasks.alone("llama", inputs, num_hidden_layers=2)
    torch.testing.assert_close((answers[0][1] + answers[2][1]) / 2, loss, **CLOSE)
    torch.testing.assert_close(mean(answers), grads, **CLOSE)
    if over in ("all processes", "both dimensions"):  # FSDP2 took the whole mean
        torch.testing.assert_close(answers[1][2], grads, **CLOSE)


def test_autocast_is_honoured_as_by_one_process(two) -> None:
    inputs = labelled()
    exact = tasks.alone("llama", inputs)[2]
    with tasks.autocast(torch.bfloat16):
        alone = tasks.alone("llama", inputs)[2]
    args = ("llama", ZigZag(), inputs, None, {}, False, "", torch.bfloat16)
    answers = two.run(tasks.in_ring, *args)
    assert answers[0][0].dtype == torch.bfloat16
    for name, grad in mean(answers).items():
        # bfloat16 rounds both, each in its own way: the ring's may not be much farther off.
        allowed = 2 * float((alone[name] - exact[name]).norm()) + 0.01 * float(exact[name].norm())
        assert float((grad - exact[name]).norm()) < allowed, name


@pytest.mark.parametrize(
    "wrong",
    ["labels shifted after sharding", "positions of the shard", "gradients unscaled"],
)
def test_mistakes_are_seen(two, wrong) -> None:
    answers = two.run(tasks.in_ring, "llama", Contiguous(), labelled(), None, {}, False, wrong)
    with pytest.raises(AssertionError):
        assert_same(answers, tasks.alone("llama", labelled()), Contiguous())


def test_calls_that_a_ring_can_not_honour_are_refused_on_all_ranks_alike(two) -> None:
    ids = torch.arange(8)[None]
    ones = torch.ones(1, 8, dtype=torch.long)
    calls = {
        "use_cache is given; a ring keeps no keys": {"use_cache": True},
        "past_key_values is given; a ring keeps no keys": {"past_key_values": object()},
        "logits_to_keep is 1; in a ring every rank gives its own tokens": {"logits_to_keep": 1},
        "output_attentions is True; in a ring no rank has them": {"output_attentions": True},
        "token_type_ids is given, and a ring doesn't know how": {"token_type_ids": ids},
        "attention_mask marks padding, which a ring doesn't": {"attention_mask": ones * (ids > 2)},
        "attention_mask is (1, 7); None, or (1, 8), is allowed": {"attention_mask": ones[:, 1:]},
        "position_ids is (7,); (1, 8), or (1, 8), is allowed": {"position_ids": ids[0, 1:]},
        "labels is (1, 7); (1, 8) is allowed": {"labels": ids[:, 1:]},
        "input_ids and inputs_embeds are given; one": {"inputs_embeds": torch.zeros(1, 8, 32)},
        "input_ids is (8,); the whole (batch, n) is allowed": {"input_ids": ids[0]},
        "ZigZag: 6 tokens on 2 ranks; a multiple of 4 is allowed (pad": {"input_ids": ids[:, :6]},
        "rank 1 calls with input_ids (1, 8) with checksum": {"on 1": {"input_ids": ids + 1}},
        "labels (1, 8) with checksum": {"on 1": {"labels": ids}},
        "position_ids (1, 8) with checksum": {"on 1": {"position_ids": ids}},
        "num_items_in_batch 9": {"on 1": {"num_items_in_batch": 9}},
        "arguments refused (use_cache is given": {"on 1": {"use_cache": True}},
    }
    said = two.run(tasks.refusals, [{"input_ids": ids, **call} for call in calls.values()])
    for expected, *heard in zip(calls, *said, strict=True):
        assert heard[0] == heard[1]
        assert expected in heard[0]
        kind = "RingMismatch: " if "on 1" in calls[expected] else "ValueError: "
        assert heard[0].startswith(kind)


def test_models_that_do_not_fit_are_refused_on_all_ranks_alike(two) -> None:
    one, other = two.run(tasks.refused_attachments)
    assert one == other
    assert "the models of ranks 0 and 1 give other logits for the same tokens" in one["weights"]
    assert "rank 1 calls with pattern" in one["patterns"]
    assert "refused (pattern has 1 layers; the model's 2 are allowed)" in one["layers"]
    assert one["ring"].startswith("TypeError: ")
    assert "drops out at random" in one["dropout"]


def test_patterns_that_count_from_the_start_do_not_go_with_documents(two) -> None:
    positions = torch.cat([torch.arange(15), torch.arange(9)])[None]
    inputs = {"input_ids": random_ids(N), "position_ids": positions}
    pattern = SlidingWindow(7) | Sinks(2)
    with pytest.raises(AssertionError, match="tokens that count from the start of the whole"):
        two.run(tasks.in_ring, "llama", ZigZag(), inputs, pattern)


def test_the_probe_refuses_what_mixes_tokens_outside_of_attention() -> None:
    model = tiny_llama()
    examine(model, Interface(model))
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x + 0.5 * x.roll(1, dims=1))
    with pytest.raises(ValueError, match="other outputs where it holds some of the tokens only"):
        examine(model, Interface(model))


@pytest.mark.parametrize("kind", ["chunked_attention", "full_attention"])
def test_layers_whose_pattern_is_not_known_are_refused(kind) -> None:
    model = tiny("mistral-sliding")
    found = examine(model, Interface(model))
    assert found.own_patterns(model.config) == (SlidingWindow(12),) * 4
    assert found.no_loss is None
    model.config.layer_types = [kind] * 4
    with pytest.raises(ValueError, match=f"layer 0 of model type 'mistral' is '{kind}' with a win"):
        found.own_patterns(model.config)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_lost_process_is_named_with_the_layer(tmp_path, when) -> None:
    with crew(2, tmp_path) as pair:
        [heard] = pair.run(tasks.killed, 2, when, left=1)
    assert heard["ranks"] == (1,)
    assert heard["layer"] == 2, heard["text"]
    assert "rank 1 lost" in heard["text"]


def test_all_is_undone_and_parts_are_refused(two) -> None:
    assert two.run(tasks.undone) == [True, True]
