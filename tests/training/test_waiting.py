"""A micro-batch never waits for the device: nothing in it asks for a number, or for places a mask counts."""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3ForCausalLM

from lightopd.objectives.loss import compute_loss
from lightopd.objectives.requirements import needs
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.data.batches import StepDataset, collate
from lightopd.training.data.plan import make_plan
from lightopd.training.data.shard_store import FirstReading
from lightopd.training.data.split import select_rollouts
from lightopd.training.student.forward import student_sums, student_tokens
from lightopd.training.student.training_mode import prepare_student

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")
"""Operations whose result, or its size, only the device knows."""


ONLY_ON_A_CPU = ("_check_ids", "create_causal_mask")
"""Functions of ours and of transformers that ask only on a CPU, or only about masks made on the host."""


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITS or _counts_a_mask(func, args):
            callers = [frame.name for frame in traceback.extract_stack()]
            assert set(callers) & set(ONLY_ON_A_CPU), f"{func._schema.name} waits: {callers[-6:-1]}"
        return func(*args, **(kwargs or {}))


def _counts_a_mask(func, args):
    if func._schema.name not in ("aten::index", "aten::index_put_", "aten::index_put"):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    "objective", [{"target": "log_ratio"}, {"target": {"kind": "divergence"}}], ids=["sampled", "top_k"]
)
def test_a_micro_batch_never_waits_for_the_device(make_cache, student_folder, tmp_path, layout, objective):
    config = ObjectiveConfig.model_validate(objective)
    asked = needs(config)
    reading = FirstReading(make_cache(tmp_path / "cache"), asked.signals, asked.topk, 2**30)
    index = select_rollouts(reading.cache, config, asked, 0, reading).trained
    finetune = FinetuneConfig(batch_sequences=8, micro_batch_tokens=60, layout=layout)
    rows = StepDataset(make_plan(index, finetune, 0, 1), reading.store(index))[0][0]
    loaded = Qwen3ForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    student = prepare_student(loaded, gradient_checkpointing=False)
    with NoWaiting():
        batch = collate(rows, torch.device("cpu"))
        tokens = student_tokens(student, batch, asked.supports)
        loss = compute_loss(config, batch.rollouts, tokens)
        student_sums(batch.rollouts, tokens)
        loss.value.backward()
