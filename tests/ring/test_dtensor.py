"""Ring attention of DTensors against that of one process."""

from __future__ import annotations

from ring import model_tasks as tasks
from ring.crew import crew


def test_dtensors_give_dtensors_and_other_placements_are_refused(tmp_path) -> None:
    with crew(2, tmp_path) as two:
        for window in (3, 12):
            one, other = two.run(tasks.of_dtensors, window)
            assert one["placements"] == {"(Shard(dim=2),)"}
            assert len(one["errors"]) == 5
            assert max(one["errors"]) < 1e-5
    assert one == other
    assert (
        "ValueError: ring_attention: q of (2, 4, 12, 8) has the placements (Shard(dim=1),)"
        in (one["heads"])
    )
    assert one["plain"].startswith("TypeError: ring_attention: v is a Tensor; q, k and v are DTen")
    assert "q has 11 tokens on 2 ranks; a multiple of 2 is allowed (pad" in one["odd"]
    assert "group isn't that of the DTensors' mesh; None is allowed" in one["group"]
