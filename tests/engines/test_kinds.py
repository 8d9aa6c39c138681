"""The registry of engine kinds."""

from pkgutil import resolve_name
from typing import get_args

import pytest

from lightopd.engines.kinds import KINDS, tail_of
from lightopd.schemas.engines import EngineConfig, HfEngine, ServerEngine, VllmEngine


def test_the_registry_has_every_kind_that_a_config_can_name_and_no_other():
    union = get_args(get_args(EngineConfig)[0])
    assert set(KINDS) == {config.model_fields["kind"].default for config in union}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_names_functions_that_are_there(kind):
    assert callable(resolve_name(KINDS[kind].describe))
    assert callable(resolve_name(KINDS[kind].load))


def test_only_transformers_sums_the_tail():
    configs = HfEngine(), VllmEngine(), ServerEngine(urls="http://localhost:1")
    assert [tail_of(config) for config in configs] == ["exact", "derived", "derived"]


def test_an_unknown_kind_is_an_error_and_not_another_engine():
    with pytest.raises(KeyError, match="tgi"):
        tail_of(HfEngine.model_construct(kind="tgi"))
