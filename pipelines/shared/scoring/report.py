"""What `precompute` says at its end: figures of the signal, and what its readers must not miss."""

import time

from lightopd.cache.manifests import signal_folder
from lightopd.cache.signals.horizon import horizon_notes
from lightopd.cache.store import Cache, Signal
from lightopd.lineage.checks import precision_note
from lightopd.models.limits import model_limits
from lightopd.pipelines.shared.gap import gap_figures, measured_gap, verdict
from lightopd.pipelines.shared.reports import Report, override_notes
from lightopd.pipelines.shared.scoring.overlap import overlap_figures, overlap_note, student_overlap
from lightopd.schemas.configs import PrecomputeConfig
from lightopd.schemas.manifest import NoiseFloor, SignalManifest


def precompute_report(
    config: PrecomputeConfig, cache: Cache, tokens_per_s: float | None, started_s: float
) -> Report:
    """The report of a signal that is whole; `started_s` is when the stage began."""
    signal = cache.signals[config.signal]
    seconds = time.monotonic() - started_s
    tokens = sum(marker.tokens for marker in cache.markers)
    scored = sum(marker.tokens for marker in signal.markers)
    overlap = student_overlap(cache, config.signal)
    figures = {
        "rollouts": sum(marker.rows for marker in signal.markers),
        "response_tokens": tokens,
        **_horizon_figures(signal),
        "bytes_per_token": sum(marker.size_bytes for marker in signal.markers) / max(1, scored),
        **gap_figures(cache, config.signal),
        **_shape_figures(signal.manifest),
        **(overlap_figures(overlap) if overlap else {}),
        "noise_mean_nats": signal.manifest.noise.mean_nats if signal.manifest.noise else None,
        "noise_max_nats": signal.manifest.noise.max_nats if signal.manifest.noise else None,
        **_cross_check_figures(signal.manifest.cross_check),
        "tokens_per_s": tokens_per_s,
        "seconds": round(seconds, 2),
    }
    precision = precision_note(cache.manifest.precision, signal.manifest.precision)
    notes = (
        *(
            [verdict(measured_gap(cache, config.signal), cache.manifest.sampling)]
            if config.role == "teacher"
            else []
        ),
        *horizon_notes(cache, [config.signal]),
        *([precision] if precision else []),
        *([overlap_note(overlap)] if overlap else []),
        *_width_notes(cache, config),
        *override_notes(signal.manifest.overrides),
    )
    return Report(
        "precompute", str(signal_folder(cache.path, config.signal)), figures, notes=notes, seconds=seconds
    )


def _horizon_figures(signal: Signal) -> dict[str, int]:
    if signal.manifest.horizon is None:
        return {}
    return {"scored_tokens": sum(marker.tokens for marker in signal.markers)}


def _shape_figures(manifest: SignalManifest) -> dict[str, int]:
    return {} if manifest.tail_shape is None else {"tail_shape_tokens": manifest.tail_shape.tokens}


def _width_notes(cache: Cache, config: PrecomputeConfig) -> list[str]:
    """What became of the ids that the teacher has and the student has not."""
    limit = cache.signals[config.signal].manifest.id_limit
    if limit is None:
        return []
    outputs = model_limits(config.teacher).vocabulary_size
    return [
        f"{config.teacher.path} has {outputs} outputs, the student {limit}: ids from {limit} on are left "
        f"to the tail"
    ]


def _cross_check_figures(found: NoiseFloor | None) -> dict[str, float]:
    if found is None:
        return {}
    return {"cross_check_mean_nats": found.mean_nats, "cross_check_max_nats": found.max_nats}
