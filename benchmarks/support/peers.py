"""The libraries that figures are compared with, in a virtual environment of their own.

They see torch and everything else of the environment that runs the benchmark, and bring nothing of it again.
"""

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "peers"
PACKAGES = (
    "trl==1.16.0",
    "datasets==5.2.0",
    "pandas==3.1.1",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "xxhash==4.1.0",
)
"""Without their dependencies: what else they need is in `constraints.txt`."""


def peer_python() -> Path:
    """The interpreter of the environment, which is made on first use."""
    if _is_ready(FOLDER, PACKAGES):
        return FOLDER / "bin" / "python"
    print(f"installing {', '.join(PACKAGES[:2])} into {FOLDER.relative_to(ROOT)}", file=sys.stderr)
    python = _make_environment(FOLDER)
    subprocess.run([*_install(python), *PACKAGES], check=True)
    (FOLDER / ".ready").write_text("\n".join(PACKAGES))
    return python


def install_peers(name: str, packages: Sequence[str]) -> Path:
    """The interpreter of an environment in which every package is that could be had; a plain line for others.

    Wheels in `benchmarks/wheels` go before the registry.
    """
    folder = FOLDER.parent / name
    if _is_ready(folder, packages):
        return folder / "bin" / "python"
    python = _make_environment(folder)
    wheels = ["--find-links", str(ROOT / "benchmarks" / "wheels")]
    for package in packages:
        if subprocess.run([*_install(python), *wheels, package], capture_output=True, check=False).returncode:
            print(f"{package} could not be installed", flush=True)
    (folder / ".ready").write_text("\n".join(packages))
    return python


def _is_ready(folder: Path, packages: Sequence[str]) -> bool:
    done = folder / ".ready"
    return done.exists() and done.read_text() == "\n".join(packages)


def _install(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]


def _make_environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    here = sysconfig.get_path("purelib")
    (Path(packages) / "shared.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return python


if __name__ == "__main__":
    print(peer_python())
