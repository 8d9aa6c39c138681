"""A manifest's fingerprint names its shards for good: what changes it, what does not, and its very value."""

import pytest
from cache_cases import STUDENT, cache_manifest, signal_manifest

from lightopd.schemas.lineage.hashing import NEVER_HASHED
from lightopd.schemas.manifest import (
    CacheManifest,
    EngineRecord,
    JoinedCache,
    NoiseFloor,
    Override,
    SignalManifest,
)

JOINED = JoinedCache(origin="student", sampler=STUDENT, content="c", source="runs/cache")
OVERRIDE = Override(stage="rollout", allowed="template-mismatch", found="another")


class LaterCacheManifest(CacheManifest):
    added: str | None = None


class LaterSignalManifest(SignalManifest):
    added: int = 7


LaterCacheManifest.__name__, LaterSignalManifest.__name__ = "CacheManifest", "SignalManifest"


def manifests(version):
    """Of each type: one of defaults, and one where every optional field is set."""
    cache = cache_manifest(schema_version=version)
    full = {
        "joined": (JOINED,),
        "rendering": {"render": "chat", "source": "left out"},
        "engine": EngineRecord(kind="hf", version="5"),
        "overrides": (OVERRIDE,),
    }
    signal = {"min_probability": 1e-4, "support": {"kind": "signal"}, "context": {"kind": "template"}}
    return [
        cache,
        cache_manifest(schema_version=version, **full),
        signal_manifest("teacher", cache, schema_version=version),
        signal_manifest("teacher", cache, schema_version=version, overrides=(OVERRIDE,), **signal),
    ]


@pytest.mark.parametrize(
    ("version", "golden"),
    [
        (1, ["7f64904e1d54aa2a", "40670d740e78abbe", "c7387d03e686457f", "e4464f64afacdb5f"]),
        (2, ["87a9112e49a14121", "464d20031e81f9b8", "e88cd8d71e2e891c", "757389682c60d359"]),
    ],
)
def test_every_fingerprint_is_the_one_it_has_always_been(version, golden):
    assert [manifest.fingerprint()[:16] for manifest in manifests(version)] == golden


@pytest.mark.parametrize("version", [1, 2])
def test_a_new_optional_field_changes_no_fingerprint_until_it_is_set(version):
    for manifest in manifests(version):
        is_cache = isinstance(manifest, CacheManifest)
        later = LaterCacheManifest if is_cache else LaterSignalManifest
        plain = manifest.model_dump()
        assert later(**plain).fingerprint() == manifest.fingerprint()
        changed = later(**plain, added="8" if is_cache else 8)
        assert changed.fingerprint() != manifest.fingerprint()


@pytest.mark.parametrize("version", [1, 2])
def test_paths_versions_commits_and_noise_change_no_fingerprint(version):
    cache, _, signal, _ = manifests(version)
    moved = STUDENT.model_copy(update={"source": "elsewhere", "commit": "abc"})
    changed = cache.model_copy(update={"sampler": moved, "lightopd_version": "9"})
    assert changed.fingerprint() == cache.fingerprint()
    noise = NoiseFloor(mean_nats=0.1, max_nats=0.2, tokens=3)
    assert (
        signal.model_copy(update={"noise": noise, "cross_check": noise}).fingerprint() == signal.fingerprint()
    )


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("version", [1, 2])
def test_every_other_field_changes_the_fingerprint(version):
    for manifest in manifests(version)[::2]:
        for field in type(manifest).model_fields.keys() - NEVER_HASHED:
            changed = manifest.model_copy(update={field: 77})
            assert changed.fingerprint() != manifest.fingerprint(), field
