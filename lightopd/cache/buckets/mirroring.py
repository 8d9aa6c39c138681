"""A URL in the place of a cache folder: its mirror, brought up to what lies there now."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from lightopd.cache.buckets.mirrors import FOLDER, MIRROR, mirrors_folder
from lightopd.cache.buckets.shard_cache import HEADS, is_shard
from lightopd.cache.buckets.stores.at_once import at_once
from lightopd.cache.buckets.stores.object_reader import PIECE_BYTES, ObjectReader
from lightopd.cache.buckets.stores.opened import opened
from lightopd.errors import CacheError
from lightopd.files import json_bytes, looks_like_url, write_atomically
from lightopd.schemas.manifest import CACHE_MANIFEST, SIGNAL_MANIFEST, TEXT_MANIFEST
from lightopd.telling import call

MANIFESTS = (CACHE_MANIFEST, SIGNAL_MANIFEST, TEXT_MANIFEST)
JOBS = 32
"""Small files under way at the same time."""
PARTS = ("rollouts", "signals", "texts", HEADS)
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
HUB_ENDPOINTS = ("HF_ENDPOINT",)

Objects = Mapping[str, tuple[int, str]]
"""Bytes of objects, and what changes with their content, by name."""


def folder_of(path: Path) -> Path:
    """The folder that a cache is read from: the path itself, or a URL's mirror, all of it but the shards.

    Raises:
        ConfigError: no store takes the URL.
        InputError: the store cannot be read.
        CacheError: nothing lies there.
        OutputError: the mirror cannot be written.
    """
    url = looks_like_url(path)
    return path if url is None else _mirrored(url)


def at_commit(path: Path) -> Path:
    """The path of a cache; for one on the Hugging Face hub, the URL of the commit that is read.

    Raises:
        ConfigError: it is no such URL.
        InputError: the hub cannot be read.
    """
    url = looks_like_url(path)
    return Path(opened(url).url) if url is not None and url.startswith("hf:") else path


def mirror_folder(url: str) -> Path:
    """Folder that stands for a URL."""
    return mirrors_folder() / _name(url) / FOLDER


def _mirrored(url: str) -> Path:
    reader = opened(url)
    folder = mirror_folder(reader.url)
    there = bring_up_to_date(reader, folder)
    if CACHE_MANIFEST not in there:
        from lightopd.cache.buckets.remote import no_cache  # which opens caches itself

        raise CacheError(no_cache(reader.url, there))
    return folder


def bring_up_to_date(reader: ObjectReader, folder: Path) -> Objects:
    """See in a mirror what is at its URL now, but for the shards; all objects that are there.

    Raises:
        InputError: the store cannot be read.
        OutputError: the mirror cannot be written.
    """
    call(folder, reader.url)
    there = reader.listed()
    objects = {
        name: told for name, told in there.items() if _is_of_a_cache(name) and not _is_beside(name, told[0])
    }
    before = _known(folder)
    small, fetched = {name for name in objects if not is_shard(PurePosixPath(name))}, {}

    def fetch(name: str) -> None:
        reader.fetch(name, objects[name][0], folder / name, shared=True)
        fetched[name] = objects[name]

    changed = [name for name in small if before.get(name) != objects[name] or not (folder / name).exists()]
    try:
        for _ in at_once(JOBS, fetch, changed):
            pass
    except BaseException:  # the next one to look fetches what is left
        if fetched:
            _remember(folder, reader.url, {**_known(folder), **fetched})
        raise
    for name in [name for name in before if objects.get(name) != before[name] and name not in small]:
        (folder / name).unlink(missing_ok=True)
    if before != objects or not before:
        _remember(folder, reader.url, objects)
    return there


def is_small_here(name: str) -> bool:
    """Whether a file of a mirror is one that a stage made beside its shards, and that others see."""
    last = PurePosixPath(name).name
    return _is_of_a_cache(name) and not last.startswith("part-") and last != "journal.jsonl"


def _is_of_a_cache(name: str) -> bool:
    """Whether an object is one that a cache folder has: not hidden, no index, no file of something else."""
    parts = PurePosixPath(name).parts
    if parts[-1].startswith((".", "index.duckdb")) or ".." in parts:
        return False
    return len(parts) == 1 or (parts[0] in PARTS and len(parts) <= 3)


def _is_beside(name: str, size_bytes: int) -> bool:
    """Whether a file at the root of a dataset or bucket is too large for a manifest, config or report."""
    return "/" not in name and size_bytes > PIECE_BYTES


def _known(folder: Path) -> Objects:
    """The objects as they were when the mirror was last brought up to date."""
    try:
        plain = json.loads((folder / MIRROR).read_bytes())
        return {name: (size, stamp) for name, (size, stamp) in plain["objects"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def _remember(folder: Path, url: str, objects: Objects) -> None:
    write_atomically(folder / MIRROR, json_bytes({"url": url, "objects": objects}), shared=True)


def _name(url: str) -> str:
    """Of a mirror's folder: the URL, legible, and a hash of it and of the endpoint that answers."""
    names = HUB_ENDPOINTS if url.startswith("hf:") else ENDPOINTS
    endpoint = next((os.environ[name] for name in names if name in os.environ), "")
    digest = hashlib.sha256(f"{url} {endpoint}".encode()).hexdigest()[:12]
    return f"{quote(url.replace('://', ':'), safe=':').replace('%2F', '-')[:100]}-{digest}"
