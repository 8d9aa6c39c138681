"""`lightopd view`: the report served on this machine, read only.

A page of another site could point its name at 127.0.0.1 and ask through a visitor's browser; the Host header
gives it away, so that a name which is not ours is refused.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

from aiohttp import web

from lightopd.errors import LightopdError, OutputError
from lightopd.inspection.live.pages import Pages, parse_asked

log = logging.getLogger(__name__)

LOCAL = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(pages: Pages, host: str) -> web.Application:
    """The server's two pages, `/` and `/training`; nothing takes a write."""
    lock = asyncio.Lock()

    async def answer(make: Callable[[], str]) -> web.Response:
        async with lock:
            text = await asyncio.to_thread(make)
        return web.Response(body=text.encode("utf-8", "replace"), content_type="text/html", charset="utf-8")

    async def page(request: web.Request) -> web.Response:
        asked = parse_asked(dict(request.query))
        return await answer(lambda: pages.page(asked))

    async def training(_: web.Request) -> web.Response:
        return await answer(pages.training)

    app = web.Application(middlewares=[_guard(host)])
    app.router.add_get("/", page)
    app.router.add_get("/training", training)
    return app


async def serve(pages: Pages, host: str, port: int, told: Callable[[str], None]) -> None:
    """Serve until cancelled; `told` hears the address.

    Raises:
        OutputError: the address is taken, or is not this machine's.
    """
    runner = web.AppRunner(application(pages, host), access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        with _told_in_a_line(host, port):
            await site.start()
        bound = runner.addresses[0][1]
        told(f"http://{f'[{host}]' if ':' in host else host}:{bound}/")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _guard(host: str) -> Any:
    allowed = {*LOCAL, host, f"[{host}]"}

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not _is_ours(request.headers.get("Host", ""), allowed, host):
            response: web.StreamResponse = web.Response(
                status=421, text="this server answers under its own address only\n"
            )
        else:
            try:
                response = await handler(request)
            except LightopdError as error:
                response = web.Response(status=400, text=f"{error}\n")
            except web.HTTPException as error:
                response = web.Response(status=error.status, text=f"{error.reason}\n")
        response.headers.update(HEADERS)
        return response

    return guard


def _is_ours(header: str, allowed: set[str], host: str) -> bool:
    """Whether a Host header names this server; under 0.0.0.0 and :: every number is, and no other name."""
    name = header.rpartition(":")[0] if header.rpartition(":")[2].isdecimal() else header
    if name.lower() in allowed:
        return True
    if host not in ("0.0.0.0", "::"):
        return False
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


@contextmanager
def _told_in_a_line(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; take another --host or --port"
        ) from None
