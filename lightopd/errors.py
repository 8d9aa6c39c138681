"""One exception tree: each message says what is wrong, what was found and what to do.

Every error takes its finished message as the only argument, so it pickles across processes.
"""


class LightopdError(Exception):
    """A user's problem, told in one line; the command line prints it and exits with `exit_code`."""

    exit_code = 1


class ConfigError(LightopdError):
    """A config file, a flag or a combination of settings is wrong."""

    exit_code = 2


class InputError(LightopdError):
    """A prompt file, a model folder or another input cannot be used; the message names file and row."""

    exit_code = 3


class LineageError(LightopdError):
    """Two artefacts that must come from the same model, tokenizer or template do not."""

    exit_code = 4


class CacheError(LightopdError):
    """A cache is incomplete, damaged, of another schema version, or belongs to another run."""

    exit_code = 5


class EngineError(LightopdError):
    """A model could not generate or score: non-finite logits, a missing log-probability, no memory."""

    exit_code = 6


class OutputError(LightopdError):
    """An output could not be written: no permission, a full disk, a folder that belongs to another run."""

    exit_code = 7


class TrainingError(LightopdError):
    """Training cannot continue: a non-finite loss, a checkpoint of another run, a batch that does not fit."""

    exit_code = 8
