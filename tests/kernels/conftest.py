"""The kernel's tests run on every path: torch's operations, Triton's interpreter, and a GPU.

The interpreter needs a few milliseconds for every tile, so that its run of this suite is slow; the quick
tests of it are in `test_fused_tiles.py`.
"""

import pytest
from kernel_cases import Path, needs_gpu


@pytest.fixture(
    params=[
        "plain",
        pytest.param("fused", marks=pytest.mark.slow),
        pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu]),
    ]
)
def path(request, monkeypatch):
    """Which path `kernel_cases.ours` takes."""
    if request.param == "fused":
        pytest.importorskip("triton")
    monkeypatch.setattr(Path, "is_fused", request.param != "plain")
    monkeypatch.setattr(Path, "device", "cuda" if request.param == "gpu" else "cpu")
    return request.param
