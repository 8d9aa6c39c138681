"""The libraries that figures are compared with, in a virtual environment of their own.

They see torch and everything else of the environment that runs the benchmark, and bring nothing of it again.
"""

import subprocess
import sys
import sysconfig
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
    python = FOLDER / "bin" / "python"
    done = FOLDER / ".ready"
    if done.exists() and done.read_text() == "\n".join(PACKAGES):
        return python
    print(f"installing {', '.join(PACKAGES[:2])} into {FOLDER.relative_to(ROOT)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    here = sysconfig.get_path("purelib")
    (Path(packages) / "shared.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*install, *PACKAGES], check=True)
    done.write_text("\n".join(PACKAGES))
    return python
