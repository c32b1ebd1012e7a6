"""`attnspan ring simulate`: its table, its JSON, its exit codes, and what it doesn't load."""

import json
import subprocess
import sys

import pytest

from attnspan.cli import main

SIMULATE = ["ring", "simulate"]


def rows(capsys: pytest.CaptureFixture[str], *more: str) -> list[dict]:
    assert main([*SIMULATE, *more, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)["rows"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SIMULATE, "--devices", "1..1024", "--context", "1M", "--link", "ib"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "mistral-7b, prefill of 1,048,576 tokens, zigzag" in out
    assert "32 x SlidingWindow(4096)" in out
    assert "https://arxiv.org/abs/2411.01783" in out
    assert "ring: from 128 devices on communication that nothing hides" in out
    assert "64 devices: ulysses trades 32 query heads among 64 ranks" in out
    lines = [line.split()[:2] for line in out.splitlines() if line[:7].strip().isdigit()]
    assert [line for line in lines if line[1] == "ring"] == [[str(2**k), "ring"] for k in range(11)]
    assert ["32", "ulysses"] in lines


def test_json_file_and_schedules(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    file = tmp_path / "out.json"
    given = ["--devices", "2,6", "--context", "96K", "--model", "llama-2-7b"]
    assert main([*SIMULATE, *given, "--schedule", "2x1", "--json", str(file)]) == 2
    assert "schedule 2x1 is for 2 ranks, not 6" in capsys.readouterr().err
    assert not file.exists()
    assert main([*SIMULATE, *given, "--schedule", "ring", "--json", str(file)]) == 0
    held = json.loads(file.read_text())
    assert held.keys() == {"meta", "rows", "refused"}
    assert held["meta"]["context"] == 98_304
    assert held["meta"]["link"]["name"] == "ib"
    assert [row["devices"] for row in held["rows"]] == [2, 6]
    capsys.readouterr()
    assert len(rows(capsys, *given, "--schedule", "auto")) == 2
    assert [row["devices"] for row in rows(capsys, "--schedule", "2x4")] == [8]
    assert [row["schedule"] for row in rows(capsys, "--devices", "8", "--schedule", "4x2")] == [
        "4x2"
    ]


def test_hosts_of_eight(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", "llama-3.1-405b", "--device", "h100-500w", "--tensor-parallel", "8"]
    given += ["--devices", "1..128", "--context", "1_000_000", "--schedule", "ring"]
    found = rows(capsys, *given)
    assert [row["devices"] for row in found] == [8, 16, 32, 64, 128]
    assert [row["fits"] for row in found] == [False] * 5
    small = rows(capsys, *given, "--weights", "fp8")
    assert small[-1]["fits"]
    assert main([*SIMULATE, *given]) == 0
    out = capsys.readouterr().out
    assert "weights alone take 94.5: share them among more (--tensor-parallel)" in out
    assert "Each rank of the ring is 8 devices" in out


def test_a_measured_link(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    file = tmp_path / "check.json"
    held = {
        "format": "attnspan-machine-1",
        "link": {"latency_s": 1e-3, "bandwidth_bytes_per_s": 1e9},
        "device": {"forward_flop_per_s": 1e11},
    }
    file.write_text(json.dumps(held))
    found = rows(capsys, "--link", str(file), "--devices", "2", "--context", "4K")
    assert found[0]["fits"] is None
    assert found[0]["attention"] > 1


def test_patterns_and_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--devices", "8", "--schedule", "ring", "--context", "64K"]
    streaming = rows(capsys, *given, "--pattern", "SlidingWindow(508) | Sinks(4)")
    striped = rows(capsys, *given, "--pattern", "Causal()", "--layout", "striped")
    assert streaming[0]["sent"] < striped[0]["sent"] / 20
    assert main([*SIMULATE, *given, "--pattern", "Strided(512, 128)"]) == 0
    assert "Pairs and keys of a stride are estimates." in capsys.readouterr().out


BAD = {
    "model": (["--model", "gpt-5"], "model 'gpt-5' is not known; close are "),
    "context": (["--context", "1G"], "context '1G' is no number of tokens"),
    "devices": (["--devices", "few"], "devices 'few' is neither a list such as 1,2,4 nor"),
    "too many": (["--devices", "2048"], "devices has 2048 in it; at most 1024 are allowed"),
    "link": (["--link", "pcie"], "link 'pcie' is not known; allowed are nvlink, ib, eth"),
    "device": (["--device", "tpu"], "device 'tpu' is not known; allowed are h200"),
    "pattern": (["--pattern", "Widow(4)"], "pattern 'Widow(4)' has 'Widow(4)' in it"),
    "no closed form": (["--pattern", "~Causal()"], "pattern ~Causal() has no closed form"),
    "layout": (["--layout", "spiral"], "layout 'spiral' is not known; allowed are contiguous"),
    "striped window": (["--layout", "striped"], "Causal() and Full() are allowed"),
    "schedule": (["--schedule", "star"], "'star' is not known; allowed are ring, allgather, uly"),
    "schedules": (["--schedule", "0x4"], "RxU such as 2x4, auto and all"),
    "heads": (["--schedule", "ulysses", "--devices", "64"], "32 query heads among 64 ranks"),
    "no tensor": (["--tensor-parallel", "0"], "'--tensor-parallel': 0 is given; a whole number"),
    "tensor": (["--tensor-parallel", "3"], "tensor-parallel is 3; mistral-7b has 32 query heads"),
    "weights": (["--weights", "int3"], "weights 'int3'; allowed are bf16, fp8"),
    "json": (["--json", "none/out.json"], "there is no folder none"),
    "option": (["--nonesuch"], "No such option"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_2(capfd: pytest.CaptureFixture[str], case: str) -> None:
    arguments, expected = BAD[case]
    assert main([*SIMULATE, *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("attnspan: ")
    assert err.count("\n") == 1
    assert expected in err


FRESH = (
    "import sys, time\n"
    "from attnspan.cli import main\n"
    "code = main(['ring', 'simulate', *{arguments}])\n"
    "heavy = {{'torch', 'transformers', 'matplotlib', 'rich', 'pydantic'}} & set(sys.modules)\n"
    "print(sorted(heavy), code, time.process_time(), file=sys.stderr)\n"
)


@pytest.mark.parametrize(("arguments", "times"), [(["--devices", "1..64"], 3.0), ([], 6.0)])
def test_it_answers_at_once_and_loads_no_torch(arguments: list[str], times: float) -> None:
    """In processor seconds of the whole process, beside one that only loads what it is made of.

    Measured: 1.7 and 3 times as many; torch alone would make it 15.
    """

    def spent(program: str) -> float:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        heavy, code, seconds = done.stderr.rsplit(maxsplit=2)
        assert (heavy, code) == ("[]", "0"), done.stderr
        return float(seconds)

    bare = "import sys, time, numpy, click\nprint([], 0, time.process_time(), file=sys.stderr)\n"
    program = FRESH.format(arguments=arguments)
    pairs = [(spent(program), spent(bare)) for _ in range(5)]
    assert min(a for a, _ in pairs) < times * min(b for _, b in pairs)


def test_a_reader_may_leave(tmp_path) -> None:
    command = [sys.executable, "-m", "attnspan", *SIMULATE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() in (0, 1)
