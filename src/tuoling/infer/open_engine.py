"""From a path or hub id to an engine that is ready to answer: everything is read from what lies there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from tuoling import console, environment
from tuoling.errors import ModelError, UsageError
from tuoling.families import FAMILIES
from tuoling.files import sha256_text
from tuoling.infer import gguf_keys
from tuoling.infer.engine import Engine, settings_from_config
from tuoling.language import tr
from tuoling.models.source import has_weights
from tuoling.text.templates import choose_template


class EngineOptions(TypedDict, total=False):
    """What `open_engine` and `tuoling.load` take besides the path; each may be left out.

    template:   another one than the weights were tuned with (a warning says so).
    base:       where an adapter's base lies now. lora_alpha: of an adapter whose files do not say it.
    revision:   of a hub id.
    dtype:      auto | bf16 | fp16 | fp32. device: auto | cpu | cuda | mps.
    quantization_bit: 8 or 4 bits for the base, 0 for none; None: as it was trained.
    max_memory: `0=10GiB,cpu=20GiB`: limits of a model spread over cards, memory and disk; None: one device, or as
                it must be.
    allow_remote_code: run Python code from the model folder.
    adapters:   more adapters on the same base, by name: `engine.using(name)`.
    merge:      the adapter goes into the weights: faster, and the base alone cannot be asked any more.
    engine:     torch | llama.cpp | vllm; None: what lies at the path decides, and an endpoint means vllm.
    endpoint:   `URL` or `URL#MODEL` of an OpenAI-speaking server, or several behind commas; without one the engine
                vllm starts its own.
    concurrency: requests to each endpoint at once.
    """

    template: str | None
    base: str | None
    lora_alpha: float | None
    revision: str | None
    dtype: str
    device: str
    quantization_bit: int | None
    max_memory: str | None
    allow_remote_code: bool
    adapters: Mapping[str, str] | None
    merge: bool
    engine: str | None
    endpoint: str | None
    concurrency: int | None


ENGINES = ("torch", "llama.cpp", "vllm")


def open_engine(path_or_id: str, **options: Unpack[EngineOptions]) -> Engine:
    """Find, load and wrap a run, adapter, model folder, GGUF file or hub id. Raises ModelError, TemplateError."""
    unknown = options.keys() - EngineOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"open_engine has no option {', '.join(sorted(unknown))}")
    engine = _engine_asked(options)
    if engine == "vllm":
        from tuoling.infer.open_vllm import open_vllm

        return open_vllm(path_or_id, options)
    file = gguf_file(path_or_id)
    _require_fits(engine, path_or_id, file)
    if file is None:
        from tuoling.infer.open_torch import open_torch

        return open_torch(path_or_id, options)
    fixed = [
        name for name in ("base", "quantization_bit", "adapters", "merge", "max_memory") if options.get(name)
    ]
    if fixed:
        names = ", ".join(fixed)
        console.warn(
            tr(
                f"a GGUF file has its base, adapter and bits in it: {names} without effect",
                f"GGUF 文件自带基座、适配器与位数，以下选项无效：{names}",
            )
        )
    return open_gguf(
        file,
        template=options.get("template"),
        dtype=options.get("dtype", "auto"),
        device=options.get("device", "auto"),
    )


def _engine_asked(options: EngineOptions) -> str | None:
    """The engine's name; None: what lies at the path decides. Raises UsageError."""
    engine, endpoint = options.get("engine"), options.get("endpoint")
    if engine is not None and engine not in ENGINES:
        raise UsageError(
            tr(f"no engine is called {engine}", f"没有名为 {engine} 的引擎"),
            where="--engine",
            remedy=" | ".join(ENGINES),
        )
    if endpoint and engine not in (None, "vllm"):
        raise UsageError(
            tr(f"engine {engine} asks no server", f"引擎 {engine} 不使用服务器"),
            where=f"--endpoint {endpoint}",
            remedy=tr("leave one of the two away", "二者去掉其一"),
        )
    return "vllm" if endpoint else engine


def _require_fits(engine: str | None, path: str, file: Path | None) -> None:
    """Raise ModelError where the engine asked for cannot run what lies there."""
    if engine == "torch" and file is not None:
        raise ModelError(
            tr("a GGUF file runs in llama.cpp, not in torch", "GGUF 文件由 llama.cpp 运行，不能用 torch"),
            where=str(file),
            remedy=f"tuoling convert {file} OUT --to hf",
        )
    if engine == "llama.cpp" and file is None:
        raise ModelError(
            tr("llama.cpp runs GGUF files; there is none", "llama.cpp 运行 GGUF 文件，这里没有"),
            where=path,
            remedy=f"tuoling convert {path} OUT.gguf --to gguf",
        )


def parse_adapters(words: Sequence[str]) -> dict[str, str]:
    """`NAME=PATH` or `PATH` (called by its folder's name) → {name: path}. Raises UsageError for a name given twice."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or Path(word).exists():
            name, path = Path(word).expanduser().resolve().name, word
        if not name or not path or name in found:
            raise UsageError(
                tr(f"two adapters are called {name}", f"有两个适配器都叫 {name}")
                if name in found
                else tr(f"{word!r} is not NAME=PATH", f"{word!r} 不是 名字=路径"),
                where="--adapter",
                remedy="--adapter NAME=PATH",
            )
        found[name] = path
    return found


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
