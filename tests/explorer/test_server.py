"""The explorer's server: what it gives, and what it refuses."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
from starlette.testclient import TestClient

from attnspan.explorer import live, recording, server
from attnspan.explorer.record import LIMIT, kept, record
from attnspan.models.loading import load
from attnspan.planner.plan import plan

PORT = 8517
HOME = f"http://127.0.0.1:{PORT}"
SMALL = {"policy": "window:32", "storage": "int8", "text": "def a_function(self):\n" * 20}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    text = b"import this\n" * 40
    return record(*load("bundled", "cpu"), text, [kept("window:32")], title="a text", limit=300)


@pytest.fixture(scope="module")
def client(made: dict[str, Any]) -> TestClient:
    return TestClient(server.application(PORT, {"small": made}), base_url=HOME)


def test_the_page_and_its_files(client: TestClient) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/app.js", "text/javascript"),
        ("/app.css", "text/css"),
    ):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert client.head(path).status_code == 200


def test_the_data(client: TestClient, made: dict[str, Any]) -> None:
    page = client.get("/api/page.json").json()
    assert page["presets"]
    assert page["recordings"] == [recording.head(made, "small")]
    assert page["live"]["limit"] == LIMIT
    assert client.get("/api/recordings/small.json").json() == made


def test_every_answer_says_what_a_browser_may_do(client: TestClient) -> None:
    for answer in (
        client.get("/"),
        client.get("/api/page.json"),
        client.get("/nothing"),
        client.post("/"),
        client.get("/api/plan"),
        client.get("/", headers={"host": "example.org"}),
    ):
        policy = answer.headers["content-security-policy"]
        parts = dict(part.split(" ", 1) for part in policy.split("; "))
        assert parts["default-src"] == parts["base-uri"] == parts["frame-ancestors"] == "'none'"
        assert parts["script-src"] == parts["style-src"] == parts["connect-src"] == "'self'"
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_page_needs_no_more_than_its_policy_allows(client: TestClient) -> None:
    index = client.get("/").text
    assert "<script>" not in index
    assert "style=" not in index
    assert "http" not in index.replace("http-equiv", "")
    assert "@import" not in client.get("/app.css").text
    assert "url(http" not in client.get("/app.css").text


@pytest.mark.parametrize("host", [f"127.0.0.1:{PORT}", f"localhost:{PORT}", f"[::1]:{PORT}"])
def test_its_own_names(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200
    assert client.get("/", headers={"host": host.upper()}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "example.org",
        f"example.org:{PORT}",
        "127.0.0.1",
        f"127.0.0.1:{PORT + 1}",
        f"127.0.0.1.example.org:{PORT}",
        f"127.0.0.2:{PORT}",
        f"0.0.0.0:{PORT}",
        f"user@127.0.0.1:{PORT}",
        "",
    ],
)
def test_a_host_that_is_another(client: TestClient, host: str) -> None:
    for path in ("/", "/api/page.json", "/nothing"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == 403
        assert "Host" in answer.text


@pytest.mark.parametrize(
    "origin",
    [
        "https://example.org",
        "null",
        f"https://127.0.0.1:{PORT}",
        f"http://127.0.0.1:{PORT + 1}",
        "http://localhost",
        f"http://127.0.0.1:{PORT}.example.org",
        "",
    ],
)
def test_an_origin_that_is_another(client: TestClient, origin: str) -> None:
    for path in ("/", "/api/page.json"):
        assert client.get(path, headers={"origin": origin}).status_code == 403
    assert client.post("/api/stream", json=SMALL, headers={"origin": origin}).status_code == 403
    answer = client.options("/api/stream", headers={"origin": origin})
    assert answer.status_code == 403


def test_its_own_origin(client: TestClient) -> None:
    assert client.get("/api/page.json", headers={"origin": HOME}).status_code == 200
    asked = {"origin": f"http://localhost:{PORT}", "host": f"localhost:{PORT}"}
    assert client.get("/api/page.json", headers=asked).status_code == 200


def test_another_site_may_link_to_the_page_and_no_more(client: TestClient) -> None:
    for site in ("cross-site", "same-site"):
        asked = {"sec-fetch-site": site}
        assert client.get("/", headers=asked).status_code == 200
        for path in ("/app.js", "/api/page.json", "/api/plan?model=mistral-7b&context=1K"):
            assert client.get(path, headers=asked).status_code == 403
    for site in ("same-origin", "none"):
        assert client.get("/api/page.json", headers={"sec-fetch-site": site}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/"),
        ("PUT", "/api/page.json"),
        ("DELETE", "/api/stream"),
        ("GET", "/api/stream"),
        ("OPTIONS", "/api/plan"),
        ("POST", "/api/plan"),
        ("TRACE", "/"),
    ],
)
def test_methods(client: TestClient, method: str, path: str) -> None:
    assert client.request(method, path).status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/index.html",
        "/../pyproject.toml",
        "/..%2f..%2fpyproject.toml",
        "/static/app.js",
        "/app.js/",
        "//etc/passwd",
        "/api/recordings/python.json",
        "/api/recordings/..%2fpage.json",
        "/api/recordings/",
        "/page.py",
        "/%00",
    ],
)
def test_paths_that_are_none(client: TestClient, path: str) -> None:
    assert client.get(path, follow_redirects=False).status_code == 404


def test_a_plan_is_the_planners(client: TestClient) -> None:
    asked = {
        "model": "mistral-7b",
        "context": "128K",
        "policy": "sinks:4+window:4092",
        "storage": "int8",
        "batch": "2",
        "devices": "1",
        "device": "a100",
    }
    right = plan(
        "mistral-7b",
        131_072,
        policy="sinks:4+window:4092",
        storage="int8",
        batch=2,
        device="a100",
    ).as_dict()
    assert client.get("/api/plan", params=asked).json() == json.loads(json.dumps(right))


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("", "model is missing"),
        ("model=mistral-7b", "context is missing"),
        ("context=1K", "model is missing"),
        ("model=mistral-7b&context=abc", "abc"),
        ("model=mistral-7b&context=-5", "-5"),
        ("model=mistral-7b&context=9999999999999999999", "99"),
        ("model=/etc/passwd&context=1K", "/etc/passwd"),
        ("model=.&context=1K", "not known"),
        ("model=mistral-7b&context=1K&device=/etc/passwd", "/etc/passwd"),
        ("model=mistral-7b&context=1K&device=calibrated", "calibrated"),
        ("model=mistral-7b&context=1K&devices=2&link=/etc/passwd", "/etc/passwd"),
        ("model=mistral-7b&context=1K&batch=1e9", "batch"),
        ("model=mistral-7b&context=1K&batch=%C2%B2", "batch"),
        ("model=mistral-7b&context=1K&batch=99999999999", "batch"),
        ("model=mistral-7b&context=1K&devices=0", "devices"),
        ("model=mistral-7b&context=1K&storage=int2", "int2"),
        ("model=mistral-7b&context=1K&policy=" + "x" * 201, "policy"),
        ("model=mistral-7b&context=1K&policy=window:0", "window"),
        ("model=mistral-7b&context=1K&model=llama-2-7b", "twice"),
        ("model=mistral-7b&context=1K&url=http://example.org", "'url'"),
        ("model=mistral-7b&context=1K&pattern=Causal()", "'pattern'"),
        ("model=mistral-7b&context=1K&policy=", "policy"),
        ("model=mistral-7b&context=1K&policy=%00", "policy"),
        ("model&context", "the query is no list"),
        ("&".join(f"a{k}=1" for k in range(40)), "the query is no list"),
    ],
)
def test_plans_that_are_refused(client: TestClient, query: str, word: str) -> None:
    answer = client.get(f"/api/plan?{query}")
    assert answer.status_code == 400
    assert word in answer.text
    assert answer.text.count("\n") == 1


def test_a_long_query(client: TestClient) -> None:
    answer = client.get("/api/page.json?" + "x" * (server.QUERY + 1))
    assert answer.status_code == 400
    assert "query" in answer.text
    assert client.get("/api/page.json?" + "x" * server.QUERY).status_code == 200


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"policy": None}, "policy"),
        ({"policy": "window"}, "window"),
        ({"policy": "window:100000"}, "100,000 slots"),
        ({"policy": "heavy:9+window:9,block=100000"}, "slots"),
        ({"policy": "layers(window:8; window:8)"}, "several budgets"),
        ({"policy": "x" * 201}, "policy"),
        ({"storage": "int2"}, "storage"),
        ({"storage": ["int8"]}, "storage"),
        ({"limit": 1}, "limit"),
        ({"limit": LIMIT + 1}, "limit"),
        ({"limit": "100"}, "limit"),
        ({"limit": True}, "limit"),
        ({"limit": 2.5}, "limit"),
        ({"text": "a"}, "text"),
        ({"text": "a" * (live.PASTED + 1)}, "text"),
        ({"text": 5}, "text"),
        ({"text": "\ud800 and more"}, "lone surrogate"),
        ({"text": None}, "neither is given"),
        ({"source": "python"}, "both are given"),
        ({"text": None, "source": "/etc/passwd"}, "source"),
        ({"text": None, "source": ["python"]}, "source"),
        ({"model": "/etc"}, "'model'"),
    ],
)
def test_runs_that_are_refused(client: TestClient, change: dict[str, Any], word: str) -> None:
    body = json.dumps({**SMALL, **change})
    answer = client.post("/api/stream", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert word in answer.text
    assert answer.text.count("\n") == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 5000, b"null"])
def test_bodies_that_are_no_request(client: TestClient, body: bytes) -> None:
    answer = client.post("/api/stream", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400


def test_a_body_of_another_kind(client: TestClient) -> None:
    # What a form of another page may send without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = client.post(
            "/api/stream", content=json.dumps(SMALL), headers={"content-type": kind}
        )
        assert answer.status_code == 415


def test_a_body_that_is_too_large(client: TestClient) -> None:
    asked = {"content-type": "application/json"}
    answer = client.post("/api/stream", content=b" " * (server.BODY + 1), headers=asked)
    assert answer.status_code == 413

    def parts() -> Iterator[bytes]:  # without a length
        for _ in range(server.BODY // 1000 + 2):
            yield b" " * 1000

    assert client.post("/api/stream", content=parts(), headers=asked).status_code == 413
    for length in ("-1", "1e3", "x"):
        wrong = {**asked, "content-length": length}
        assert client.post("/api/stream", content=b"{}", headers=wrong).status_code == 413


def events(client: TestClient, **asked: Any) -> list[dict[str, Any]]:
    answer = client.post("/api/stream", json=asked)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_live_run_is_what_a_recording_holds(client: TestClient) -> None:
    text = "def réduire(self, values):\n    return sum(values)\n" * 12
    found = events(client, policy="heavy:20+window:30,block=16", storage="int8", text=text)
    assert [each["type"] for each in found] == ["loading", "head", *["step"] * 3, "end"]
    right = record(
        *load("bundled", "cpu"),
        text.encode(),
        [kept("heavy:20+window:30,block=16 int8")],
        title="",
    )["runs"][0]
    head, steps = found[1], found[2:-1]
    for name in ("policy", "storage", "block", "window", "heavy", "slot_bytes", "tokens"):
        assert head[name] == right[name]
    data = [recording.base64.b64decode(each["text"]) for each in steps]
    assert b"".join(data) == text.encode()
    codes = b"".join(recording.base64.b64decode(each["nll"]) for each in steps)
    assert codes == recording.unpack(right["nll"])
    left = [0] * right["tokens"]
    for each in steps:
        for token, when, _ in zip(*each["changed"], strict=True):
            left[token] = when
    assert left == recording.unpack_lives(right["left"], 16)
    assert found[-1] == {"type": "end", "tokens": right["tokens"], "nll_mean": right["nll_mean"]}


def test_a_shipped_text_and_a_limit(client: TestClient) -> None:
    found = events(client, policy="keep-all", source="english", limit=40)
    assert found[-1]["tokens"] == 40
    assert recording.base64.b64decode(found[2]["text"]).startswith(b"PEP: 8000")


def test_a_run_that_fails_says_so_and_the_next_may_come(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("the model is not there")

    monkeypatch.setattr(live, "watched", broken)
    found = events(client, **SMALL)
    assert found[-1] == {"type": "error", "sentence": "the model is not there"}
    monkeypatch.undo()
    assert events(client, **SMALL)[-1]["type"] == "end"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("starlette.applications", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"attnspan\[explore\]"):
        server.application(PORT, {})
    with pytest.raises(ImportError, match=r"attnspan\[explore\]"):
        server.serve(0, {})


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "attnspan", "explore", "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline()
        yield process, int(address.split("/")[2].split(":")[1])
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_a_real_server(served: tuple[subprocess.Popen[str], int]) -> None:
    _, port = served
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/page.json", timeout=20) as answer:
        assert json.load(answer)["recordings"]
        assert answer.headers["server"] is None
    for headers in ({"Host": "example.org"}, {"Origin": "https://example.org"}):
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/", headers=headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(asked, timeout=20)
        assert refused.value.code == 403
        refused.value.close()


def test_it_listens_on_this_machine_alone(served: tuple[subprocess.Popen[str], int]) -> None:
    _, port = served
    # All of 127.0.0.0/8 is this machine: a server on every address would answer on 127.0.0.2.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_malformed_requests(served: tuple[subprocess.Popen[str], int]) -> None:
    _, port = served
    host = f"Host: 127.0.0.1:{port}\r\n".encode()
    for request in (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\n" + host + b"Host: example.org\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + host + b"X: " + b"x" * 40_000 + b"\r\n\r\n",
        b"POST /api/stream HTTP/1.1\r\n" + host + b"Content-Length: 99999999999\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(request)
            status = connection.recv(64).split(b" ")[1]
            assert status in (b"400", b"403", b"413", b"431"), request[:40]


def test_one_run_at_a_time_and_a_reader_that_leaves_ends_it(
    served: tuple[subprocess.Popen[str], int],
) -> None:
    _, port = served
    asked = {"policy": "window:64", "source": "python", "limit": LIMIT}

    def ask(body: dict[str, Any]) -> tuple[HTTPConnection, Any]:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/api/stream", json.dumps(body), headers)
        return connection, connection.getresponse()

    first, answer = ask(asked)
    assert json.loads(answer.readline()) == {"type": "loading"}
    assert json.loads(answer.readline())["type"] == "head"
    second, refused = ask(asked)
    assert refused.status == 409
    assert b"one at a time" in refused.read()
    second.close()
    # Other requests are answered while it goes on.
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as page:
        assert page.status == 200
    assert json.loads(answer.readline())["type"] == "step"
    answer.close()
    first.close()
    for _ in range(100):
        third, answer = ask({**SMALL, "limit": 50})
        lines = answer.read()
        third.close()
        if answer.status == 200:
            break
        time.sleep(0.2)
    assert answer.status == 200
    assert json.loads(lines.splitlines()[-1])["type"] == "end"


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    from attnspan.cli import main

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["explore", "--no-browser", "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 can't be had" in capsys.readouterr().err
    assert threading.active_count() < 50
