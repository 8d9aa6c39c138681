"""`lightopd config`: what can be set, and whether a file is right."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from lightopd.cli import options
from lightopd.cli.guard import guarded
from lightopd.cli.output import say

if TYPE_CHECKING:
    from lightopd.schemas.base import StrictModel

app = typer.Typer(no_args_is_help=True, help="Show or check configs.", rich_markup_mode=None)

Stage = Annotated[str, typer.Argument(help="sft, rollout, precompute, train, eval or run.")]


@app.command()
@guarded
def show(
    stage: Stage,
    config: options.Configs = None,
    sets: options.Sets = None,
    as_json: options.Json = False,
) -> None:
    """Every setting of a stage with its meaning; with -c, the resolved config as YAML.

    Example: lightopd config show train
    """
    from lightopd.config import as_plain, as_yaml, describe

    if as_json:
        found = as_plain(_load(stage, config, sets)) if config or sets else None
        say(json.dumps(_model(stage).model_json_schema() if found is None else found))
    elif config or sets:
        say(as_yaml(_load(stage, config, sets)).rstrip("\n"))
    else:
        say(describe(_model(stage)))


@app.command()
@guarded
def check(
    stage: Stage,
    config: options.Configs = None,
    sets: options.Sets = None,
    as_json: options.Json = False,
) -> None:
    """Load a config and say whether it is right.

    Example: lightopd config check run -c run.yaml
    """
    _load(stage, config, sets)
    say(json.dumps({"stage": stage, "is_right": True}) if as_json else f"{stage} config is right")


def _model(stage: str) -> "type[StrictModel]":
    from lightopd.errors import ConfigError
    from lightopd.schemas.run import STAGES, RunConfig

    models: dict[str, type[StrictModel]] = {**STAGES, "run": RunConfig}
    if stage not in models:
        raise ConfigError(f"no stage {stage!r}; the stages are {', '.join(models)}")
    return models[stage]


def _load(stage: str, config: list[str] | None, sets: list[str] | None) -> "StrictModel":
    from lightopd.config import load_run, load_stage
    from lightopd.pipelines import RECIPES

    _model(stage)
    if stage == "run":
        return load_run(config or [], sets or [], {}, RECIPES)
    return load_stage(stage, config or [], sets or [], {}, RECIPES)
