"""An engine over a server: one that is named, or `vllm serve` started for what lies at a path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tuoling import console
from tuoling.errors import UsageError
from tuoling.infer.client import Client
from tuoling.infer.endpoint import Endpoint
from tuoling.infer.voice import adapter_name, template_of, voice_of
from tuoling.language import tr
from tuoling.models.adapter_files import adapter_config_file
from tuoling.models.source import ModelSource, find_model

if TYPE_CHECKING:
    from tuoling.infer.open_engine import EngineOptions
    from tuoling.infer.vllm_engine import ChatEngine, VllmEngine
    from tuoling.infer.vllm_process import VllmProcess

CONCURRENCY = 16
"""Requests at once, where nobody says how many: vLLM batches them, and more than this seldom makes it faster."""

RETRIES = 2
"""About two seconds. A server that is away longer is not waited for: its rows go to others, a person asks again."""

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def open_vllm(path_or_id: str, options: EngineOptions) -> VllmEngine | ChatEngine:
    """Connect to the endpoint named in `options`, or start a server for what lies there.

    Where path_or_id is a model here, prompts are rendered here and sent as token ids; else it is the name of a model
    at the endpoint, which renders messages itself. Raises ModelError, MissingPackage, EndpointError, UsageError.
    """
    given = options.get("endpoint")
    if given and not Path(path_or_id).expanduser().exists():
        return _by_name(path_or_id, given, options)
    source = find_model(
        path_or_id,
        revision=options.get("revision"),
        base=options.get("base"),
        lora_alpha=options.get("lora_alpha"),
    )
    process = None if given else _start(source, options)
    try:
        return _rendered_here(source, given or str(process.url if process else ""), options, process)
    except BaseException:
        if process is not None:
            process.close()
        raise


def _by_name(name: str, given: str, options: EngineOptions) -> ChatEngine:
    from tuoling.infer.vllm_engine import ChatEngine

    url, _, model = given.partition("#")
    client = _client(url, model or name, options)
    if options.get("template"):
        console.warn(
            tr(
                "the server renders with its own template: --template without effect",
                "由服务器套用模板：--template 无效",
            )
        )
    contexts = client.contexts()
    if client.endpoint.model not in contexts:
        raise _no_such_model(client, list(contexts), given)
    return ChatEngine(client, context_tokens=contexts[client.endpoint.model])


def _rendered_here(
    source: ModelSource, given: str, options: EngineOptions, process: VllmProcess | None
) -> VllmEngine:
    from tuoling.infer.vllm_engine import VllmEngine
    from tuoling.models.load import load_tokenizer

    tokenizer = load_tokenizer(source, for_training=False)
    template = template_of(source, tokenizer, options)
    voice = voice_of(source, options, template, "vllm")
    url, _, model = given.partition("#")
    asking = _client(url, model, options)
    try:
        contexts = asking.contexts()
    finally:
        asking.close()
    names = [model] if model else _likely(source, list(contexts))
    if len(names) != 1 or names[0] not in contexts:
        raise _no_such_model(asking, list(contexts), given)
    return VllmEngine(
        _client(url, names[0], options),
        tokenizer,
        template,
        stops=voice["stops"],
        end_ids=voice["end_ids"],
        defaults=voice["defaults"],
        system=voice["system"],
        fingerprint=voice["fingerprint"],
        context_tokens=contexts[names[0]],
        process=process,
    )


def _likely(source: ModelSource, served: list[str]) -> list[str]:
    """Which of a server's models is meant: the only one, else the one of the same path or name."""
    if len(served) == 1:
        return served
    known = (source.name, str(source.path), adapter_name(source))
    return [name for name in served if name in known] or served


def _client(url: str, model: str, options: EngineOptions) -> Client:
    concurrency = options.get("concurrency") or CONCURRENCY
    return Client(Endpoint(url, model, concurrency=concurrency, max_retries=RETRIES))


def _no_such_model(client: Client, served: list[str], given: str) -> UsageError:
    url = given.partition("#")[0]
    return UsageError(
        tr(
            f"which of its models? The server has: {', '.join(served) or 'none'}",
            f"要用哪个模型？服务器上有：{'、'.join(served) or '无'}",
        ),
        where=client.endpoint.base_url,
        remedy=f"--endpoint {url}#{served[0] if served else 'MODEL'}",
    )


def _start(source: ModelSource, options: EngineOptions) -> VllmProcess:
    from tuoling.files import read_json
    from tuoling.infer.vllm_process import VllmProcess, lora_words, require_vllm

    program = require_vllm()
    words = [str(source.weights_path), "--dtype", _DTYPES.get(options.get("dtype", "auto"), "auto")]
    if options.get("allow_remote_code"):
        words.append("--trust-remote-code")
    if source.is_adapter:
        config_file = adapter_config_file(source.path)
        rank = int(read_json(config_file).get("r") or 8) if config_file else 8
        words += lora_words(adapter_name(source), source.path, rank)
    console.note(tr("starting vllm serve, this takes minutes", "正在启动 vllm serve，需要几分钟"))
    process = VllmProcess(program, words)
    try:
        process.wait()
    except BaseException:
        process.close()
        raise
    console.note(tr(f"vllm answers at {process.url}", f"vllm 已就绪：{process.url}"))
    return process
