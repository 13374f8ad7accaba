"""An engine over servers: those that are named, or `vllm serve` started for what lies at a path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tuoling import console
from tuoling.errors import EndpointError, UsageError
from tuoling.infer.client import Client
from tuoling.infer.endpoint import Endpoint
from tuoling.infer.voice import adapter_name, template_of, voice_of
from tuoling.language import tr
from tuoling.models.adapter_files import adapter_config_file
from tuoling.models.source import ModelSource, find_model

if TYPE_CHECKING:
    from tuoling.infer.fleet import Fleet
    from tuoling.infer.open_engine import EngineOptions
    from tuoling.infer.vllm_engine import ChatEngine, VllmEngine
    from tuoling.infer.vllm_process import VllmProcess
    from tuoling.text.templates import Template
    from tuoling.text.tokenizer import TextTokenizer

CONCURRENCY = 16
"""Requests at once, where nobody says how many: vLLM batches them, and more than this seldom makes it faster."""

RETRIES = 2
"""About two seconds. A server that is away longer is not waited for: its rows go to others, a person asks again."""

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def open_vllm(path_or_id: str, options: EngineOptions) -> VllmEngine | ChatEngine | Fleet:
    """Connect to the endpoint or endpoints named in `options`, or start a server for what lies there.

    Where path_or_id is a model here, prompts are rendered here and sent as token ids; else it is the name of a model
    at the endpoint, which renders messages itself. Raises ModelError, MissingPackage, EndpointError, UsageError.
    """
    given = [one.strip() for one in (options.get("endpoint") or "").split(",") if one.strip()]
    by_name = bool(given) and not Path(path_or_id).expanduser().exists()
    _warn_idle(options, [*_NOT_AT_SERVERS, *(_OF_RENDERING if by_name else ()), *(_OF_OURS if given else ())])
    if by_name:
        return _first_or_all(given, lambda one: _by_name(path_or_id, one, options))
    source = find_model(
        path_or_id,
        revision=options.get("revision"),
        base=options.get("base"),
        lora_alpha=options.get("lora_alpha"),
    )
    if given:
        spoken = _Spoken.of(source, options)
        return _first_or_all(given, lambda one: spoken.at(one, options))
    process = _start(source, options)
    try:
        return _Spoken.of(source, options).at(process.url, options, process)
    except BaseException:
        process.close()
        raise


_NOT_AT_SERVERS = ("device", "quantization_bit", "max_memory", "merge", "adapters")
_OF_OURS = ("dtype", "allow_remote_code")
_OF_RENDERING = ("template", "base", "lora_alpha", "revision")


def _warn_idle(options: EngineOptions, names: Sequence[str]) -> None:
    """Say which options change nothing, since the server has loaded its model already."""
    idle = [name for name in names if options.get(name) not in (None, False, "auto", {})]
    if idle:
        said = ", ".join(f"--{name}".replace("_", "-") for name in idle)
        console.warn(
            tr(
                f"the server has its own model and settings: {said} without effect",
                f"模型与设置由服务器决定，以下选项无效：{said}",
            )
        )


def _first_or_all(
    given: Sequence[str], connect: Callable[[str], VllmEngine | ChatEngine]
) -> VllmEngine | ChatEngine | Fleet:
    """The one server, or all that answer now: those that do not are named and left out. Raises when none does."""
    if len(given) == 1:
        return connect(given[0])
    from tuoling.infer.fleet import Fleet

    engines: list[VllmEngine | ChatEngine] = []
    failed: list[EndpointError] = []
    try:
        for one in dict.fromkeys(given):
            try:
                engines.append(connect(one))
            except EndpointError as error:
                failed.append(error)
                console.warn(
                    tr(f"left out: {error.where}: {error.problem}", f"不使用 {error.where}：{error.problem}")
                )
        if not engines:
            raise failed[0]
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return Fleet(engines)


def _by_name(name: str, given: str, options: EngineOptions) -> ChatEngine:
    from tuoling.infer.vllm_engine import ChatEngine

    url, _, model = given.partition("#")
    client = _client(url, model or name, options)
    try:
        contexts = client.contexts()
        if client.endpoint.model not in contexts:
            raise _no_such_model(client, list(contexts), given)
    except BaseException:
        client.close()
        raise
    return ChatEngine(client, context_tokens=contexts[client.endpoint.model])


class _Spoken(NamedTuple):
    """How a model here is asked: read once, for however many servers have it."""

    source: ModelSource
    tokenizer: TextTokenizer
    template: Template
    voice: dict[str, Any]

    @classmethod
    def of(cls, source: ModelSource, options: EngineOptions) -> _Spoken:
        """Read what lies beside the weights."""
        from tuoling.models.load import load_tokenizer

        tokenizer = load_tokenizer(source, for_training=False)
        template = template_of(source, tokenizer, options)
        return cls(source, tokenizer, template, voice_of(source, options, template, "vllm"))

    def at(self, given: str, options: EngineOptions, process: VllmProcess | None = None) -> VllmEngine:
        """The engine at one address. Raises UsageError where it is not clear which of the server's models is meant."""
        from tuoling.infer.vllm_engine import VllmEngine

        url, _, model = given.partition("#")
        asking = _client(url, model, options)
        try:
            contexts = asking.contexts()
        finally:
            asking.close()
        names = [model] if model else _likely(self.source, list(contexts))
        if len(names) != 1 or names[0] not in contexts:
            raise _no_such_model(asking, list(contexts), given)
        return VllmEngine(
            _client(url, names[0], options),
            self.tokenizer,
            self.template,
            context_tokens=contexts[names[0]],
            process=process,
            **self.voice,
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
