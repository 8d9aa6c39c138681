"""Configs from YAML files, `--set a.b=1` and flags, in that order of weight; errors in the user's words."""

import difflib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from lightopd.errors import ConfigError
from lightopd.files import looks_like_url, stream_kind
from lightopd.schemas.base import StrictModel
from lightopd.schemas.configs import FilePrompts, ModelConfig
from lightopd.schemas.run import STAGES, PhaseConfig, RunConfig

Model = TypeVar("Model", bound=StrictModel)


def read_yaml(name: str, shipped: Path | None = None) -> dict[str, Any]:
    """The mapping in a YAML file; a name that is no file is looked up among the shipped recipes.

    Raises:
        ConfigError: no such file, broken YAML (with its line), or not a mapping.
    """
    path = _find(name, shipped)
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path}: has more than {MAX_YAML_BYTES >> 20} MiB; name a file of settings")
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_EachKeyOnce)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a readable YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply; no setting needs more than a few levels") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a {type(value).__name__}, not keys and values")
    return value


MAX_YAML_BYTES = 4 * 2**20
MAX_YAML_VALUES = 100_000
"""Values of a YAML file once its aliases are expanded; a few lines can stand for billions."""


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML takes the last without a word, and endless aliases."""

    def construct_document(self, node: yaml.Node) -> Any:
        """The value of a document that is not too large."""
        self._num_values(node, {})
        return super().construct_document(node)

    def _num_values(self, node: yaml.Node, known: dict[int, int]) -> int:
        """Values under a node with its aliases expanded; a node within itself counts as too many."""
        if id(node) not in known:
            known[id(node)] = MAX_YAML_VALUES + 1
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            inner = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
            known[id(node)] = 1 + sum(self._num_values(one, known) for one in inner)
        if known[id(node)] > MAX_YAML_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"it stands for more than {MAX_YAML_VALUES:,} values", node.start_mark
            )
        return known[id(node)]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node whose keys differ."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is no text or number", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _find(name: str, shipped: Path | None) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if shipped is not None:
        recipe = shipped / f"{name.removesuffix('.yaml')}.yaml"
        if recipe.is_file() and recipe.resolve().is_relative_to(shipped.resolve()):
            return recipe
    if kind := stream_kind(path):
        raise ConfigError(f"{name} is {kind}, not a file; write the settings into a file")
    close = difflib.get_close_matches(name, _recipes(shipped) if shipped else [], n=3, cutoff=0.5)
    hint = f"; did you mean the recipe {' or '.join(close)}?" if close else ""
    raise ConfigError(f"no config file {name}{hint or '; give the path of a YAML file'}")


def _recipes(shipped: Path) -> list[str]:
    """Names of the recipes, without the study's arms, which no stage takes."""
    names = (path.relative_to(shipped).with_suffix("") for path in shipped.rglob("*.yaml"))
    return sorted(str(name) for name in names if name.parts[0] != "study")


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, mapping by mapping.

    A changed `kind` replaces the whole mapping; a plain path laid over a mapping with a `path` changes the
    path and keeps the other settings; settings of a model or a prompt file laid over its plain path join it.
    """
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            same_kind = value.get("kind", old.get("kind")) == old.get("kind")
            result[key] = merged(old, value) if same_kind else value
        elif isinstance(old, Mapping) and "path" in old and isinstance(value, str | Path):
            own = ("revision", "adapter")  # of the folder that was named before
            result[key] = {**{k: v for k, v in old.items() if k not in own}, "path": str(value)}
        elif isinstance(old, Mapping) and _lacks_its_path(old) and isinstance(value, str | Path):
            result[key] = {**old, "path": str(value)}
        elif isinstance(old, str | Path) and isinstance(value, Mapping) and _lacks_its_path(value):
            result[key] = {"path": str(old), **value}
        else:
            result[key] = value
    return result


def _lacks_its_path(settings: Mapping[str, Any]) -> bool:
    """Whether these are of a model or a prompt file: `--set student.adapter=A` beside `--student BASE`."""
    if not settings or "path" in settings or settings.get("kind", "file") != "file":
        return False
    return any(settings.keys() <= model.model_fields.keys() for model in (ModelConfig, FilePrompts))


def parse_set(assignment: str) -> dict[str, Any]:
    """`optimizer.lr=1e-5` as a nested mapping; the value is read as YAML.

    Raises:
        ConfigError: no `=`, an empty key, or a value that is not YAML.
    """
    key, separator, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {assignment!r} is not key=value, such as --set optimizer.lr=1e-5")
    try:
        number = _number(text)
        value: Any = yaml.load(text, Loader=_EachKeyOnce) if number is None else number  # a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--set {assignment[:200]!r}: the value is not YAML ({reason})") from error
    for part in reversed(parts):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _number(text: str) -> float | None:
    """`1e-5` as a float; YAML 1.1 takes it for a string. Whole numbers are left to YAML."""
    try:
        return float(text) if "e" in text.lower() and not text.lower().startswith("0x") else None
    except ValueError:
        return None


def build(model: type[Model], data: Mapping[str, Any]) -> Model:
    """The validated config.

    Raises:
        ConfigError: every problem in one message, each with its key, what was found, and close names.
    """
    try:
        return model.model_validate(_without_tildes(dict(data)))
    except ValidationError as error:
        problems = [_problem(item, model) for item in error.errors(include_url=False)]
        raise ConfigError("config: " + "; ".join(dict.fromkeys(problems))) from error


NOT_PATHS = ("template_options", "options", "stop")
"""Settings whose texts are not paths, whatever they begin with."""


def _without_tildes(value: Any) -> Any:
    """Settings with `~/...` as the home folder's path, as a shell reads it: YAML and `--set` see no shell."""
    if isinstance(value, Mapping):
        return {k: v if k in NOT_PATHS else _without_tildes(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_tildes(each) for each in value)
    if isinstance(value, str) and (value == "~" or value.startswith("~/")):
        return str(Path(value).expanduser())
    if isinstance(value, Path):
        return value.expanduser()
    return value


def build_run(data: Mapping[str, Any]) -> RunConfig:
    """The validated run file, the settings of every stage in it included.

    Raises:
        ConfigError: as `build`; a problem in a section names the section.
    """
    run = build(RunConfig, data)
    of_phases = [step for phase in run.phases for step in of_phase(run, phase).pipeline()]
    for _, stage, settings in [*run.pipeline(), *of_phases]:
        try:
            build(STAGES[stage], settings)
        except ConfigError as error:
            raise ConfigError(str(error).replace("config: ", f"config, section {stage}: ", 1)) from error
    return run


def of_phase(run: RunConfig, phase: PhaseConfig) -> RunConfig:
    """The run with a phase's settings laid over its sections."""
    own = {"rollout": phase.rollout, "precompute": phase.precompute or {}, "train": phase.train}
    laid = {name: merged(getattr(run, name), section) for name, section in own.items()}
    return run.model_copy(update={**laid, "phases": ()})


def load_stage(
    stage: str,
    files: Iterable[str],
    sets: Iterable[str],
    flags: Mapping[str, Any],
    shipped: Path | None = None,
) -> StrictModel:
    """Config of one stage: files in order, then `--set`, then the flags that were given (not None).

    A file is either the stage's own settings (or a part of them, such as a method recipe), or a run file,
    of which the stage's section is taken.
    """
    data: dict[str, Any] = {}
    for name in files:
        data = merged(data, _stage_part(stage, read_yaml(name, shipped)))
    return build(STAGES[stage], laid_over(data, sets, flags))


def load_run(
    files: Iterable[str], sets: Iterable[str], flags: Mapping[str, Any], shipped: Path | None = None
) -> RunConfig:
    """Config of the whole pipeline, from files, `--set` and flags as in `load_stage`."""
    data: dict[str, Any] = {}
    for name in files:
        data = merged(data, read_yaml(name, shipped))
    return build_run(laid_over(data, sets, flags))


def _stage_part(stage: str, data: dict[str, Any]) -> dict[str, Any]:
    if not is_run_file(data):
        return data
    settings = build_run(data).settings(stage)
    return build(STAGES[stage], settings).model_dump(mode="json", exclude_unset=True)


def is_run_file(data: Mapping[str, Any]) -> bool:
    """Whether a file's mapping has a section for a stage."""
    return any(isinstance(data.get(stage), Mapping) for stage in STAGES)


def laid_over(data: dict[str, Any], sets: Iterable[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """`--set` and then the flags that were given, laid over a config."""
    for assignment in sets:
        data = merged(data, parse_set(assignment))
    return merged(data, {key: value for key, value in flags.items() if value is not None})


def _problem(item: Mapping[str, Any], model: type[BaseModel]) -> str:
    location = [part for part in item["loc"] if " " not in str(part)]
    key = ".".join(str(part) for part in location) or "the whole"
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{_hint(model, location)}"
    if item["type"] == "missing":
        return f"{key} is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error":
        return message if key == "the whole" else f"{key}: {message}"
    if "api_key_env" in location:
        return f"{key}: give the name of an environment variable, not the key itself"
    found = repr(item["input"])
    return f"{key}: {message[:1].lower()}{message[1:]}, found {found[:200]}"


OTHER_NAMES = {
    "batch_size": "batch_sequences",
    "learning_rate": "lr",
    "max_new_tokens": "max_tokens",
    "max_steps": "steps",
    "num_generations": "n",
    "num_steps": "steps",
    "per_device_train_batch_size": "batch_sequences",
}
"""What other trainers call a setting of ours."""


def _hint(model: type[BaseModel], location: Sequence[Any]) -> str:
    """What an unknown key may have meant: a near name beside it, or where in the config the name is known."""
    name = str(location[-1])
    if len(location) == 1 and name in STAGES and model is STAGES[name]:
        return f" (settings of {name} are written without `{name}.` here)"
    beside = _field_names(model, location[:-1])
    ours = OTHER_NAMES.get(name, name)
    close = [ours] if ours in beside else difflib.get_close_matches(name, beside, n=2)
    if not close:
        sections = {"": model} | ({f"{n}.": m for n, m in STAGES.items()} if model is RunConfig else {})
        paths = [path for prefix, one in sections.items() for path in _paths(one, prefix)]
        close = list(dict.fromkeys(path for path in paths if path.rpartition(".")[2] == ours))[:3]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _paths(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for nested in _models_in(field.annotation):
            yield from _paths(nested, f"{prefix}{name}.")


def _field_names(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Names known beside an unknown key; unions contribute the fields of all their members."""
    found = [model]
    for part in location:
        step = [
            m
            for one in found
            if part in one.model_fields
            for m in _models_in(one.model_fields[part].annotation)
        ]
        found = step or found
    return sorted({name for one in found for name in one.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in _models_in(part)]


def as_plain(config: StrictModel) -> Any:
    """The whole config as JSON has it, with URLs as they were given: a path keeps one of their slashes."""
    return _urls_whole(config.model_dump(mode="json"), config.model_dump())


def _urls_whole(plain: Any, typed: Any) -> Any:
    if isinstance(typed, Path):
        return looks_like_url(typed) or plain
    if isinstance(typed, dict):
        return dict(zip(plain, map(_urls_whole, plain.values(), typed.values()), strict=True))
    if isinstance(typed, list | tuple):
        return list(map(_urls_whole, plain, typed))
    return plain


def as_yaml(config: StrictModel) -> str:
    """The whole config as YAML, defaults written out; `-c` reads it back to an equal config."""
    return str(yaml.safe_dump(as_plain(config), sort_keys=False, allow_unicode=True))


def describe(model: type[BaseModel], prefix: str = "") -> str:
    """Every key a config can have, one block each: key, default, values to choose from, meaning.

    Where a setting is of one of several kinds, the fields of each kind follow its name.
    """
    lines = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        known = field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else f"default {_shown(known)}"
        values = _values_of(field.annotation)
        choice = f"; one of {', '.join(values)}" if len(values) > 1 else ""
        lines += [f"{key}  ({default}{choice})", f"    {field.description}"]
        kinds = _models_in(field.annotation)
        for nested in kinds:
            if len(kinds) > 1:
                sentence = (nested.__doc__ or "").strip().partition("\n")[0]
                lines.append(f"{key} of kind {_kind_of(nested)}: {sentence}")
            lines.append(describe(nested, f"{key}."))
    return "\n".join(lines)


def _kind_of(model: type[BaseModel]) -> str:
    values = _values_of(model.model_fields["kind"].annotation) if "kind" in model.model_fields else []
    return ", ".join(values) or model.__name__


def _values_of(annotation: Any) -> list[str]:
    """The values of an enumeration, inside lists and options too."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in _values_of(part)]


def _shown(value: Any) -> str:
    return (
        "below" if isinstance(value, BaseModel) else str(list(value) if isinstance(value, tuple) else value)
    )
