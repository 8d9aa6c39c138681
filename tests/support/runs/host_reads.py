"""A mode in which no tensor may be read by the host: on a GPU every such read waits for the device."""

import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = (
    "item",
    "tolist",
    "numpy",
    "cpu",
    "nonzero",
    "unique",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)
"""Methods that need a tensor's values on the host."""
aten = torch.ops.aten
OPERATIONS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.masked_select.default,
    aten.equal.default,
}
"""What such reads come to, also where nobody calls a method."""
ON_A_CPU_ONLY = ("_check_ids",)
"""Functions that the package calls for tensors in host memory alone."""


class HostRead(AssertionError):
    """A tensor was read."""


def _refuse(what):
    frame = sys._getframe(2)
    places = []
    while frame:
        if frame.f_code.co_name in ON_A_CPU_ONLY:
            return
        if "/lightopd/" in frame.f_code.co_filename or "/transformers/" in frame.f_code.co_filename:
            places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    raise HostRead(f"{what} reads a tensor on the host: {' < '.join(places[:4])}")


class _Methods(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        if getattr(function, "__name__", "") in READS:
            _refuse(function.__name__)
        return function(*arguments, **(options or {}))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        by_mask = function is aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if by_mask or function in OPERATIONS:
            _refuse(str(function))
        return function(*arguments, **(options or {}))


class NoHostReads:
    """Context in which every read of a tensor by the host is an error that names its place."""

    def __enter__(self):
        self._modes = (_Methods(), _Operations())
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)
