"""A folder in an object store: objects put whole, put only where none is, read in pieces, listed.

All that lightopd knows of obstore is here. A request that fails is tried again by obstore itself, with
growing pauses; where a connection breaks off in a way that it takes for final, all is asked again here.
"""

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from lightopd.cache.buckets.stores.failures import bucket_error, is_refusal
from lightopd.cache.buckets.stores.object_reader import PIECE_BYTES, Answer, ObjectReader
from lightopd.errors import ConfigError, InputError
from lightopd.files import output_error, own_suffix, put_if_absent, remove_left_in, replaced_file
from lightopd.schemas.stores.buckets import BucketConfig

BROKEN_OFF = ("error decoding response body", "request or response body error", "error sending request")
"""What obstore says of a connection that broke off: it tries some of these again, and not a reset one."""
SCHEMES = ("s3", "s3a", "gs", "az", "adl", "abfs", "abfss", "azure", "file")
S3 = ("s3", "s3a")

_users: list[int] = []


def is_usable() -> bool:
    """Whether requests can be made here: not in a fork of a process that made some, without its threads."""
    return not _users or _users[0] == os.getpid()


class Bucket(ObjectReader):
    """The objects below a URL, by their names relative to it, for reading and writing.

    Args:
        url: `s3://bucket/folder`, `gs://...`, `az://...` or `file:///folder`.
        config: how it is reached.
        is_made: make the folder of a `file://` URL where it is missing.

    Raises:
        ConfigError: a URL or an option that no store takes, or obstore is not installed.
        InputError: the folder of a `file://` URL is not there.
    """

    def __init__(self, url: str, config: BucketConfig | None = None, *, is_made: bool = False) -> None:
        super().__init__(url, config)
        self._store = _opened(self.url, self.config, is_made)
        self._folder = _folder(self.url)
        if is_made and self._folder is not None:
            remove_left_in(self._folder)

    def listed(self) -> dict[str, tuple[int, str]]:
        """Size in bytes of every object, and what changes with its content, by name."""
        import obstore

        def listed() -> dict[str, tuple[int, str]]:
            items = (item for chunk in obstore.list(self._store) for item in chunk)
            return {
                item["path"]: (item["size"], f"{item['last_modified']} {item['e_tag']}")
                for item in items
                if not _is_coming(item["path"])
            }

        return self._told("list", self.url, lambda: self._again(listed))

    def names_below(self, folder: str) -> list[str]:
        """Names of the objects below a folder, sorted."""
        import obstore

        def listed() -> list[str]:
            found = (item["path"] for chunk in obstore.list(self._store, prefix=folder) for item in chunk)
            return sorted(name for name in found if not _is_coming(name))

        return self._told("list", self._at(folder), lambda: self._again(listed))

    def delete(self, name: str) -> None:
        """Take an object away; nothing where there is none."""
        import obstore

        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, name)

        self._told("write", self._at(name), lambda: self._again(delete))

    def clear_left(self, folder: str) -> None:
        """Remove what killed processes left of writing below a folder; object stores keep nothing of it."""
        if self._folder is not None:
            remove_left_in(self._folder / folder)

    def read(self, name: str) -> bytes | None:
        """The content of a small object; None where there is none."""
        import obstore

        def content() -> bytes | None:
            try:
                return bytes(obstore.get(self._store, name).bytes())
            except FileNotFoundError as error:
                if is_refusal(error):
                    raise
                return None

        return self._told("read", self._at(name), lambda: self._again(content))

    def put(self, name: str, content: bytes | BinaryIO) -> None:
        """Put an object in place whole, or not at all; one that is there is replaced.

        Args:
            name: of the object.
            content: its bytes, or an open file, all of which is sent wherever it stands.
        """
        import obstore

        if self._folder is not None:
            _put_file(self._folder / name, content)
            return
        how: dict[str, Any] = {"chunk_size": PIECE_BYTES, "max_concurrency": 4, "mode": "overwrite"}

        def put() -> None:
            if not isinstance(content, bytes):
                content.seek(0)
            obstore.put(self._store, name, content, **how)

        self._told("write", self._at(name), lambda: self._again(put))

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Put an object in place whole, unless one of its name is there; whether the content is there now.

        Of several that put different contents, exactly one is told that its own is there.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        if self._folder is not None:
            return _put_file_if_absent(self._folder / name, content) or self.read(name) == content

        def put() -> bool:
            try:
                obstore.put(self._store, name, content, mode="create")
            except AlreadyExistsError:  # ours too, where the answer to a first try was lost
                return self.read(name) == content
            return True

        return self._told("write", self._at(name), lambda: self._again(put))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """So many bytes of an object, all of which are there.

        Raises:
            InputError: the object cannot be read.
        """
        import obstore

        def content() -> bytes:
            return bytes(obstore.get_range(self._store, name, start=start, length=length))

        return self._told("read", self._at(name), lambda: self._again(content))

    def _is_passing(self, error: Exception) -> bool:
        """Whether a connection broke off in a way that obstore leaves to its caller."""
        from obstore.exceptions import GenericError

        return isinstance(error, GenericError) and any(text in str(error) for text in BROKEN_OFF)

    def _told(self, verb: str, where: str, ask: Callable[[], Answer]) -> Answer:
        from obstore.exceptions import BaseError

        try:
            return ask()
        except (BaseError, OSError) as error:
            raise bucket_error(error, verb, where, self.config) from error


def _opened(url: str, config: BucketConfig, is_made: bool) -> Any:
    parts = urlsplit(url)
    _check_scheme(url, parts.scheme)
    try:
        from obstore.exceptions import BaseError
        from obstore.store import LocalStore, from_url
    except ModuleNotFoundError as error:
        raise ConfigError(f"{url} needs obstore: pip install 'lightopd[objectstore]'") from error
    if not _users:
        _users.append(os.getpid())
    if (folder := _folder(url)) is not None:
        if not is_made and not folder.is_dir():
            raise InputError(f"{url}: there is no folder {folder}; name one that `lightopd push` made")
        return LocalStore(folder, mkdir=True)
    options: dict[str, Any] = dict(config.store)
    if parts.scheme in S3:
        options = {"checksum_algorithm": "SHA256", **options}
    opened: Any = from_url  # its overloads name the options of each store
    try:
        return opened(url, client_options=_client(config, options), retry_config=_retries(config), **options)
    except BaseError as error:
        message = str(error).splitlines()[0]
        raise ConfigError(f"{url} cannot be opened: {message}; look at --set store.KEY=VALUE") from error


def _folder(url: str) -> Path | None:
    """The folder that a `file://` URL names."""
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _is_coming(name: str) -> bool:
    """Whether a file is one that is being written, in a folder or what stands for one."""
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith(".tmp")


def _put_file(path: Path, content: bytes | BinaryIO) -> None:
    """As an object, but flushed to the disk; until then its name tells which process writes it."""
    if not isinstance(content, bytes):
        content.seek(0)
    whole = content if isinstance(content, bytes) else content.read()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path, own_suffix()) as part:
            part.write_bytes(whole)
    except OSError as error:
        raise output_error(error, path, len(whole)) from error


def _put_file_if_absent(path: Path, content: bytes) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return put_if_absent(path, content)
    except OSError as error:
        raise output_error(error, path, len(content)) from error


def _check_scheme(url: str, scheme: str) -> None:
    if scheme == "hf":
        raise ConfigError(
            f"{url}: the Hugging Face hub is read in place and not written to; make the cache in a folder "
            "and send it with `hf upload OWNER/NAME CACHE FOLDER --repo-type dataset`"
        )
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{url} is no URL of a store; there are s3://, gs://, az://, file:/// and, for reading, hf://"
        )


def _client(config: BucketConfig, options: dict[str, Any]) -> dict[str, Any]:
    endpoint = next(
        (options[key] for key in ("endpoint", "aws_endpoint", "endpoint_url") if key in options),
        os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "",
    )
    client: dict[str, Any] = {"timeout": timedelta(seconds=config.timeout_s), "connect_timeout": "5s"}
    return client | ({"allow_http": True} if endpoint.startswith("http://") else {})


def _retries(config: BucketConfig) -> dict[str, Any]:
    return {
        "max_retries": 100,
        "retry_timeout": timedelta(seconds=config.retry_s),
        "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 2},
    }
