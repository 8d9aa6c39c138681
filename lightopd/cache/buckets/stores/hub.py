"""A folder of a dataset on the Hugging Face hub, read as an object store at one commit.

Paths, token and endpoint are those of huggingface_hub (`HF_TOKEN`, `hf auth login`, `HF_ENDPOINT`), and so is
the session; time limits and repeats are our own, as its lists wait for ever and its repeats are counted.
"""

import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from urllib.parse import quote, unquote, urljoin, urlsplit

from lightopd.cache.buckets.stores.failures import HUB_FINAL, hub_error, is_no_object
from lightopd.cache.buckets.stores.object_reader import ObjectReader
from lightopd.errors import ConfigError, InputError
from lightopd.schemas.stores.buckets import BucketConfig

FORM = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<folder>.+))?"
)
"""As huggingface_hub writes URLs: a revision with a slash that is no special one is quoted, `%2F`."""
COMMIT = re.compile(r"[0-9a-f]{40}")
PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses of what may pass by itself."""
PART, ABSENT = 206, 404

COMMITS = "LIGHTOPD_HUB_COMMITS"
"""Environment variable, for the processes that this one starts: commits by endpoint, dataset and revision."""
_guard = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Came:
    """An answer, whole."""

    status: int
    content: bytes
    next_page: str | None


class Hub(ObjectReader):
    """The files below a URL `hf://datasets/OWNER/NAME[@REVISION][/folder]`, by their names relative to it.

    A revision is looked up once by a process and those that it starts, so that whoever opens a cache again
    sees the commit that was seen first; `url` names this commit.

    Raises:
        ConfigError: a URL of another form, or an option of other stores.
        InputError: the hub does not answer, or shows no such dataset or revision.
    """

    def __init__(self, url: str, config: BucketConfig | None = None) -> None:
        super().__init__(url, config)
        if self.config.store:
            raise ConfigError(
                f"{url} takes no --set store.{next(iter(self.config.store))}; the hub's own settings are "
                "HF_TOKEN and HF_ENDPOINT"
            )
        self._repo, revision, self._folder = _parsed(self.url)
        self._commit = revision if COMMIT.fullmatch(revision) else self._commit_of(revision)
        self.url = "/".join(filter(None, (f"hf://datasets/{self._repo}@{self._commit}", self._folder)))

    def listed(self) -> dict[str, tuple[int, str]]:
        """Size in bytes of every file, and what changes with its content, by name."""
        folder = f"/{self._folder}" if self._folder else ""
        link: str | None = self._api(f"tree/{self._commit}{quote(folder)}?recursive=true")
        found, inside = {}, f"{self._folder}/" if self._folder else ""
        while link is not None:
            came = self._got("list", self.url, link)
            if came.status == ABSENT:
                break
            with _as_of_a_hub(self.url):
                for item in json.loads(came.content):
                    path = item["path"]
                    if item["type"] == "file" and path.startswith(inside) and ".." not in path.split("/"):
                        found[path.removeprefix(inside)] = (item["size"], item["oid"])
                link = self._next_page(link, came.next_page) if came.next_page else None
        return found

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        came = self._got("read", self._at(name), self._file(name))
        return None if came.status == ABSENT else came.content

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """So many bytes of a file, all of which are there.

        Raises:
            InputError: the file cannot be read.
        """
        wanted = {"Range": f"bytes={start}-{start + length - 1}"}
        came = self._got("read", self._at(name), self._file(name), wanted)
        if came.status == ABSENT:
            raise InputError(f"cannot read {self._at(name)}: it is not there")
        content = came.content if came.status == PART else came.content[start : start + length]
        if len(content) != length:
            raise InputError(
                f"cannot read {self._at(name)}: {len(content)} bytes came of {length} from byte {start} on; "
                "run the same command again"
            )
        return content

    def _commit_of(self, revision: str) -> str:
        """The commit that a branch, a tag or a reference stood for when it was first asked for."""
        key = f"{hub_endpoint()} {self._repo} {revision}"
        commit = _known_commits().get(key) or self._look_up(revision)
        with _guard:
            known = {key: commit, **_known_commits()}
            os.environ[COMMITS] = json.dumps(known)
        return known[key]

    def _look_up(self, revision: str) -> str:
        came = self._got("read", self.url, self._api(f"revision/{quote(revision, safe='')}"))
        with _as_of_a_hub(self.url):
            return str(json.loads(came.content)["sha"])

    def _next_page(self, link: str, named: str) -> str:
        """Where a list goes on, which the token is sent to."""
        page = urljoin(link, named)
        scheme, host, _ = origin = _origin(page)
        if origin != _origin(hub_endpoint()):
            raise InputError(
                f"cannot list {self.url}: {hub_endpoint()} names {scheme}://{host} for the rest of the list, "
                "which the token is not for; look at HF_ENDPOINT"
            )
        return page

    def _api(self, path: str) -> str:
        return f"{hub_endpoint()}/api/datasets/{self._repo}/{path}"

    def _file(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        path = "/".join(filter(None, (self._folder, name)))
        place = {"repo_type": "dataset", "revision": self._commit, "endpoint": hub_endpoint()}
        return str(hf_hub_url(self._repo, path, **place))

    def _got(self, verb: str, where: str, link: str, headers: Mapping[str, str] | None = None) -> _Came:
        def ask() -> _Came:
            return _answer(link, headers or {}, self.config.timeout_s)

        try:
            return self._again(ask)
        except _failures() as error:
            raise hub_error(error, verb, where, self.config) from error

    def _is_passing(self, error: Exception) -> bool:
        """Whether the hub was busy or broken, or a connection to it."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status:
            return status in PASSING
        return isinstance(error, (_any_failure(), TimeoutError)) and type(error).__name__ not in HUB_FINAL


def hub_endpoint() -> str:
    """Where the hub is."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _known_commits() -> dict[str, str]:
    """What this process looked up, and what those that started it did."""
    return dict(json.loads(os.environ.get(COMMITS, "{}")))


@contextmanager
def _as_of_a_hub(where: str) -> Iterator[None]:
    """Takes an answer that is not the hub's for a wrong address."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot read {where}: {hub_endpoint()} does not answer as the hub does; look at HF_ENDPOINT"
        ) from error


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port of an address."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _parsed(url: str) -> tuple[str, str, str]:
    """Dataset, revision and folder that a URL names."""
    found = FORM.fullmatch(url)
    if found is None or ".." in url.split("/"):
        raise ConfigError(
            f"{url} is no folder of a dataset on the Hugging Face hub; write it as "
            "hf://datasets/OWNER/NAME/FOLDER or hf://datasets/OWNER/NAME@REVISION/FOLDER"
        )
    return found["repo"], unquote(found["revision"] or "main"), found["folder"] or ""


def _answer(link: str, headers: Mapping[str, str], timeout_s: float) -> _Came:
    """What the hub answers within a time.

    Raises:
        OSError: the hub refuses, or the time is over; other failures are those of the session's library.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    until_s, chunks = time.monotonic() + timeout_s, []
    asked = {**build_hf_headers(), "Accept-Encoding": "identity", **headers}
    with get_session().stream("GET", link, headers=asked, timeout=timeout_s) as response:
        if response.is_error:
            response.read()
        if is_no_object(response):
            return _Came(ABSENT, b"", None)
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            chunks.append(chunk)
            if time.monotonic() > until_s:
                raise TimeoutError(f"more than {timeout_s:g} s")
        next_page = response.links.get("next", {}).get("url")
        return _Came(response.status_code, b"".join(chunks), next_page)


def _failures() -> tuple[type[Exception], ...]:
    """What a request ends with that got no answer; the last one is of the token."""
    root = _any_failure()
    library = import_module(root.__module__.partition(".")[0])
    return root, library.InvalidURL, OSError, UnicodeEncodeError


def _any_failure() -> type[Exception]:
    """The root of the exceptions of the library that huggingface_hub makes its requests with."""
    from huggingface_hub.errors import HfHubHTTPError

    root: type[Exception] = HfHubHTTPError.__bases__[0]
    return root
