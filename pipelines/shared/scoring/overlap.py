"""What a teacher's most likely tokens and the student's at rollout have in common, for a report."""

from collections.abc import Iterator

from lightopd.cache.manifests import read_manifest, signal_folder, signal_names
from lightopd.cache.signals.overlap import Overlap, measured_overlap
from lightopd.cache.store import Cache, open_cache
from lightopd.pipelines.shared.gap import some_shards
from lightopd.schemas.manifest import PLAIN, SIGNAL_MANIFEST, SignalManifest


def student_overlap(cache: Cache, scored: str) -> Overlap | None:
    """Overlap of the signal that was scored with the other side's; None where the cache has not both.

    The student's side is a signal of the very model that sampled, under its own prompts (`--role self`); the
    teacher's is the one that was scored, or the first in the order of names.
    """
    for other in _others(cache, scored):
        both = open_cache(cache.path, signals=[scored, other], incomplete=True)
        if both.missing(other):
            continue
        is_student = _is_student(both, both.signals[scored].manifest)
        teacher, student = (other, scored) if is_student else (scored, other)
        return measured_overlap(both, teacher, student, some_shards(both))
    return None


def _others(cache: Cache, scored: str) -> Iterator[str]:
    """Signals that are the other side of the one that was scored, by their manifests."""
    own = cache.signals[scored].manifest
    for name in signal_names(cache.path):
        found = read_manifest(signal_folder(cache.path, name) / SIGNAL_MANIFEST, SignalManifest)
        has_both = min(own.top_k, found.top_k) > 0 and (own.support, found.support) == (None, None)
        is_teacher = [each.role == "teacher" and not _is_student(cache, each) for each in (own, found)]
        if has_both and any(is_teacher) and any(_is_student(cache, each) for each in (own, found)):
            yield name


def _is_student(cache: Cache, signal: SignalManifest) -> bool:
    sampler, model = cache.manifest.sampler, signal.model
    is_sampler = sampler is not None and model is not None and model.is_same_as(sampler)
    return is_sampler and signal.context == PLAIN


def overlap_figures(overlap: Overlap) -> dict[str, float]:
    """The means, by the names of a report."""
    return {
        "topk_overlap": overlap.share,
        "topk_overlap_teacher_mass": overlap.teacher_mass,
        "topk_overlap_student_mass": overlap.student_mass,
    }


def overlap_note(overlap: Overlap) -> str:
    """What is in common, by quarter of the response too."""
    quarters = ", ".join(f"{share:.0%}" for share in overlap.quarters)
    return (
        f"of the top-{overlap.top_k} of teacher and student {overlap.share:.0%} are common ({quarters} by "
        f"quarter of the response), {overlap.teacher_mass:.1%} of the teacher's probability and "
        f"{overlap.student_mass:.1%} of the student's"
    )
