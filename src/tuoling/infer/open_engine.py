"""From a path or hub id to an engine that is ready to answer: everything is read from what lies there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tuoling import console, environment
from tuoling.errors import ModelError
from tuoling.families import FAMILIES
from tuoling.files import read_json, sha256_text
from tuoling.infer import gguf_keys
from tuoling.infer.engine import Engine, GenerationSettings, settings_from_config
from tuoling.language import tr
from tuoling.models.quantization import chosen as chosen_quantization
from tuoling.models.source import ModelSource, find_model, has_weights
from tuoling.text.templates import choose_template

if TYPE_CHECKING:
    from collections.abc import Iterable


def open_engine(
    path_or_id: str,
    *,
    template: str | None = None,
    base: str | None = None,
    lora_alpha: float | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    allow_remote_code: bool = False,
    quantization_bit: int | None = None,
) -> Engine:
    """Find, load and wrap a run, adapter, model folder or hub id.

    template: overrides the one the weights were tuned with (a warning says so where they differ).
    base:     overrides where an adapter's base lies. lora_alpha: of an adapter whose files do not say it.
    quantization_bit: 8 or 4 bits for the base, 0 for none; None: as it was trained.
    """
    file = gguf_file(path_or_id)
    if file is not None:
        if base is not None or quantization_bit is not None:
            console.warn(tr("a GGUF file has its base and bits in it", "GGUF 文件自带基座与位数，该选项无效"))
        return open_gguf(file, template=template, dtype=dtype, device=device)
    source = find_model(path_or_id, revision=revision, base=base, lora_alpha=lora_alpha)
    from tuoling.infer.torch_engine import TorchEngine
    from tuoling.models.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(source, for_training=False)
    chosen, reason = choose_template(
        requested=template,
        saved=source.template,
        tokenizer=tokenizer,
        family_default=source.family.template,
    )
    changed = bool(template and source.template and template != source.template)
    (console.warn if changed else console.note)(reason)
    quantization = chosen_quantization(quantization_bit, source.quantization)
    if quantization:
        console.note(tr(f"base weights in {quantization}", f"基座权重为 {quantization}"))
    model = load_model(
        source,
        dtype=dtype,
        device=device,
        for_training=False,
        allow_remote_code=allow_remote_code,
        quantization=quantization,
    )
    defaults, end_ids = _generation_config(source)
    return TorchEngine(
        model,
        tokenizer,
        chosen,
        defaults=defaults,
        stops=() if changed else source.stops,
        end_ids=end_ids,
        system=source.system,
        fingerprint=sha256_text(f"{source.fingerprint()}\n{chosen.fingerprint()}\n{dtype}{quantization}"),
    )


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


def gguf_file(path: str) -> Path | None:
    """The GGUF file that a path names: the file itself, or the one that lies in a folder without other weights."""
    place = Path(path).expanduser()
    if place.is_file() and place.suffix == ".gguf":
        return place
    if not place.is_dir() or has_weights(place) or (place / "config.json").is_file():
        return None
    found = sorted(place.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(str(file) for file in found[:4])
        raise ModelError(
            tr("the folder holds several GGUF files", "目录中有多个 GGUF 文件"),
            where=str(place),
            remedy=tr(f"name one: {names}", f"请指定其一：{names}"),
        )
    return found[0] if found else None


def open_gguf(file: Path, *, template: str | None, dtype: str, device: str) -> Engine:
    """A GGUF file in llama.cpp, with the template, stops and settings it was written with.

    dtype fp32 keeps keys and values in float32; any other in float16.
    """
    _require_readable(file)
    from tuoling.infer.llamacpp import LlamaModel, llama_library
    from tuoling.infer.llamacpp_engine import LlamaCppEngine
    from tuoling.infer.llamacpp_tokenizer import GgufTokenizer

    gpu = device not in ("auto", "cpu")
    if gpu and not llama_library().llama_supports_gpu_offload():
        raise ModelError(
            tr("this build of llama.cpp knows no GPU", "当前安装的 llama.cpp 不支持 GPU"),
            where=f"device={device}",
            remedy="--device cpu",
        )
    gpu = gpu or (device == "auto" and llama_library().llama_supports_gpu_offload())
    model = LlamaModel(file, gpu=gpu, exact=dtype == "fp32", threads=environment.compute_threads())
    tokenizer = GgufTokenizer(model)
    said = model.metadata
    saved = said.get(gguf_keys.TEMPLATE)
    chosen, reason = choose_template(
        requested=template, saved=saved, tokenizer=tokenizer, family_default=_family_template(said)
    )
    changed = bool(template and saved and template != saved)
    (console.warn if changed else console.note)(reason)
    return LlamaCppEngine(
        model,
        tokenizer,
        chosen,
        defaults=settings_from_config(json.loads(said.get(gguf_keys.GENERATION) or "{}")),
        stops=() if changed else json.loads(said.get(gguf_keys.STOPS) or "[]"),
        system=said.get(gguf_keys.SYSTEM) or None,
        fingerprint=sha256_text(f"{tokenizer.fingerprint()}\n{chosen.fingerprint()}\n{dtype}"),
    )


def _family_template(metadata: Mapping[str, str]) -> str | None:
    arch = metadata.get("general.architecture")
    return next((family.template for family in FAMILIES if family.gguf == arch), None)


def _require_readable(file: Path) -> None:
    """Say in words what llama.cpp would say in its own."""
    with file.open("rb") as opened:
        head = opened.read(8)
    version = int.from_bytes(head[4:8], "little")
    if head[:4] != b"GGUF":
        raise ModelError(tr("not a GGUF file", "不是 GGUF 文件"), where=str(file))
    if version < 2:
        raise ModelError(
            tr(
                f"GGUF version {version} is too old for llama.cpp",
                f"GGUF 第 {version} 版太旧，llama.cpp 不再支持",
            ),
            where=str(file),
            remedy=f"tuoling convert {file} OUT --to hf",
        )
