"""The explorer's server: 127.0.0.1 alone, for one reader on the same machine.

A web page of someone else's that the reader has open must get nothing from it. So the Host header
must name this server (against a name that is made to resolve to 127.0.0.1), an Origin that isn't
ours is refused, no cross-origin header is ever sent, and what the page loads and runs is held by a
content security policy. A request names no path and no URL that would be opened: all files are in
memory before the first comes, and a model is one of the planner's names.
"""

from __future__ import annotations

import json
import socket
import webbrowser
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from attnspan.explorer.live import PASTED, STORAGES, Live, wanted
from attnspan.explorer.page import page
from attnspan.explorer.record import KEPT, LARGEST, LIMIT, TEXTS
from attnspan.explorer.recording import head

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

STATIC = Path(__file__).with_name("static")

BODY = 6 * PASTED + 4_096
"""Bytes of a request's body at most: JSON may take six for one of the text's."""

QUERY = 2_048
"""Bytes of a request's query at most."""

HEADERS = 16_384
"""Bytes of a request's headers at most."""

SECONDS = 1_800
"""A live run ends after so long, for its reader may have stopped reading."""

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; font-src data:; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_PLAN = ("model", "context", "policy", "storage", "batch", "devices", "memory", "device", "link")
_PLAN += ("weights", "engine", "chunk")


def application(port: int, recordings: Mapping[str, Mapping[str, Any]]) -> ASGIApp:
    """The server's ASGI application, for `port` of this machine.

    Raises:
        ImportError: starlette isn't installed; the sentence names the extra.
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import PlainTextResponse, Response
        from starlette.routing import Route
    except ImportError:
        raise ImportError(_LACKS) from None

    live = Live()
    files = {
        f"/{'' if path.name == 'index.html' else path.name}": (
            path.read_bytes(),
            _TYPES[path.suffix],
        )
        for path in STATIC.iterdir()
        if path.suffix in _TYPES
    }
    for name, found in recordings.items():
        files[f"/api/recordings/{name}.json"] = (_json(found), "application/json")
    whole = {
        **page(),
        "recordings": [head(dict(found), name) for name, found in recordings.items()],
        "live": {
            "texts": TEXTS,
            "storages": STORAGES,
            "policies": [spec for spec in KEPT if " " not in spec],
            "pasted": PASTED,
            "limit": LIMIT,
            "largest": LARGEST,
        },
    }
    files["/api/page.json"] = (_json(whole), "application/json")

    def give(request: Request) -> Response:
        data, kind = files[request.url.path]
        return Response(data, media_type=kind)

    def refuse(_: Request, error: Exception) -> Response:
        return PlainTextResponse(f"{error}\n", 400)

    async def stream(request: Request) -> Response:
        return await _stream(request, live)

    routes = [Route(path, give, methods=["GET"]) for path in files]
    routes.append(Route("/api/plan", _plan, methods=["GET"]))
    routes.append(Route("/api/stream", stream, methods=["POST"]))
    app: Starlette = Starlette(routes=routes, exception_handlers={ValueError: refuse})
    app.router.redirect_slashes = False  # a path is one of these, or there is nothing
    return _Guard(app, port)


class _Guard:
    """What every request is held against before anything reads it, and every answer says."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        names = ("127.0.0.1", "localhost", "[::1]")
        hosts = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())
        self._hosts = {host.encode() for host in hosts}
        self._origins = {b"http://" + host for host in self._hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        if scope["type"] != "http":
            return  # no sockets, and nothing to do before the first request or after the last
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, told)
            return
        from starlette.responses import PlainTextResponse

        status, sentence = refusal
        answer = PlainTextResponse(f"{sentence}\n", status, {"connection": "close"})
        await answer(scope, receive, told)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADERS:
            return 431, f"The request's headers have more than {HEADERS:,} bytes."
        given: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            given.setdefault(name.lower(), []).append(value)
        hosts = [host.lower() for host in given.get(b"host", ())]
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return 403, "The Host header names another server than this one."
        if any(origin not in self._origins for origin in given.get(b"origin", ())):
            return 403, "The request comes from another origin's page."
        inside = scope["path"] != "/"
        if inside and any(b"-site" in site for site in given.get(b"sec-fetch-site", ())):
            return 403, "The request comes from another site's page."
        if len(scope["query_string"]) > QUERY:
            return 400, f"The query has more than {QUERY:,} bytes."
        length = given.get(b"content-length", [b"0"])[0]
        if not length.isdigit() or int(length) > BODY:
            return 413, f"The request's body has more than {BODY:,} bytes."
        return None


async def _stream(request: Request, live: Live) -> Any:
    from anyio import move_on_after, to_thread
    from starlette.responses import PlainTextResponse, StreamingResponse

    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        return PlainTextResponse("The body must be application/json.\n", 415)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY:
            return PlainTextResponse(f"The request's body has more than {BODY:,} bytes.\n", 413)
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the request's body is not JSON") from None
    lines = live.lines(wanted(given))
    if not live.lock.acquire(blocking=False):
        return PlainTextResponse("Another run goes on; one at a time is allowed.\n", 409)

    class Lines(StreamingResponse):
        """Ends the run when its reader has gone, whether or not it came to its end."""

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            try:
                with move_on_after(SECONDS):
                    await super().__call__(scope, receive, send)
            finally:
                lines.close()  # type: ignore[attr-defined]  it is a generator
                live.lock.release()

    async def each() -> AsyncIterator[str]:
        while (line := await to_thread.run_sync(next, lines, None)) is not None:
            yield line

    return Lines(each(), media_type="application/x-ndjson")


def _plan(request: Request) -> Any:
    from starlette.responses import Response

    return Response(_json(planned(request.url.query)), media_type="application/json")


def planned(query: str) -> dict[str, Any]:
    """`Plan.as_dict` for a query such as `model=mistral-7b&context=131072&storage=int8`.

    Raises:
        ValueError: one sentence says what isn't allowed. Names are the planner's own: no file is
            ever opened.
    """
    from attnspan.planner.links import DEVICES, LINKS
    from attnspan.planner.plan import plan
    from attnspan.planner.presets import MODELS
    from attnspan.planner.quantities import tokens

    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=20)
    except ValueError:
        raise ValueError("the query is no list of name=value") from None
    given = dict(pairs)
    if len(given) < len(pairs):
        raise ValueError("the query gives a name twice")
    for name, value in pairs:
        if name not in _PLAN:
            raise ValueError(f"{name[:40]!r} is given; {', '.join(_PLAN)} are allowed")
        if not value or len(value) > 200 or not value.isprintable():
            raise ValueError(f"{name} is no text of 1 to 200 characters")
    known = {"model": MODELS, "device": DEVICES, "link": LINKS}
    for name, names in known.items():
        if name in given and given[name] not in names:
            raise ValueError(f"{name} {given[name]!r} is not known; allowed: {', '.join(names)}")
    for name in ("model", "context"):
        if name not in given:
            raise ValueError(f"{name} is missing")
    how: dict[str, Any] = {n: v for n, v in given.items() if n not in ("model", "context")}
    for name in ("batch", "devices", "chunk"):
        if name in how:
            if not (how[name].isascii() and how[name].isdigit() and len(how[name]) < 12):
                raise ValueError(f"{name} is {how[name]!r}; a whole number is allowed")
            how[name] = int(how[name])
    return plan(given["model"], tokens(given["context"]), **how).as_dict()


def serve(
    port: int,
    recordings: Mapping[str, Mapping[str, Any]],
    *,
    browser: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Serves the page on 127.0.0.1 until an interrupt.

    Args:
        port: 0 takes one that is free.
        browser: whether the page is opened.
        say: is told the address once requests are taken.

    Raises:
        ImportError: starlette or uvicorn isn't installed; the sentence names the extra.
        ValueError: the port can't be had.
    """
    try:
        import uvicorn
    except ImportError:
        raise ImportError(_LACKS) from None

    with _bound(port) as taken:
        number: int = taken.getsockname()[1]
        app = application(number, recordings)
        address = f"http://127.0.0.1:{number}/"

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                say(f"{address}  (Ctrl-C ends it)")
                if browser:
                    webbrowser.open(address)

        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=64,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=2 * HEADERS,
        )
        try:
            Server(config).run(sockets=[taken])
        except KeyboardInterrupt:
            say("")


def _bound(port: int) -> socket.socket:
    taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(("127.0.0.1", port))
    except OSError as error:
        taken.close()
        raise ValueError(
            f"port {port} of 127.0.0.1 can't be had: {error.strerror}; another --port, or 0 for "
            "one that is free, is allowed"
        ) from None
    return taken


def _json(found: Any) -> bytes:
    return json.dumps(found, allow_nan=False, separators=(",", ":")).encode()


_LACKS = "attnspan explore needs starlette and uvicorn: pip install 'attnspan[explore]'"
