"""Requests to vLLM servers: tried again, spread over several addresses; the API key is never shown."""

import asyncio
import json
import logging
import os
import random
import re
from typing import Any

import aiohttp

from lightopd.errors import ConfigError, EngineError
from lightopd.schemas.configs import ServerEngine

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
CONNECT_S = 10.0
SHORTEST_KEY = 8
"""Characters from which a text may be a key; a model may well be called as a shorter one is."""
TRY_AGAIN = frozenset({429, 500, 502, 503, 504})


class ServerPool:
    """Connections to one or several servers of the same model; use it from one event loop only."""

    def __init__(self, engine: ServerEngine) -> None:
        self.urls = engine.urls
        self._attempts = engine.attempts
        self._in_flight = dict.fromkeys(engine.urls, 0)
        self._headers = _authorization(engine)
        self._timeout = aiohttp.ClientTimeout(total=engine.timeout_s, sock_connect=CONNECT_S)
        self._most_bytes = engine.max_answer_mib << 20
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections; they open again when needed."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def get(self, url: str, path: str) -> Any:
        """What one server says at a path, tried again as `post`."""
        return await self._ask("GET", path, None, (url,))

    async def post(self, path: str, body: dict[str, Any], url: str | None = None) -> Any:
        """The reply of the server at `url`, or of the least busy one.

        Refused and broken connections, time-outs, 429 and 5xx are tried again after growing pauses, on
        another server where there is one.

        Raises:
            EngineError: the request was refused.
            NoAnswerError: every try failed.
        """
        return await self._ask("POST", path, body, self.urls if url is None else (url,))

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None, urls: tuple[str, ...]) -> Any:
        failed, reason = "", ""
        for attempt in range(self._attempts):
            url = min((u for u in urls if u != failed or len(urls) == 1), key=self._in_flight.__getitem__)
            self._in_flight[url] += 1
            try:
                return await self._once(method, url, path, body)
            except _TryAgain as error:
                failed, reason = url, f"{url}{path}: {error}"
                pause_s = error.pause_s or _pause_s(attempt)
            finally:
                self._in_flight[url] -= 1
            if attempt + 1 < self._attempts:
                log.warning("%s; trying again in %.1f s", reason, pause_s)
                await asyncio.sleep(pause_s)
        raise NoAnswerError(
            f"no reply from {' or '.join(urls)} after {self._attempts} tries, last {reason}; start the "
            f"server again and repeat the command: finished shards are kept"
        )

    async def _once(self, method: str, url: str, path: str, body: dict[str, Any] | None) -> Any:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self._headers, timeout=self._timeout, trust_env=True
            )
        try:
            async with self._session.request(method, url + path, json=body) as response:
                content = await self._read(response, url + path)
        except TimeoutError as error:
            raise _TryAgain("no reply in time") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise _TryAgain(self._hidden(_first_line(str(error))) or type(error).__name__) from error
        except aiohttp.ClientError as error:
            reason = self._hidden(_first_line(str(error)))
            raise EngineError(f"{url}{path}: {reason}; check engine.urls") from error
        if response.status in TRY_AGAIN:
            raise _TryAgain(f"{response.status} {self._message(content)}", _retry_after_s(response))
        if response.status != 200:
            hint = _hint(response.status)
            raise EngineError(f"{url}{path} answered {response.status}: {self._message(content)}{hint}")
        try:
            return self._without_key(json.loads(content)) if body is None else json.loads(content)
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{url}{path} answered no JSON; check that it is a vLLM server") from error

    async def _read(self, response: aiohttp.ClientResponse, name: str) -> bytes:
        """The reply's bytes, up to `engine.max_answer_mib`."""
        content = bytearray()
        async for part in response.content.iter_any():
            content += part
            if len(content) > self._most_bytes:
                raise EngineError(
                    f"{name} answers with more than {self._most_bytes >> 20} MiB; check that it is a vLLM "
                    f"server, or raise engine.max_answer_mib"
                )
        return bytes(content)

    def _message(self, content: bytes) -> str:
        """What a server says went wrong, in one line, without the key that it may repeat."""
        return self._hidden(_message(content))

    def _hidden(self, text: str) -> str:
        """The text without the API key."""
        key = self._headers.get("Authorization", "").removeprefix("Bearer ")
        return text.replace(key, "***") if key else text

    def _without_key(self, value: Any) -> Any:
        """What a server says of itself, without the API key in any of its texts."""
        if isinstance(value, dict):
            return {key: self._without_key(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._without_key(item) for item in value]
        return self._hidden(value) if isinstance(value, str) and len(value) >= SHORTEST_KEY else value


class NoAnswerError(EngineError):
    """Every try of a request failed."""


class _TryAgain(Exception):
    """A failure that another try may mend."""

    def __init__(self, message: str, pause_s: float | None = None) -> None:
        super().__init__(message)
        self.pause_s = pause_s


def _authorization(engine: ServerEngine) -> dict[str, str]:
    if engine.api_key_env is None:
        return {}
    key = os.environ.get(engine.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"engine.api_key_env names {_shown(engine.api_key_env)}, which is not set; put the server's API "
            f"key there"
        )
    return {"Authorization": f"Bearer {key}"}


def _shown(name: str) -> str:
    """A variable's name; what may be a key that was typed in its place is not repeated."""
    return name if re.fullmatch(r"[A-Z][A-Z0-9_]{0,60}", name) else "a variable"


def _pause_s(attempt: int) -> float:
    """Twice as long after each try, and up to half of it less, so that many requests do not come at once."""
    return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1.0))


def _retry_after_s(response: aiohttp.ClientResponse) -> float | None:
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), LONGEST_PAUSE_S) if asked.isdigit() and int(asked) > 0 else None


def _message(content: bytes) -> str:
    """What a server says went wrong, in one line."""
    text = content.decode("utf-8", "replace")
    try:
        plain = json.loads(text)
        text = str(plain["error"]["message"] if "error" in plain else plain.get("detail", text))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return _first_line(text)


def _first_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))[:300]


def _hint(status: int) -> str:
    if status in (401, 403):
        return "; name the environment variable with its API key in engine.api_key_env"
    return "; check that it is a vLLM server and engine.urls has no path of its own" if status == 404 else ""
