"""One flat, frozen configuration for a run: what every key means, and how files and words become one.

Layers, each over the one before: recipe < an older run < files in the order given < `key=value` < flags. Nothing is
rewritten in silence: whatever was renamed, translated, answered or set aside is one of `Loaded.notes`, and
`Loaded.origin` says where each value was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuoling import dialects
from tuoling.config_files import ConfigFile, parse_value, read_config_file
from tuoling.config_keys import RunConfig, cross_issues, explain
from tuoling.config_settle import Issue, nearest, settle
from tuoling.errors import ConfigError
from tuoling.language import tr

__all__ = ["Loaded", "RunConfig", "load_config", "recipe_names", "recipe_path", "sort_words"]

RECIPES = Path(__file__).parent / "recipes"

EXCLUSIVE = (
    ("batch_size", "gradient_accumulation_steps"),
    ("warmup_steps", "warmup_ratio"),
    ("data", "dataset"),
    ("eval_data", "eval_dataset", "val_size"),
)
"""Keys that say one thing in several ways: a later layer that uses one sets the earlier layers' others aside."""

PATH_KEYS = ("model_name_or_path", "adapter_name_or_path", "data", "eval_data", "dataset_dir", "deepspeed")


@dataclass(frozen=True)
class Loaded:
    """A configuration, what was done to get it, and where each value came from."""

    config: RunConfig
    notes: list[str]
    origin: dict[str, str]


@dataclass
class _Layer:
    """Values in our own keys, with the place each was written."""

    values: dict[str, Any]
    where: dict[str, str]
    notes: list[str] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)
    folders: tuple[Path, ...] = ()


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """A packaged recipe, or a file of the user's. Raises ConfigError with the nearest names."""
    packaged = RECIPES / f"{name}.yaml"
    if "/" not in name and packaged.is_file():
        return packaged
    if Path(name).is_file():
        return Path(name)
    near = nearest(name, recipe_names())
    raise ConfigError(
        tr(f"no such recipe: {name}", f"没有这个配方：{name}"),
        where="recipe",
        remedy=near
        or tr(f"recipes: {', '.join(recipe_names())}", f"可用的配方：{'、'.join(recipe_names())}"),
    )


def sort_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Words of a command line → config files and `key=value` overrides. A recipe's name is `recipe=NAME`.

    Raises ConfigError for a word that is none of these.
    """
    files, overrides = [], []
    for word in words:
        key, equals, _ = word.partition("=")
        if Path(word).is_file():
            files.append(Path(word))
        elif equals and key.strip().isidentifier():
            overrides.append(word)
        elif word in recipe_names():
            overrides.append(f"recipe={word}")
        else:
            raise _no_such_word(word)
    return files, overrides


def _no_such_word(word: str) -> ConfigError:
    names = recipe_names()
    if Path(word).suffix.lower() in (".yaml", ".yml", ".json", ".jsonc") or "/" in word:
        return ConfigError(tr("no such config file", "没有这个配置文件"), where=word)
    return ConfigError(
        tr(
            f"not a file, not a key=value, not a recipe: {word}",
            f"既不是文件，也不是 key=value 或配方名：{word}",
        ),
        remedy=nearest(word, names) or tr(f"recipes: {', '.join(names)}", f"可用的配方：{'、'.join(names)}"),
    )


def load_config(
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    older: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read, translate, merge and check. Every issue found is in the one ConfigError raised.

    files:     YAML or JSON, ours or another tool's (dialects.py), comments tolerated.
    overrides: `key=value`, the value read as YAML; `key=null` takes a file's key away.
    flags:     keys the command line has options for; None values are not given.
    older:     keys of a run that is continued, under all of these.
    """
    typed = [_split_override(word) for word in overrides]
    removed = {key for key, value in typed if value is None}
    words = _settle(
        {key: value for key, value in typed if value is not None}, tr("command line", "命令行"), "key=value"
    )
    given = {key: value for key, value in (flags or {}).items() if value not in (None, (), [])}
    flagged = _settle(given, tr("command line", "命令行"), "flag")
    file_layers, recipe = _read_layers([read_config_file(path) for path in files], removed)
    asked = flagged.values.pop("recipe", None) or words.values.pop("recipe", None) or recipe
    taken_over = {key: value for key, value in (older or {}).items() if key not in removed}
    layers = [_settle(taken_over, "run.json", "flag"), *file_layers, words, flagged]
    if asked is not None and "recipe" not in removed:
        layers.insert(0, _recipe_layer(str(asked), removed))
    values, origin, notes, issues = _merge(layers)
    if "max_tokens_per_batch" in values and "per_device_train_batch_size" in removed:
        for given in (values, origin):  # nor another tool's default: a step of tokens is wanted
            given.pop("per_device_train_batch_size", None)
    if removed:
        names = ", ".join(sorted(removed))
        notes.append(tr(f"taken away on the command line: {names}", f"已在命令行中去掉：{names}"))
    if asked is not None and "recipe" not in removed:
        values["recipe"] = str(asked)
    return Loaded(_build(values, origin, issues), notes, origin)


def _split_override(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            tr(f"not key=value: {word}", f"不是 key=value 的写法：{word}"),
            remedy=tr("for example lora_rank=16", "例如 lora_rank=16"),
        )
    return key.strip(), parse_value(text, where=word)


def _settle(values: Mapping[str, Any], place: str, kind: str) -> _Layer:
    """Rename aliases and answer other tools' keys in values that were typed, not read from a file."""
    where = {key: f"{place}: {key}" if kind == "flag" else f"{place}: {key}={values[key]}" for key in values}
    settled = settle(values, where)
    return _Layer(settled.values, settled.where, [] if kind == "flag" else settled.notes, settled.issues)


def _read_layers(read: Sequence[ConfigFile], removed: set[str]) -> tuple[list[_Layer], str | None]:
    """Config files → layers in our keys. A pair that belongs together is one layer."""
    layers: list[_Layer] = []
    recipe: str | None = None
    for group in dialects.group_files(read):
        files = [file.without(removed) for file in group]
        translated = dialects.translate(files)
        recipe = translated.values.pop("recipe", None) or recipe
        folders = tuple(file.path.parent for file in files)
        layer = _Layer(translated.values, translated.where, translated.notes, translated.issues, folders)
        _find_beside(layer)
        layers.append(layer)
    return layers, recipe


def _recipe_layer(name: str, removed: set[str]) -> _Layer:
    file = read_config_file(recipe_path(name)).without(removed)
    settled = settle(file.values, dict.fromkeys(file.values, f"recipe {name}"))
    return _Layer(settled.values, settled.where, settled.notes, settled.issues)


def _find_beside(layer: _Layer) -> None:
    """Relative paths are as typed; one that exists only beside the config file is taken from there, and said."""
    for key in PATH_KEYS:
        value = layer.values.get(key)
        single = isinstance(value, str)
        if value is None or not (single or isinstance(value, (list, tuple))):
            continue
        found = [_beside(str(item), layer.folders) for item in ([value] if single else value)]
        for old, new in zip([value] if single else value, found, strict=True):
            if old != new:
                layer.notes.append(
                    tr(
                        f"{key}: {old} is not in the current folder; using {new}, beside the config file",
                        f"{key}：当前目录下没有 {old}，改用配置文件旁边的 {new}",
                    )
                )
        layer.values[key] = found[0] if single else found


def _beside(text: str, folders: tuple[Path, ...]) -> str:
    name, mark, count = text.rpartition("#") if text.rpartition("#")[2].isdigit() else (text, "", "")
    path = Path(name).expanduser()
    if path.is_absolute() or path.exists():
        return text
    for folder in folders:
        if (folder / path).exists():
            return f"{folder / path}{mark}{count}"
    return text


def _merge(
    layers: Sequence[_Layer],
) -> tuple[dict[str, Any], dict[str, str], list[str], list[Issue]]:
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    notes: list[str] = []
    issues: list[Issue] = []
    for layer in layers:
        for group in EXCLUSIVE:
            if not any(key in layer.values for key in group):
                continue
            for key in group:
                if key in values and key not in layer.values:
                    using = next(other for other in group if other in layer.values)
                    notes.append(
                        tr(
                            f"{key} ({origin[key]}) is set aside: {using} was given later",
                            f"{key}（{origin[key]}）不再起作用：后面给出了 {using}",
                        )
                    )
                    del values[key], origin[key]
        values.update(layer.values)
        origin.update(layer.where)
        notes += layer.notes
        issues += layer.issues
    return values, {key: place for key, place in origin.items() if key in values}, notes, issues


def _build(values: dict[str, Any], origin: Mapping[str, str], issues: list[Issue]) -> RunConfig:
    """Validate everything and raise everything at once."""
    found = list(issues)
    config: RunConfig | None = None
    try:
        config = RunConfig(**values)
    except ValidationError as error:
        for key, problem, remedy in explain(error):
            found.append(Issue(problem, origin.get(key, key), remedy))
        if not any(item["type"] == "run_config" for item in error.errors()):
            for key, problem, remedy in cross_issues(values):
                found.append(Issue(problem, origin.get(key, key), remedy))
    if found:
        raise _as_error(found)
    assert config is not None
    return config


def _as_error(issues: Sequence[Issue]) -> ConfigError:
    if len(issues) == 1:
        return ConfigError(issues[0].problem, where=issues[0].where, remedy=issues[0].remedy)
    lines = [
        f"  {issue.where}: {issue.problem}" + (f" ({issue.remedy})" if issue.remedy else "")
        for issue in issues
    ]
    count = len(issues)
    return ConfigError(
        "\n".join([tr(f"{count} problems in the configuration", f"配置中有 {count} 处问题"), *lines])
    )
