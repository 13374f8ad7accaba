"""A run, adapter or model folder in transformers, with more adapters on the same weights where they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import console
from tuoling.errors import ModelError, UsageError
from tuoling.files import sha256_file
from tuoling.infer.engine import BASE
from tuoling.infer.voice import adapter_name, template_of, voice_of
from tuoling.language import tr
from tuoling.models.quantization import Quantization
from tuoling.models.quantization import chosen as chosen_quantization
from tuoling.models.source import ModelSource, find_model, weight_files

if TYPE_CHECKING:
    from tuoling.infer.open_engine import EngineOptions
    from tuoling.infer.torch_engine import TorchEngine


def open_torch(path_or_id: str, options: EngineOptions) -> TorchEngine:
    """Find, load and wrap what lies there. Raises ModelError, TemplateError, UsageError."""
    base, alpha = options.get("base"), options.get("lora_alpha")
    source = find_model(path_or_id, revision=options.get("revision"), base=base, lora_alpha=alpha)
    from tuoling.models.placement import is_spread, parse_limits

    limits = parse_limits(options.get("max_memory"))
    more = _more_adapters(source, options)
    quantization = chosen_quantization(options.get("quantization_bit"), source.quantization)
    merge = bool(options.get("merge"))
    if merge:
        _require_mergeable(source, quantization, more, spread=limits is not None)
    from tuoling.infer.torch_engine import TorchEngine
    from tuoling.models.load import load_adapter, load_model, load_tokenizer

    tokenizer = load_tokenizer(source, for_training=False)
    template = template_of(source, tokenizer, options)
    if quantization:
        console.note(tr(f"base weights in {quantization}", f"基座权重为 {quantization}"))
    model: Any = load_model(
        source,
        dtype=options.get("dtype", "auto"),
        device=options.get("device", "auto"),
        for_training=False,
        allow_remote_code=options.get("allow_remote_code", False),
        quantization=quantization,
        max_memory=limits,
    )
    precision = f"{options.get('dtype', 'auto')}{quantization}"
    if merge and is_spread(model):
        merge = False
        console.warn(
            tr(
                "not merged: the weights do not fit in one place; the adapter is applied beside them",
                "未并入：权重放不进同一处；适配器改为在旁边应用",
            )
        )
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
        **voice_of(source, options, template, precision),
        adapter=(adapter_name(source) if opened else BASE) if opened or more else None,
        layers="default" if opened else None,
    )
    if opened:
        voice = voice_of(source, options, template, f"{precision} base")
        TorchEngine(model, tokenizer, template, **voice, adapter=BASE, layers=None, beside=engine)
    for name, adapter in more.items():
        own = load_tokenizer(adapter, for_training=False)
        template = template_of(adapter, own, options)
        voice = voice_of(adapter, options, template, precision)
        TorchEngine(model, own, template, **voice, adapter=name, layers=layers[name], beside=engine)
    return engine


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
    source: ModelSource, quantization: Quantization, more: Mapping[str, ModelSource], *, spread: bool
) -> None:
    """Raise UsageError where the adapter cannot go into the weights."""
    if not source.is_adapter:
        problem = tr("there is no adapter to merge", "没有可以合并的适配器")
    elif more:
        problem = tr("merged weights carry no other adapters", "合并后的权重不能再带其他适配器")
    elif spread:
        problem = tr("weights that are spread are not merged into", "分散放置的权重不能合并适配器")
    elif quantization:
        problem = tr(f"weights in {quantization} are not merged into", f"{quantization} 权重不能合并适配器")
    else:
        return
    raise UsageError(problem, where="--merge", remedy=tr("leave --merge away", "请去掉 --merge"))
