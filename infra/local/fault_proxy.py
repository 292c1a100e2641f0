"""A reverse proxy on loopback in front of an S3 server that answers some requests wrongly, on purpose.

It runs in a thread with its own event loop. Rules are plain objects: the first that takes a request decides. Host
and path are passed on untouched, since the client has signed them.
"""

import asyncio
import logging
import random
import re
import threading
from dataclasses import dataclass, field
from typing import Literal, Self

import aiohttp
from aiohttp import web
from yarl import URL

Kind = Literal["status", "reset", "lost", "truncate", "stall", "corrupt", "slow", "delay", "gone"]
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect"}
_NOT_ADDED = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
_PIECE = 16384


@dataclass
class Rule:
    """What goes wrong, and for which requests.

    ``status`` answers with an error, ``reset`` and ``gone`` close the connection unread, ``lost`` carries the request
    out and closes the connection without an answer, ``truncate`` and ``stall`` stop within the body, ``corrupt`` flips
    one bit of it, ``slow`` and ``delay`` take their time.
    """

    kind: Kind
    method: str = ".*"
    """Regular expression of the whole method."""
    path: str = ".*"
    """Regular expression found in path and query."""
    times: int = -1
    """How often it acts; -1 = always."""
    share: float = 1.0
    """Of the requests that match, at random."""
    status: int = 503
    code: str = "SlowDown"
    after: int = 1000
    """Bytes of the body before ``truncate``, ``stall`` and ``corrupt`` act."""
    bytes_per_second: int = 1 << 20
    seconds: float = 1.0
    """Of ``stall`` and ``delay``."""
    seed: int = 0
    fired: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def takes(self, request: web.BaseRequest) -> bool:
        """Whether it acts on this request; counts."""
        if not self.times or not re.fullmatch(self.method, request.method):
            return False
        if not re.search(self.path, request.raw_path) or self._random.random() >= self.share:
            return False
        self.times -= self.times > 0
        self.fired += 1
        return True


class FaultProxy:
    """``with FaultProxy(server["endpoint"]) as proxy: ... proxy.endpoint``."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream.rstrip("/")
        self.rules: list[Rule] = []
        self.log: list[tuple[str, str, str | None]] = []
        """(method, path, kind of the rule that acted) of every request."""
        self._loop, self._ready = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._main()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10), "the proxy did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    def add(self, rule: Rule) -> Rule:
        """Behind the others."""
        self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """No rules, an empty log."""
        self.rules.clear()
        self.log.clear()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        connector, limit = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(auto_decompress=False, connector=connector, timeout=limit) as self._client:
            quiet = logging.getLogger("fault_proxy")
            quiet.setLevel(logging.CRITICAL)  # of connections that it cuts itself
            runner = web.ServerRunner(web.Server(self._handle, logger=quiet), shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            assert isinstance(site._server, asyncio.Server)
            self.endpoint = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
            self._ready.set()
            await self._stop.wait()
            await runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        rule = next((rule for rule in self.rules if rule.takes(request)), None)
        kind = rule.kind if rule else None
        self.log.append((request.method, request.raw_path, kind))
        if rule is not None:
            if kind == "delay":
                await asyncio.sleep(rule.seconds)
            if kind in ("reset", "gone"):
                _cut(request)
        if request.headers.get("Expect", "").lower() == "100-continue":
            # A client that asks first (botocore, for every PUT) sends no body before this.
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        if rule is not None:
            if kind == "status":
                async for _ in request.content.iter_any():  # drained in pieces: read() stops at 1 MiB
                    pass
                text = f"<?xml version='1.0'?><Error><Code>{rule.code}</Code><Message>injected</Message></Error>"
                return web.Response(status=rule.status, content_type="application/xml", text=text)
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP]
        async with self._client.request(
            request.method, URL(self.upstream + request.raw_path, encoded=True), headers=headers,
            data=request.content if request.can_read_body else None, allow_redirects=False,
            skip_auto_headers=_NOT_ADDED,
        ) as answer:  # fmt: skip
            if kind == "lost":
                await answer.read()
                _cut(request)
            return await _pass_on(request, answer, rule)


def _cut(request: web.BaseRequest) -> None:
    assert request.transport is not None
    request.transport.abort()
    raise ConnectionResetError


async def _pass_on(request: web.BaseRequest, answer: aiohttp.ClientResponse, rule: Rule | None) -> web.StreamResponse:
    kind, sent = rule.kind if rule else None, 0
    headers = [(name, value) for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP]
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
    await response.prepare(request)
    async for piece in answer.content.iter_any():
        if rule is None:
            await response.write(piece)
            continue
        if kind in ("truncate", "stall") and sent + len(piece) > rule.after:
            await response.write(piece[: max(0, rule.after - sent)])
            if kind == "stall":
                await asyncio.sleep(rule.seconds)
            _cut(request)
        if kind == "corrupt" and sent <= rule.after < sent + len(piece):
            changed = bytearray(piece)
            changed[rule.after - sent] ^= 1
            piece = bytes(changed)
        for at in range(0, len(piece), _PIECE):
            await response.write(piece[at : at + _PIECE])
            if kind == "slow":
                await asyncio.sleep(_PIECE / rule.bytes_per_second)
        sent += len(piece)
    await response.write_eof()
    return response
