"""Compiled decoder layers (`torch.compile`), and passes that go around them.

Each layer is compiled on its own: layers of one kind share a graph, so that compiling takes as long for many
as for one, and what lies around them (recomputation, sharding, masks) stays as it is. Lengths are dynamic; a
kind of layer is compiled once for several rows and once for a single one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from lightopd.errors import ConfigError

GRAPHS = 64
"""Most graphs of one piece of code, past which torch would run it uncompiled; its own 8 are few for layers of
several kinds."""


def compile_layers(student: PreTrainedModel) -> None:
    """Let the student's decoder layers be compiled in place, each when it first runs; names stay as they are.

    Raises:
        ConfigError: transformers does not say what the student's layers are.
    """
    kinds = tuple(student._no_split_modules or ())
    layers = [module for module in student.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ConfigError(
            f"transformers names no decoder layers of {type(student).__name__} (_no_split_modules is "
            f"{list(kinds)}), and compile needs them; leave compile out"
        )
    import torch._dynamo

    torch._dynamo.config.recompile_limit = GRAPHS
    for layer in layers:
        layer.compile(dynamic=True)


@contextmanager
def uncompiled(student: torch.nn.Module) -> Iterator[None]:
    """Run the student without its compiled layers, so that a pass of another shape or kind compiles nothing.

    For generation, which grows a cache by one token at a time, and for passes without gradient. It leaves a
    student alone that is not compiled.
    """
    compiled = {module: module._compiled_call_impl for module in student.modules()}
    # Of these layers alone: what else is compiled, such as attention over packed rows, stays so.
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def is_of_compiler(error: RuntimeError) -> bool:
    """Whether compiling failed, and not the pass itself."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
