"""A snapshot is the one before or the one after, whatever fails and whenever."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from attnspan.cache import snapshot

META = {"offset": 12345, "nll": 0.1 + 0.2, "name": "héllo", "9": [1, None, True], "10": {}}


def tensors(seed=0):
    torch.manual_seed(seed)
    base = torch.randn(3, 8)
    with torch.inference_mode():
        inferred = torch.randn(2, 3)
    return {
        "plain": base,
        "shared": base,
        "slice": base[1:, ::2],
        "transposed": base.T,
        "expanded": torch.randn(1, 4).expand(3, 4),
        "bf16": torch.randn(5).bfloat16(),
        "codes": torch.randint(0, 255, (2, 2, 4), dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "inferred": inferred,
    }


def same(got, expected):
    return got.keys() == expected.keys() and all(
        got[name].dtype == expected[name].dtype and torch.equal(got[name], expected[name])
        for name in expected
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_of_views_shared_memory_and_inference_tensors(tmp_path):
    snapshot.write(tmp_path / "a" / "b", tensors(), META)
    got, meta = snapshot.read(tmp_path / "a" / "b")
    assert same(got, tensors())
    assert meta == META
    assert snapshot.exists(tmp_path / "a" / "b")
    assert not snapshot.exists(tmp_path)


def test_the_new_one_replaces_the_old_and_its_files(tmp_path):
    (tmp_path / "mine.safetensors").write_text("not ours")
    (tmp_path / "tensors-0123456789abcdef.safetensors.tmp").write_text("left by a killed process")
    for seed in range(3):
        snapshot.write(tmp_path, tensors(seed), {"seed": seed})
        got, meta = snapshot.read(tmp_path)
        assert same(got, tensors(seed))
        assert meta == {"seed": seed}
    ours = [name for name in names(tmp_path) if name.startswith(("tensors", "snapshot"))]
    assert len(ours) == 2
    assert "mine.safetensors" in names(tmp_path)


STEPS = [("fsync", n) for n in range(4)] + [("replace", n) for n in range(2)]


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), SystemExit])
@pytest.mark.parametrize(("call", "nth"), STEPS)
@pytest.mark.parametrize("after", [False, True])
def test_a_fault_at_any_call(tmp_path, monkeypatch, call, nth, fault, after):
    """The nth call of `os.fsync` or `os.replace` fails, before or after it has done its work."""
    snapshot.write(tmp_path, tensors(1), {"seed": 1})
    real, count = getattr(os, call), iter(range(100))

    def fail(*arguments):
        hit = next(count) == nth
        if hit and not after:
            raise fault
        real(*arguments)
        if hit:
            raise fault

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(fault) if isinstance(fault, OSError) else fault):
        snapshot.write(tmp_path, tensors(2), {"seed": 2})
    monkeypatch.undo()
    got, meta = snapshot.read(tmp_path)
    assert same(got, tensors(meta["seed"]))
    # Once the index is renamed, by the second replace, the new snapshot is the one that counts.
    renamed = (call, nth) == ("fsync", 3) or (call == "replace" and nth == 1 and after)
    assert meta["seed"] == (2 if renamed else 1)
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    snapshot.write(tmp_path, tensors(3), {"seed": 3})
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("nth", [0, 1])
def test_a_full_disk_while_writing(tmp_path, monkeypatch, nth):
    """A real ENOSPC: the nth file that is written is /dev/full in disguise."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    snapshot.write(tmp_path, tensors(1), {"seed": 1})
    before = names(tmp_path)
    count = iter(range(100))

    def full(path, mode):
        return open("/dev/full" if next(count) == nth else path, mode)

    monkeypatch.setattr(snapshot, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        snapshot.write(tmp_path, tensors(2), {"seed": 2})
    monkeypatch.undo()
    assert names(tmp_path) == before
    assert snapshot.read(tmp_path)[1] == {"seed": 1}


def test_a_first_write_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        snapshot.write(tmp_path / "new", tensors(), META)
    assert names(tmp_path) == []


def test_killed_while_writing(tmp_path):
    """kill -9 at random moments of a process that does nothing but write."""
    program = (
        "import itertools, sys, torch\n"
        "from attnspan.cache import snapshot\n"
        "for seed in itertools.count():\n"
        "    snapshot.write(sys.argv[1], {'x': torch.full((200_000,), seed)}, {'seed': seed})\n"
        "    print(seed, flush=True)\n"
    )
    for delay in (0.0, 0.013, 0.031):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        written = [0, *map(int, process.stdout.read().split())]
        process.stdout.close()
        process.wait()
        got, meta = snapshot.read(tmp_path)
        assert torch.equal(got["x"], torch.full((200_000,), meta["seed"]))
        assert meta["seed"] >= written[-1]


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no snapshot\.json in it"):
        snapshot.read(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"there is no snapshot\.json in it"):
        snapshot.read(tmp_path / "file")


def test_damage_is_refused(tmp_path):
    snapshot.write(tmp_path, tensors(), META)
    path = next(tmp_path.glob("tensors-*"))
    index = tmp_path / "snapshot.json"
    data, text = path.read_bytes(), index.read_text()
    for broken in (data[:-1], b"", data[:50], data[:-3] + b"\x00\x01\x02", data + b"x"):
        path.write_bytes(broken)
        with pytest.raises(
            ValueError, match=r"its tensor file tensors-\w+\.safetensors is damaged"
        ):
            snapshot.read(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        snapshot.read(tmp_path)
    path.write_bytes(data)
    for old, new in [
        ("12345", "12346"),
        ("attnspan snapshot", "another"),
        ('"version": 1', '"version": 2'),
        (path.name, "../secret.safetensors"),
        (path.name, "/etc/passwd"),
        (text, text[:100]),
        (text, "[]"),
        (text, "{}"),
    ]:
        assert old in text
        index.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=r"snapshot\.json|version"):
            snapshot.read(tmp_path)
    index.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="damaged"):
        snapshot.read(tmp_path)
    index.write_text(text)
    assert snapshot.read(tmp_path)[1] == META


def test_a_digest_of_no_tensors_is_refused(tmp_path):
    """Right digests over a file that is no safetensors: made by hand, or by another program."""
    snapshot.write(tmp_path, tensors(), META)
    path = next(tmp_path.glob("tensors-*"))
    index = json.loads((tmp_path / "snapshot.json").read_text())
    path.write_bytes(b"\x80\x04K\x01.")  # a pickle, as it happens
    index["sha256"] = snapshot.hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "snapshot.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="holds no tensors"):
        snapshot.read(tmp_path)


def test_values_that_json_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        snapshot.write(tmp_path / "new", {}, {"nll": float("nan")})
    assert names(tmp_path) == []
