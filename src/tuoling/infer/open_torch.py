"""A run, adapter or model folder in transformers, with more adapters on the same weights where they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import console
from tuoling.errors import ModelError, UsageError
from tuoling.files import read_json, sha256_file, sha256_text
from tuoling.infer.engine import BASE, GenerationSettings, settings_from_config
from tuoling.language import tr
from tuoling.models.quantization import Quantization
from tuoling.models.quantization import chosen as chosen_quantization
from tuoling.models.source import ModelSource, find_model, weight_files
from tuoling.text.templates import Template, choose_template

if TYPE_CHECKING:
    from tuoling.infer.open_engine import EngineOptions
    from tuoling.infer.torch_engine import TorchEngine
    from tuoling.text.tokenizer import TextTokenizer


def open_torch(path_or_id: str, options: EngineOptions) -> TorchEngine:
    """Find, load and wrap what lies there. Raises ModelError, TemplateError, UsageError."""
    base, alpha = options.get("base"), options.get("lora_alpha")
    source = find_model(path_or_id, revision=options.get("revision"), base=base, lora_alpha=alpha)
    more = _more_adapters(source, options)
    quantization = chosen_quantization(options.get("quantization_bit"), source.quantization)
    merge = bool(options.get("merge"))
    if merge:
        _require_mergeable(source, quantization, more)
    from tuoling.infer.torch_engine import TorchEngine
    from tuoling.models.load import load_adapter, load_model, load_tokenizer

    tokenizer = load_tokenizer(source, for_training=False)
    template = _template(source, tokenizer, options)
    if quantization:
        console.note(tr(f"base weights in {quantization}", f"基座权重为 {quantization}"))
    model: Any = load_model(
        source,
        dtype=options.get("dtype", "auto"),
        device=options.get("device", "auto"),
        for_training=False,
        allow_remote_code=options.get("allow_remote_code", False),
        quantization=quantization,
    )
    precision = f"{options.get('dtype', 'auto')}{quantization}"
    if merge:
        model, precision = model.merge_and_unload(safe_merge=True), f"{precision} merged"
    layers = {name: f"adapter_{number}" for number, name in enumerate(more)}
    for name, adapter in more.items():
        model = load_adapter(model, adapter, layers[name])
    opened = source.is_adapter and not merge
    engine = TorchEngine(
        model,
        tokenizer,
        template,
        **_voice(source, options, template, precision),
        adapter=(adapter_name(source) if opened else BASE) if opened or more else None,
        layers="default" if opened else None,
    )
    if opened:
        voice = _voice(source, options, template, f"{precision} base")
        TorchEngine(model, tokenizer, template, **voice, adapter=BASE, layers=None, beside=engine)
    for name, adapter in more.items():
        own = load_tokenizer(adapter, for_training=False)
        template = _template(adapter, own, options)
        voice = _voice(adapter, options, template, precision)
        TorchEngine(model, own, template, **voice, adapter=name, layers=layers[name], beside=engine)
    return engine


def adapter_name(source: ModelSource) -> str:
    """What an adapter is called where several are loaded: its folder's name."""
    return Path(source.name).expanduser().resolve().name or source.path.name


def _template(source: ModelSource, tokenizer: TextTokenizer, options: EngineOptions) -> Template:
    requested = options.get("template")
    chosen, reason = choose_template(
        requested=requested,
        saved=source.template,
        tokenizer=tokenizer,
        family_default=source.family.template,
    )
    (console.warn if _changed(source, options) else console.note)(reason)
    return chosen


def _changed(source: ModelSource, options: EngineOptions) -> bool:
    """Whether the user asked for another template than the weights were tuned with."""
    requested = options.get("template")
    return bool(requested and source.template and requested != source.template)


def _voice(source: ModelSource, options: EngineOptions, template: Template, precision: str) -> dict[str, Any]:
    """How one source answers: TorchEngine's keywords."""
    defaults, end_ids = _generation_config(source)
    return {
        "defaults": defaults,
        "stops": () if _changed(source, options) else source.stops,
        "end_ids": end_ids,
        "system": source.system,
        "fingerprint": sha256_text(f"{source.fingerprint()}\n{template.fingerprint()}\n{precision}"),
    }


def _generation_config(source: ModelSource) -> tuple[GenerationSettings, Iterable[int]]:
    """Settings and end tokens from the nearest generation_config.json: the adapter's, else the base's."""
    for folder in (source.path, source.run_folder, source.weights_path):
        file = folder / "generation_config.json"
        if file.is_file():
            config = read_json(file)
            ends = config.get("eos_token_id")
            ends = ends if isinstance(ends, list) else [ends]
            return settings_from_config(config), [end for end in ends if isinstance(end, int)]
    return GenerationSettings(), []


# -- more adapters ---------------------------------------------------------------------------------------------


def _more_adapters(first: ModelSource, options: EngineOptions) -> dict[str, ModelSource]:
    """The other adapters by name, each found and known to stand on the same base."""
    found: dict[str, ModelSource] = {}
    taken = [BASE, *([adapter_name(first)] if first.is_adapter else [])]
    for name, path in (options.get("adapters") or {}).items():
        if name in taken or name in found:
            raise UsageError(
                tr(f"two adapters are called {name}", f"有两个适配器都叫 {name}"),
                where=f"adapter {path}",
                remedy=f"--adapter {tr('OTHER_NAME', '别的名字')}={path}",
            )
        source = find_model(path, base=options.get("base"), lora_alpha=options.get("lora_alpha"))
        if not source.is_adapter:
            raise ModelError(
                tr("this is a whole model, not an adapter", "这是完整的模型，不是适配器"), where=path
            )
        if not options.get("base"):  # else the user has said which one, and was warned where it differs
            _require_same_base(first, source)
        found[name] = source
    return found


def _require_same_base(first: ModelSource, other: ModelSource) -> None:
    ours, theirs = first.weights_path, other.weights_path
    if ours.resolve() == theirs.resolve() or _same_files(ours, theirs):
        return
    raise ModelError(
        tr(
            f"the adapter stands on another base: {theirs}, and {ours} is loaded",
            f"该适配器的基座不同：它用 {theirs}，而已载入的是 {ours}",
        ),
        where=str(other.path),
        remedy=tr(f"to use it on this one all the same: --base {ours}", f"仍要用在这个基座上：--base {ours}"),
    )


def _same_files(ours: Path, theirs: Path) -> bool:
    """Whether two folders hold copies of one model, by its config and the names and sizes of its weights."""

    def facts(folder: Path) -> list[tuple[str, int]]:
        return [(file.name, file.stat().st_size) for file in weight_files(folder)]

    same = sha256_file(ours / "config.json") == sha256_file(theirs / "config.json")
    return same and facts(ours) == facts(theirs)


def _require_mergeable(
    source: ModelSource, quantization: Quantization, more: Mapping[str, ModelSource]
) -> None:
    """Raise UsageError where the adapter cannot go into the weights."""
    if not source.is_adapter:
        problem = tr("there is no adapter to merge", "没有可以合并的适配器")
    elif more:
        problem = tr("merged weights carry no other adapters", "合并后的权重不能再带其他适配器")
    elif quantization:
        problem = tr(f"weights in {quantization} are not merged into", f"{quantization} 权重不能合并适配器")
    else:
        return
    raise UsageError(problem, where="--merge", remedy=tr("leave --merge away", "请去掉 --merge"))
