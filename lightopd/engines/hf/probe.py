"""A trial of the engine at load: a mixed batch and generation must give what the plain model gives."""

import torch

from lightopd.engines.hf.generate import forced_hidden
from lightopd.engines.hf.hidden_states import plain_hidden
from lightopd.models.load import LoadedModel
from lightopd.models.probe import check_same, plain_hidden_states, probe_rows
from lightopd.schemas import records

FORCED = 6
"""Tokens of each row that are run one at a time, as they would be drawn; the switches lie among them."""


@torch.inference_mode()
def check_engine(loaded: LoadedModel) -> None:
    """Compare both ways in which the engine runs a model with the plain model, on a few dozen tokens.

    Raises:
        EngineError: they differ by more than rounding explains.
    """
    rows = probe_rows(loaded.model, len(loaded.head.weight_VD))
    plain = plain_hidden_states(loaded.model, rows)
    sequences = [records.Sequence(prompt_ids=row[:1], response_ids=row[1:]) for row in rows]
    together = torch.split(plain_hidden(loaded, sequences), [len(row) - 1 for row in rows])
    attention = loaded.model.config._attn_implementation
    check_same(
        loaded.head,
        together,
        [hidden_TD[:-1] for hidden_TD in plain],
        f"in a batch under attention {attention}",
    )
    drawn = forced_hidden(loaded, rows, min(FORCED, min(map(len, rows)) - 1))
    check_same(loaded.head, list(drawn), plain, f"in generation under attention {attention}")
