"""What this machine has: versions, devices, memory, disk, and which extras and engines can be used."""

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORE = ("torch", "transformers", "lightning", "duckdb", "pyarrow", "pydantic", "tokenizers")


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the examination."""

    group: str
    name: str
    value: str
    is_well: bool | None
    """False where something is missing or broken, None where nothing can be wrong."""


def examine(folder: Path) -> list[Fact]:
    """Look at this machine.

    Args:
        folder: whose disk is measured, such as that of the runs.
    """
    return [*_versions(), *_devices(), *_space(folder), *_extras(), *_engines()]


def _versions() -> list[Fact]:
    import lightopd

    python = Fact("versions", "python", f"{platform.python_version()} ({sys.executable})", None)
    own = Fact("versions", "lightopd", lightopd.__version__, None)
    return [own, python, *(_package("versions", name) for name in CORE)]


def _package(group: str, name: str) -> Fact:
    try:
        return Fact(group, name, importlib.metadata.version(name), True)
    except importlib.metadata.PackageNotFoundError:
        return Fact(group, name, f"not installed; pip install {name}", False)


def _devices() -> list[Fact]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Fact("devices", "torch", f"cannot be imported: {_line(error)}", False)]
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [_device(torch, name) for name in names]


def _device(torch: Any, name: str) -> Fact:
    """Whether a small product comes out right there, and what memory is free."""
    try:
        product = torch.ones(8, 8, device=name) @ torch.ones(8, 8, device=name)
        is_right = bool((product == 8).all())
        if not name.startswith("cuda"):
            return Fact(
                "devices", name, f"{torch.get_num_threads()} threads" if name == "cpu" else "", is_right
            )
        free_bytes, total_bytes = torch.cuda.mem_get_info(name)
        model = torch.cuda.get_device_name(name)
        return Fact("devices", name, f"{model}, {_gib(free_bytes)} of {_gib(total_bytes)} free", is_right)
    except RuntimeError as error:
        return Fact("devices", name, f"does not compute: {_line(error)}", False)


def _space(folder: Path) -> list[Fact]:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    disk = shutil.disk_usage(there)
    is_writable = os.access(there, os.W_OK)
    said = f"{_gib(disk.free)} of {_gib(disk.total)} free{'' if is_writable else ', not writable'}"
    return [_memory(), Fact("space", f"disk of {there}", said, is_writable and disk.free > 2**30)]


def _memory() -> Fact:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return Fact("space", "memory", "not known on this system", None)
    return Fact("space", "memory", f"{_gib(free)} of {_gib(total)} free", free > 2**30)


def _extras() -> list[Fact]:
    """Each extra of the package: installed, or what lacks."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in importlib.metadata.requires("lightopd") or ()]
    names = importlib.metadata.metadata("lightopd").get_all("Provides-Extra") or []
    facts = []
    for extra in names:
        lacking = [
            requirement.name
            for requirement in wanted
            if requirement.marker is not None
            and requirement.marker.evaluate({"extra": extra})
            and not requirement.marker.evaluate({"extra": ""})
            and not _is_met(requirement)
        ]
        said = "installed" if not lacking else f"lacks {', '.join(lacking)}; pip install 'lightopd[{extra}]'"
        facts.append(Fact("extras", extra, said, None if lacking else True))
    return facts


def _is_met(requirement: Any) -> bool:
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(requirement.specifier.contains(found, prereleases=True))


def _engines() -> list[Fact]:
    hf = [fact for fact in (_package("engines", "transformers"),) if fact.is_well]
    vllm = _package("engines", "vllm")
    return [
        Fact("engines", "hf", "works" if hf else "needs transformers", bool(hf)),
        Fact(
            "engines",
            "vllm",
            f"vllm {vllm.value}" if vllm.is_well else "not installed; pip install 'lightopd[vllm]'",
            True if vllm.is_well else None,
        ),
        Fact("engines", "server", "works with the address of a running vLLM server", True),
    ]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
