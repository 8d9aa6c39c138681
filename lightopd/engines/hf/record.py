"""What is said of transformers as an engine, before anything is loaded."""

import importlib.metadata

from lightopd.models.attention import attention_of
from lightopd.models.limits import precision_of
from lightopd.schemas.configs import HfEngine, ModelConfig
from lightopd.schemas.manifest import EngineRecord, Precision


def describe_hf(engine: HfEngine, model: ModelConfig) -> tuple[EngineRecord, Precision]:
    """The lineage record of transformers on a device, and the precision it runs the model in."""
    settings = {
        "attention": attention_of(model),
        "device": engine.device,
        "torch": importlib.metadata.version("torch"),
    }
    record = EngineRecord(kind="hf", version=importlib.metadata.version("transformers"), settings=settings)
    return record, precision_of(model)
