"""The engine that runs a model with transformers in this process."""

import contextlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lightopd.cache.signals.channels import Channels
from lightopd.engines.base import check_prompts, check_sequences
from lightopd.engines.hf import generate as hf_generate
from lightopd.engines.hf import score as hf_score
from lightopd.engines.hf.probe import check_engine
from lightopd.engines.hf.shared_prompts import prompts_can_be_shared
from lightopd.engines.stop_strings import StopStrings
from lightopd.errors import EngineError
from lightopd.models.attention import attention_of
from lightopd.models.causal_attention import use_causal_attention
from lightopd.models.head import Head, check_head, head_of
from lightopd.models.limits import precision_of
from lightopd.models.load import LoadedModel, choose_device, context_length_of, load_model
from lightopd.schemas import records
from lightopd.schemas.configs import HfEngine, ModelConfig, SamplingConfig
from lightopd.schemas.manifest import EngineRecord, Precision
from lightopd.schemas.records import Ids, RolloutSignal, Sample


class TransformersEngine:
    """Implements `Engine` with transformers; built by `load_hf_engine`."""

    def __init__(self, loaded: LoadedModel, settings: HfEngine, stops: StopStrings) -> None:
        self.vocabulary_size = len(loaded.head.weight_VD)
        self.context_length = loaded.context_length
        self._loaded: LoadedModel | None = loaded
        self._settings, self._stops = settings, stops
        self._share_prompts = prompts_can_be_shared(loaded)

    def generate(
        self, prompts: Sequence[Ids], sampling: SamplingConfig, keys: Sequence[str], stop_ids: Sequence[int]
    ) -> list[Sample]:
        """Draw responses; see `Engine.generate`."""
        assert self._loaded is not None, "the engine is closed"
        check_prompts(prompts, keys, self.vocabulary_size, self.context_length)
        return hf_generate.generate(
            self._loaded,
            prompts,
            sampling,
            keys,
            stop_ids,
            self._settings.generate_rollouts,
            new_reader=self._stops.readers(sampling),
        )

    def score(
        self, sequences: Sequence[records.Sequence], top_k: int, min_probability: float = 0.0
    ) -> list[RolloutSignal]:
        """Score responses; see `Engine.score`."""
        assert self._loaded is not None, "the engine is closed"
        check_sequences(sequences, top_k, self.vocabulary_size, self.context_length)
        return hf_score.score(self._loaded, sequences, self._score_settings(top_k, min_probability))

    def sum_tails(
        self, sequences: Sequence[records.Sequence], top_k: int, min_probability: float = 0.0
    ) -> NDArray[np.float64]:
        """Probabilities outside what is kept; see `SeesWholeTails.sum_tails`."""
        assert self._loaded is not None, "the engine is closed"
        check_sequences(sequences, top_k, self.vocabulary_size, self.context_length)
        return hf_score.sum_tails(self._loaded, sequences, self._score_settings(top_k, min_probability))

    def sum_negentropies(self, sequences: Sequence[records.Sequence]) -> float:
        """Sum of T log T; see `SeesWholeTails.sum_negentropies`."""
        assert self._loaded is not None, "the engine is closed"
        check_sequences(sequences, 0, self.vocabulary_size, self.context_length)
        return hf_score.sum_negentropies(self._loaded, sequences, self._score_settings(0, 0.0))

    def own_head(self) -> Head:
        """The output layer in the model's own number format; see `KeepsHiddenStates.own_head`."""
        assert self._loaded is not None, "the engine is closed"
        return head_of(self._loaded.model)

    def sum_hidden(
        self, sequences: Sequence[records.Sequence]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sums over response tokens; see `KeepsHiddenStates.sum_hidden`."""
        assert self._loaded is not None, "the engine is closed"
        check_sequences(sequences, 0, self.vocabulary_size, self.context_length)
        return hf_score.sum_hidden(self._loaded, sequences, self._score_settings(0, 0.0))

    def score_hidden(
        self,
        sequences: Sequence[records.Sequence],
        top_k: int,
        min_probability: float,
        channels: Channels | None,
    ) -> list[RolloutSignal]:
        """Scores with hidden states; see `KeepsHiddenStates.score_hidden`."""
        assert self._loaded is not None, "the engine is closed"
        check_sequences(sequences, top_k, self.vocabulary_size, self.context_length)
        settings = self._score_settings(top_k, min_probability)
        keep: Literal["int8", "bfloat16"] = "bfloat16" if channels is None else "int8"
        return hf_score.score(self._loaded, sequences, replace(settings, keep=keep, channels=channels))

    def _score_settings(self, top_k: int, min_probability: float) -> hf_score.ScoreSettings:
        batch_tokens = self._settings.batch_tokens
        return hf_score.ScoreSettings(top_k, min_probability, batch_tokens, self._share_prompts)

    def close(self) -> None:
        """Free the model's memory, on the device too."""
        self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def describe_hf(engine: HfEngine, model: ModelConfig) -> tuple[EngineRecord, Precision]:
    """The lineage record of transformers on a device, and the precision it runs the model in."""
    settings = {
        "attention": attention_of(model),
        "device": engine.device,
        "torch": importlib.metadata.version("torch"),
    }
    record = EngineRecord(kind="hf", version=importlib.metadata.version("transformers"), settings=settings)
    return record, precision_of(model)


def load_hf_engine(engine: HfEngine, model: ModelConfig) -> TransformersEngine:
    """Load a model, check that its output layer is understood, and make an engine of it.

    Raises:
        InputError: the model cannot be read.
        ConfigError: no such device, or an adapter without peft.
        EngineError: the model makes its logits in an unknown way.
    """
    device = choose_device(engine.device)
    loaded = load_model(model, device)
    with _told_as_unfit(loaded):
        check_head(loaded)
    head = head_of(loaded)
    if device.type == "cpu":
        # A CPU multiplies in float32: converted once here, or else for every batch.
        head = replace(head, weight_VD=head.weight_VD.float())
    if device.type == "cuda":
        use_causal_attention(loaded)
    everything = LoadedModel(loaded, head, device, context_length_of(loaded))
    with _told_as_unfit(loaded):
        check_engine(everything)
    return TransformersEngine(everything, engine, StopStrings(model))


@contextlib.contextmanager
def _told_as_unfit(model: PreTrainedModel) -> Iterator[None]:
    """What the code of a model raises when it is run as the engine runs it, in one line."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise EngineError(
            f"{type(model).__name__} cannot be run by engine hf ({reason}); use engine vllm"
        ) from error
