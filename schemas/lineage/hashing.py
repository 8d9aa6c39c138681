"""The hash of a manifest: everything that decides a byte of its shards, and nothing else."""

from typing import Any

from lightopd.schemas.base import StrictModel, canonical_hash

NEVER_HASHED = {"lightopd_version", "noise", "cross_check", "rendered_at", "sft_declared"}
"""Fields of a manifest that decide no byte of its shards."""
_HASHED_BY_VERSION_1 = {
    "CacheManifest": ("rendering", "overrides"),
    "SignalManifest": ("context", "min_probability", "overrides"),
    "ModelFingerprint": ("adapter",),
    "Precision": ("quantization",),
    "EngineRecord": ("settings",),
    "SftLineage": ("teacher", "name", "data"),
    "SamplingConfig": ("n", "temperature", "top_p", "max_tokens", "seed"),
}
"""Fields that schema version 1 hashes at their default too. Complete for good: none is ever added."""


def compared_fields(manifest: StrictModel) -> dict[str, Any]:
    """Every field that can decide a byte of the shards: paths, lightopd's version and noise are left out."""
    compared: dict[str, Any] = _without_sources(manifest.model_dump(mode="json", exclude=NEVER_HASHED))
    return compared


def fingerprint_of(manifest: StrictModel, schema_version: int) -> str:
    """Hash of the compared fields that are not at their default.

    A field that is added with a default leaves the fingerprint of every manifest as it was.
    """
    plain = manifest.model_dump(mode="json", exclude=NEVER_HASHED)
    return canonical_hash(_without_sources(_without_defaults(manifest, plain, schema_version)))


def _without_defaults(value: Any, plain: Any, version: int) -> Any:
    """`plain`, the JSON of `value`, without the fields of models that are at their default."""
    if isinstance(value, tuple):
        return [_without_defaults(item, told, version) for item, told in zip(value, plain, strict=True)]
    if not isinstance(value, StrictModel):
        return plain
    always = _HASHED_BY_VERSION_1.get(type(value).__name__, ()) if version == 1 else ()
    return {
        name: _without_defaults(getattr(value, name), plain[name], version)
        for name, field in type(value).model_fields.items()
        if name in plain and (field.is_required() or name in always or getattr(value, name) != field.default)
    }


def _without_sources(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_sources(item) for key, item in value.items() if key not in ("source", "commit")}
    if isinstance(value, list):
        return [_without_sources(item) for item in value]
    return value
