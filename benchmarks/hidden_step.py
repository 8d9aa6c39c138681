"""Time of a training step that compares the whole vocabulary from hidden states, against a top-64.

    OMP_NUM_THREADS=1 python benchmarks/hidden_step.py
    python benchmarks/hidden_step.py --layers 4 --tokens 128 --divergences reverse_kl

One line of JSON. A step is forward, loss and backward of one micro-batch. The student is a Llama with the
sizes of SmolLM2-135M and random weights; the teacher's hidden states are twice as wide, its head has the same
vocabulary. `ratio` is the time of `tail: whole` over that of the same divergence with `tail: bucket` on a
stored top-64, the two taking turns, median over pairs; `goal` is what it should not pass. `entries_ratio` is
that of a top-64 which is made of the hidden states in the step. Time is that of the processor, on one thread;
on a GPU it is the clock's.
"""

# B = rollouts, T = their tokens, N = response tokens, R = rollouts, V = vocabulary, K = kept tokens
# E = width of the teacher's hidden states

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightopd.models.head import Head, head_of, last_hidden
from lightopd.objectives.base.batch import BatchTotals, RolloutBatch, SignalBatch
from lightopd.objectives.base.hidden_states import hidden_signals
from lightopd.objectives.loss import compute_loss
from lightopd.objectives.requirements import needs, on_signals
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.student.forward import evaluate_tokens

VOCABULARY, WIDTH = 49_152, 576
TOP_K = 64
ROLLOUTS = 4
GOAL = 2.0
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def make_student(layers: int, device: str) -> LlamaForCausalLM:
    """Random weights in the sizes of SmolLM2-135M, float32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config)


def make_teacher(tokens: int, device: str) -> tuple[Tensor, Head]:
    """Hidden states and a head whose logits spread like those of a language model."""
    generator = torch.Generator().manual_seed(1)
    hidden_NE = torch.randn(tokens, 2 * WIDTH, generator=generator)
    weight_VE = torch.randn(VOCABULARY, 2 * WIDTH, generator=generator) * 3 / (2 * WIDTH) ** 0.5
    return hidden_NE.to(device), Head(weight_VE.to(device), None, None, 1.0)


def make_batch(hidden_NE: Tensor, head: Head) -> RolloutBatch:
    """Rollouts of equal length with the teacher's top-64 and its hidden states."""
    tokens, device = len(hidden_NE), hidden_NE.device
    logprobs_NV = head.logits(hidden_NE).log_softmax(1)
    topk_NK, ids_NK = logprobs_NV.topk(TOP_K)
    tail_N = torch.log1p(-topk_NK.exp().sum(1))
    signal = SignalBatch(topk_NK[:, 0], ids_NK, topk_NK, tail_N, hidden_ND=hidden_NE)
    row_N = torch.arange(tokens, device=device) * ROLLOUTS // tokens
    lengths_R = torch.bincount(row_N, minlength=ROLLOUTS)
    return RolloutBatch(
        ids_N=ids_NK[:, 0],
        row_N=row_N,
        index_N=torch.arange(tokens, device=device) % (tokens // ROLLOUTS),
        loss_mask_N=torch.ones(tokens, dtype=torch.bool, device=device),
        turns_N=torch.zeros(tokens, dtype=torch.int64, device=device),
        ref_logprobs_N=None,
        signals={"teacher": signal},
        lengths_R=lengths_R,
        rewards_R=torch.zeros(ROLLOUTS, device=device),
        is_truncated_R=torch.zeros(ROLLOUTS, dtype=torch.bool, device=device),
        groups_R=torch.arange(ROLLOUTS, device=device),
        domains=(None,) * ROLLOUTS,
        rollout_ids=tuple(map(str, range(ROLLOUTS))),
        totals=BatchTotals(ROLLOUTS, tokens),
        longest=tokens // ROLLOUTS,
        num_turns=1,
    )


def make_step(student: LlamaForCausalLM, batch: RolloutBatch, head: Head, term: dict) -> Callable[[], float]:
    """A function that runs one step and gives its seconds."""
    objective = ObjectiveConfig.model_validate(term)
    wanted = on_signals(needs(objective), {"teacher": TOP_K})
    hidden = hidden_signals(wanted, {"teacher": head}, VOCABULARY)
    input_ids_BT = batch.ids_N.view(ROLLOUTS, -1)

    def step() -> float:
        student.zero_grad(set_to_none=True)
        began_s = now_s(input_ids_BT.device)
        hidden_ND = last_hidden(student, input_ids=input_ids_BT, use_cache=False).flatten(0, 1)
        tokens = evaluate_tokens(hidden_ND, head_of(student), batch, wanted.supports, hidden=hidden)
        compute_loss(objective, batch, tokens).value.backward()
        return now_s(input_ids_BT.device) - began_s

    return step


def now_s(device: torch.device) -> float:
    """The clock's time when a GPU is done; else the processor's, which other processes do not lengthen."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def measure(layers: int, tokens: int, divergences: Sequence[str], repeats: int, device: str) -> dict:
    """Figures of every divergence."""
    student = make_student(layers, device)
    hidden_NE, head = make_teacher(tokens, device)
    batch, found = make_batch(hidden_NE, head), {}
    for divergence in divergences:
        target = {"kind": "divergence", "divergence": divergence}
        steps = {
            "top64": make_step(student, batch, head, {"target": target}),
            "whole": make_step(student, batch, head, {"target": {**target, "tail": "whole"}}),
            "entries": make_step(student, batch, head, {"target": target, "entries": {"top_k": TOP_K}}),
        }
        turns = [{name: step() for name, step in steps.items()} for _ in range(repeats + 1)][1:]
        found[divergence] = {
            "top64_s": round(statistics.median(turn["top64"] for turn in turns), 4),
            "ratio": round(statistics.median(turn["whole"] / turn["top64"] for turn in turns), 3),
            "entries_ratio": round(statistics.median(turn["entries"] / turn["top64"] for turn in turns), 3),
        }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--divergences", nargs="+", default=list(DIVERGENCES))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    figures = measure(options.layers, options.tokens, options.divergences, options.repeats, options.device)
    settings = {"layers": options.layers, "tokens": options.tokens, "device": options.device, "goal": GOAL}
    print(json.dumps({"benchmark": "hidden_step", **settings, "step": figures}))


if __name__ == "__main__":
    main()
