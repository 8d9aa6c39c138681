"""Families of models: one step through the whole path, with the loss that the model's own logits give."""

import numpy as np
import pytest
import torch
from model_families import FAMILIES, make_model

from lightopd.cache.reader import read_shard_columns
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig, OptimizerConfig
from lightopd.schemas.objectives.objective import MLE_OBJECTIVE
from lightopd.training.fit import fit


@torch.no_grad()
def own_loss(model, cache):
    """Mean over rollouts of the mean negative log-likelihood, one by one, by the model's own head."""
    means = []
    for shard in cache.shards:
        columns = read_shard_columns(cache, shard)
        for row in range(len(columns.rollout_ids)):
            prompt = columns.prompt_ids_P[slice(*columns.prompt_offsets[row : row + 2])]
            tokens = slice(*columns.offsets[row : row + 2])
            response, mask = columns.response_ids_N[tokens], columns.loss_mask_N[tokens]
            ids = torch.from_numpy(np.concatenate([prompt, response])).long()
            logits_TV = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            picked = logits_TV.float().log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
            means.append(-picked.numpy()[mask].mean())
    return float(np.mean(means))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_every_family_has_the_loss_of_its_own_logits(make_cache, tmp_path, name):
    model = make_model(name)
    model.save_pretrained(tmp_path / "student")
    cache = make_cache(tmp_path / "answers", num_rollouts=8, origin="teacher")
    finetune = FinetuneConfig(
        steps=2, batch_sequences=8, micro_batch_tokens=60, optimizer=OptimizerConfig(lr=1e-3, eps=1e-3)
    )
    result = fit(
        cache, ModelConfig(path=str(tmp_path / "student")), tmp_path / "out", finetune, MLE_OBJECTIVE
    )
    first = float((tmp_path / "out" / "metrics.csv").read_text().splitlines()[1].split(",")[1])
    assert first == pytest.approx(own_loss(model, cache), abs=2e-5)
    assert result.metrics["loss"] < first
