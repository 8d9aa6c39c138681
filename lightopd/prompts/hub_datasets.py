"""Hugging Face `datasets` as Arrow batches: a saved folder, a folder of files, or a hub id."""

from collections.abc import Iterator
from typing import Any

from lightopd.errors import ConfigError, InputError
from lightopd.schemas.configs import FilePrompts

BATCH_ROWS = 1000
SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files by which a folder of `save_to_disk` is known."""


def dataset_batches(config: FilePrompts) -> Iterator[Any]:
    """Arrow tables of the dataset's rows in their order; a hub dataset is downloaded once.

    Raises:
        ConfigError: the package is not installed.
        InputError: no such dataset, subset or split; the message names those there are.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{config.path} is no file; to read it with datasets, run: pip install 'lightopd[datasets]'"
        ) from error
    datasets.disable_progress_bars()
    dataset = _one_split(_loaded(config), config)
    for start in range(0, len(dataset), BATCH_ROWS):
        yield dataset.with_format("arrow")[start : start + BATCH_ROWS]


def _loaded(config: FilePrompts) -> Any:
    import datasets

    is_saved = any((config.path / name).is_file() for name in SAVED)
    try:
        if is_saved:
            return datasets.load_from_disk(str(config.path))
        return datasets.load_dataset(str(config.path), config.subset, revision=config.revision)
    except Exception as error:  # `datasets` raises whatever the loader below it raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{config.path} cannot be read with datasets ({reason[:300]}); check the path or hub id, and set "
            "prompts.subset where there are several"
        ) from error


def _one_split(found: Any, config: FilePrompts) -> Any:
    if not isinstance(found, dict):
        if config.split is not None:
            raise InputError(f"{config.path} holds one dataset without splits; leave prompts.split out")
        return found
    wanted = config.split or "train"
    if wanted not in found:
        raise InputError(
            f"{config.path} has no split {wanted!r}; set prompts.split to one of {', '.join(found)}"
        )
    return found[wanted]
