"""What a top-k loses of the teacher, with its tail spread evenly and by one shape, and what a step costs.

    python benchmarks/signals.py                           # SmolLM2-135M-Instruct, its own samples at T = 0.7
    python benchmarks/signals.py --teacher FOLDER --top-k 32 64

One line of JSON. `kl` is KL(teacher || what the signal rebuilds) over the whole vocabulary, nats a token, on
samples that the shape was not made from; `bias` is that of forward KL's mean gradient by the hidden states at
the smallest top-k, of a student that is the teacher at temperature 1.3, over the gradient's own length. The
kept log-probabilities are taken as exact. `step` is the time of head and loss, forward and backward, against
the same divergence with the tail as one outcome, in processor seconds of all threads, by number of positions.
"""

# N = response tokens, V = vocabulary, K = kept tokens, D = hidden size

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lightopd.engines.hf.engine import TransformersEngine, load_hf_engine
from lightopd.models.head import Head
from lightopd.models.load import load_model
from lightopd.objectives.base.batch import BatchTotals, RolloutBatch, SignalBatch
from lightopd.objectives.base.whole_vocabulary import spread_tails
from lightopd.objectives.loss import compute_loss
from lightopd.objectives.requirements import needs
from lightopd.pipelines.demos.smollm2_weights import convert_gguf, find_smollm2
from lightopd.schemas.configs import HfEngine, ModelConfig, SamplingConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.schemas.records import Sequence as TokenSequence
from lightopd.training.student.forward import evaluate_tokens

PROMPTS = (
    "Why is the sky blue?",
    "Write a short letter to a friend about a rainy day.",
    "What is 17 plus 26, and how do you know?",
    "Explain what a bank does to a child.",
    "Give three reasons to learn to swim.",
    "Write a Python function that reverses a list.",
    "Who was Marie Curie?",
    "Describe how bread is made.",
)
STUDENT_TEMPERATURE = 1.3
TAILS = ("bucket", "uniform", "shaped")
REPEATS = 3


def sample(engine: TransformersEngine, teacher: Path, tokens: int, seed: int) -> list[TokenSequence]:
    """Responses of the teacher at temperature 0.7, so many tokens or a little more."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    sequences: list[TokenSequence] = []
    while sum(len(each.response_ids) for each in sequences) < tokens:
        keys = [f"{len(sequences)}/{number}" for number in range(len(PROMPTS))]
        prompts = [np.array(prompt_ids(tokenizer, text), np.int32) for text in PROMPTS]
        sampling = SamplingConfig(temperature=0.7, max_tokens=max(1, tokens // len(PROMPTS)), seed=seed)
        drawn = engine.generate(prompts, sampling, keys, [tokenizer.eos_token_id])
        sequences += [TokenSequence(p, s.response_ids) for p, s in zip(prompts, drawn, strict=True)]
    return sequences


def prompt_ids(tokenizer, text: str) -> list[int]:
    """Ids of one user turn, or of the bare text where there is no template."""
    if tokenizer.chat_template is None:
        return list(tokenizer(text)["input_ids"])
    turns = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def kl_lost(teacher_NV: Tensor, shape_V: Tensor, top_k: int) -> float:
    """Mean over positions of the sum over the tail of T_v log(T_v / (r c_v / C)); float64."""
    kept_NV = torch.zeros_like(teacher_NV, dtype=torch.bool).scatter_(1, teacher_NV.topk(top_k).indices, True)
    tail_NV = teacher_NV.exp().masked_fill(kept_NV, 0)
    log_shape_NV = shape_V.log().expand_as(teacher_NV).masked_fill(kept_NV, -torch.inf)
    rebuilt_NV = log_shape_NV.log_softmax(1) + tail_NV.sum(1, keepdim=True).log()
    return float((tail_NV * (teacher_NV - rebuilt_NV).masked_fill(kept_NV, 0)).sum(1).mean())


def rebuilt(teacher_NV: Tensor, lies_NV: Tensor, top_k: int) -> Tensor:
    """The teacher as kept: its top-k, and outside it the mass that is left, as `lies_NV` has it; float64."""
    kept_NV = torch.zeros_like(teacher_NV, dtype=torch.bool).scatter_(1, teacher_NV.topk(top_k).indices, True)
    left_N1 = teacher_NV.exp().masked_fill(kept_NV, 0).sum(1, keepdim=True)
    outside_NV = lies_NV.masked_fill(kept_NV, 0)
    return torch.where(kept_NV, teacher_NV.exp(), left_N1 * outside_NV / outside_NV.sum(1, keepdim=True))


class Bias:
    """Bias of forward KL's mean gradient by the hidden states, with a fixed head, at one top-k.

    The gradient is the head's mean under student minus teacher, averaged over tokens; the student is the
    teacher at `STUDENT_TEMPERATURE`. The bias is the length of what a rebuilt teacher adds, over its own.
    """

    def __init__(self, head_VD: Tensor, shape_V: Tensor, top_k: int) -> None:
        self._head_VD, self._shape_V, self._top_k = head_VD, shape_V, top_k
        self._sums: dict[str, Tensor] = {}

    def add(self, logits_NV: Tensor) -> None:
        """The logits of more tokens, float64."""
        teacher_NV = logits_NV.log_softmax(1)
        student_NV = (logits_NV / STUDENT_TEMPERATURE).softmax(1)
        tails = {"bucket": student_NV, "uniform": torch.ones_like(student_NV)}
        tails["shaped"] = self._shape_V.expand_as(student_NV)
        off = {
            name: rebuilt(teacher_NV, lies, self._top_k) - teacher_NV.exp() for name, lies in tails.items()
        }
        for name, values_NV in (*off.items(), ("true", student_NV - teacher_NV.exp())):
            by_hidden_D = self._head_VD.T @ values_NV.sum(0).float()
            self._sums[name] = self._sums.get(name, 0) + by_hidden_D

    def figures(self) -> dict[str, float]:
        """The bias by tail."""
        true = self._sums["true"].norm()
        return {name: round(float(self._sums[name].norm() / true), 4) for name in TAILS}


def measure_kl(teacher: Path, top_ks: Sequence[int], calibrate: int, tokens: int, seed: int) -> dict:
    """KL by support and tail, and how many tokens made and measured it."""
    engine = load_hf_engine(HfEngine(device="cpu"), ModelConfig(path=str(teacher)))
    calibration, measured = (sample(engine, teacher, n, seed + i) for i, n in enumerate((calibrate, tokens)))
    shapes = {k: torch.from_numpy(engine.sum_tails(calibration, k)) for k in top_ks}
    engine.close()
    model = load_model(ModelConfig(path=str(teacher)), "cpu")
    sums = {(k, tail): 0.0 for k in top_ks for tail in ("uniform", "shaped")}
    total, narrowest = 0, min(top_ks)
    head_VD = model.get_output_embeddings().weight.detach()
    bias = Bias(head_VD, shapes[narrowest] / shapes[narrowest].sum(), narrowest)
    for sequence in measured:
        ids = torch.tensor(np.concatenate([sequence.prompt_ids, sequence.response_ids])[None]).long()
        with torch.no_grad():
            logits_NV = model(input_ids=ids).logits[0, len(sequence.prompt_ids) - 1 : -1]
        bias.add(logits_NV.double())
        teacher_NV = logits_NV.double().log_softmax(1)
        total += len(teacher_NV)
        for k, shape_V in shapes.items():
            sums[k, "uniform"] += len(teacher_NV) * kl_lost(teacher_NV, torch.ones_like(shape_V), k)
            sums[k, "shaped"] += len(teacher_NV) * kl_lost(teacher_NV, shape_V / shape_V.sum(), k)
    kl = {str(k): {tail: round(sums[k, tail] / total, 4) for tail in ("uniform", "shaped")} for k in top_ks}
    counts = [sum(len(each.response_ids) for each in part) for part in (calibration, measured)]
    return {"kl": kl, "bias": bias.figures(), "calibration_tokens": counts[0], "measured_tokens": counts[1]}


def make_batch(vocabulary: int, top_k: int, tokens: int) -> RolloutBatch:
    """A signal of random, peaked teachers over one long rollout."""
    random = torch.Generator().manual_seed(0)
    teacher_NV = (3 * torch.randn(tokens, vocabulary, generator=random)).log_softmax(1)
    topk_NK, ids_NK = teacher_NV.topk(top_k)
    tail_N = torch.log1p(-topk_NK.exp().sum(1))
    zeros_N = torch.zeros(tokens, dtype=torch.int64)
    return RolloutBatch(
        ids_N=ids_NK[:, 0],
        row_N=zeros_N,
        index_N=torch.arange(tokens),
        loss_mask_N=torch.ones(tokens, dtype=torch.bool),
        turns_N=zeros_N,
        ref_logprobs_N=None,
        signals={"teacher": SignalBatch(topk_NK[:, 0], ids_NK, topk_NK, tail_N)},
        lengths_R=torch.tensor([tokens]),
        rewards_R=torch.zeros(1),
        is_truncated_R=torch.zeros(1, dtype=torch.bool),
        groups_R=torch.zeros(1, dtype=torch.int64),
        domains=(None,),
        rollout_ids=("r",),
        totals=BatchTotals(1, tokens),
        longest=tokens,
        num_turns=1,
    )


def measure_steps(vocabulary: int, hidden: int, top_k: int, tokens: int) -> dict[str, dict[str, float]]:
    """Processor seconds of head and loss by divergence, the least of a few, and the ratio to the bucket's.

    The two tails take turns, so that a busy machine slows both.
    """
    random = torch.Generator().manual_seed(1)
    weight_VD = torch.randn(vocabulary, hidden, generator=random).mul_(0.05).requires_grad_()
    hidden_ND = torch.randn(tokens, hidden, generator=random).requires_grad_()
    shapes = {"teacher": torch.randn(vocabulary, generator=random).softmax(0).numpy()}
    batch, head = make_batch(vocabulary, top_k, tokens), Head(weight_VD, None, None, 1.0)
    found: dict[str, dict[str, float]] = {}
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        target = {"kind": "divergence", "divergence": divergence}
        bucket, shaped = (
            ObjectiveConfig.model_validate({"target": target | {"tail": tail}})
            for tail in ("bucket", "shaped")
        )
        tails = spread_tails(needs(shaped).tails, shapes, vocabulary)
        rounds = [
            (
                _step_seconds(bucket, batch, hidden_ND, head, ()),
                _step_seconds(shaped, batch, hidden_ND, head, tails),
            )
            for _ in range(REPEATS)
        ]
        bucket_s, shaped_s = (min(seconds) for seconds in zip(*rounds, strict=True))
        found[divergence] = {"bucket_s": round(bucket_s, 3), "shaped_ratio": round(shaped_s / bucket_s, 2)}
    return found


def _step_seconds(objective, batch, hidden_ND, head, tails) -> float:
    hidden_ND.grad = head.weight_VD.grad = None
    began_s = time.process_time()
    student = evaluate_tokens(hidden_ND, head, batch, needs(objective).supports, tails)
    compute_loss(objective, batch, student).value.backward()
    return time.process_time() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a model folder; left out, SmolLM2 from its package")
    parser.add_argument("--top-k", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--calibrate", type=int, default=384, help="response tokens for the shape")
    parser.add_argument("--tokens", type=int, default=384, help="response tokens that are measured")
    parser.add_argument("--step-tokens", type=int, nargs="+", default=[256, 2048], help="of a timed step")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        teacher = asked.teacher or convert_gguf(find_smollm2(), Path(folder) / "teacher")
        found = measure_kl(teacher, asked.top_k, asked.calibrate, asked.tokens, asked.seed)
        rows, columns = load_model(ModelConfig(path=str(teacher)), "cpu").get_output_embeddings().weight.shape
    top_k = min(asked.top_k)
    steps = {str(tokens): measure_steps(rows, columns, top_k, tokens) for tokens in asked.step_tokens}
    print(json.dumps({**found, "step": steps, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
