"""tuoling serve"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuoling.cli.chat import (
    Adapters,
    Base,
    Device,
    Dtype,
    Engine,
    LoraAlpha,
    Merge,
    QuantizationBit,
    RemoteCode,
    Revision,
    RunOrModel,
    Template,
)
from tuoling.language import tr

HELP = tr(
    """Serve a model over HTTP as OpenAI's API: many callers at once, streamed, adapters by model name.

    /v1/chat/completions, /v1/completions, /v1/models, /generate with a question, /health, /metrics. Only this machine
    can reach it; another --host needs an API key, which is made and shown once. Ctrl-C lets answers finish.""",
    """以 OpenAI 接口提供模型服务：多人同时使用、流式输出、按模型名选择适配器。

    /v1/chat/completions、/v1/completions、/v1/models、/generate（提交 question）、/health、/metrics。默认只有本机
    可以访问；换用其他 --host 需要 API 密钥，首次会生成并只显示一次。Ctrl-C 会等回答完成。""",
)


def command(
    run_or_model: RunOrModel,
    host: Annotated[str, typer.Option("--host", help=tr("address to listen on", "监听地址"))] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help=tr("0: any", "0 为任意端口"))] = 8000,
    model_name: Annotated[
        str | None,
        typer.Option(
            "--model-name",
            help=tr("what requests call it; else the folder's name", "请求中的模型名，默认为目录名"),
        ),
    ] = None,
    require_key: Annotated[
        bool,
        typer.Option(
            "--require-key", help=tr("ask for an API key on this machine too", "本机访问也要求密钥")
        ),
    ] = False,
    new_key: Annotated[
        str | None,
        typer.Option("--new-key", metavar="NAME", help=tr("make another API key", "新增一个 API 密钥")),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            "--key-file",
            help=tr("hashes of the keys, else in ~/.config/tuoling", "密钥哈希，默认在 ~/.config/tuoling"),
        ),
    ] = None,
    max_running: Annotated[
        int,
        typer.Option(
            "--max-running", min=1, max=1024, help=tr("answers at the same time", "同时生成的回答数")
        ),
    ] = 16,
    max_waiting: Annotated[
        int,
        typer.Option(
            "--max-waiting", min=0, help=tr("more wait in line; then 429", "排队上限，超出返回 429")
        ),
    ] = 64,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", min=1, help=tr("most a request may ask for", "单个请求可要求的最多 token")
        ),
    ] = 4096,
    memory_tokens: Annotated[
        int | None,
        typer.Option(
            "--memory-tokens",
            min=16,
            help=tr("tokens kept at once, else by free memory", "同时保留的 token 数，默认按空闲内存"),
        ),
    ] = None,
    request_timeout: Annotated[
        float,
        typer.Option("--request-timeout", min=1, help=tr("seconds a request may take", "单个请求最长秒数")),
    ] = 600.0,
    max_body_mb: Annotated[
        float, typer.Option("--max-body-mb", min=0.01, help=tr("largest request body", "请求体上限（MB）"))
    ] = 2.0,
    drain: Annotated[
        float,
        typer.Option(
            "--drain", min=0, help=tr("seconds to finish answers at the end", "退出时等待回答完成的秒数")
        ),
    ] = 30.0,
    log_prompts: Annotated[
        bool,
        typer.Option(
            "--log-prompts", help=tr("write questions and answers to the log", "把问题与回答写入日志")
        ),
    ] = False,
    adapter: Adapters = None,
    merge: Merge = False,
    engine: Engine = None,
    template: Template = None,
    base: Base = None,
    lora_alpha: LoraAlpha = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization_bit: QuantizationBit = None,
    allow_remote_code: RemoteCode = False,
) -> None:
    from importlib.util import find_spec

    from tuoling import console, environment
    from tuoling.errors import MissingPackage, UsageError

    if engine == "vllm":
        raise UsageError(
            tr("vLLM brings its own server", "vLLM 自带服务器"),
            where="--engine vllm",
            remedy=f"vllm serve {run_or_model}",
        )

    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise MissingPackage(package, extra="serve", purpose="serve")
    from tuoling.serve.server import Address, keys_for, listen

    address = Address(host, port)
    listening = listen(address)
    keys = keys_for(
        address, key_file or environment.config_dir() / "serve-keys.json", required=require_key, new=new_key
    )
    from tuoling.api import load
    from tuoling.infer.open_engine import parse_adapters
    from tuoling.serve.api import Service
    from tuoling.serve.guard import GuardSettings
    from tuoling.serve.requests import Limits, Reader
    from tuoling.serve.server import LOCAL_NAMES, backend_of, names_of, run

    with load(
        run_or_model,
        template=template,
        base=base,
        lora_alpha=lora_alpha,
        revision=revision,
        dtype=dtype,
        device=device,
        quantization_bit=quantization_bit,
        allow_remote_code=allow_remote_code,
        adapters=parse_adapters(adapter or []),
        merge=merge,
        engine=engine,
    ) as model:
        backend = backend_of(model.engine, rows=max_running, waiting=max_waiting, memory_tokens=memory_tokens)
        main = model_name or Path(run_or_model).expanduser().resolve().name
        names = names_of(model.engine, main)
        limits = Limits(max_tokens=max_tokens, timeout_s=request_timeout)
        service = Service(backend, Reader(names, limits), log_prompts=log_prompts)
        hosts = frozenset({*LOCAL_NAMES, host}) if address.local and keys is None else None
        guard = GuardSettings(keys=keys, hosts=hosts, body_bytes=int(max_body_mb * 2**20))
        place = f"http://{host if ':' not in host else f'[{host}]'}:{listening.getsockname()[1]}"
        console.note(
            tr(
                f"serving {', '.join(names.engines)} at {place}/v1",
                f"{', '.join(names.engines)} 已在 {place}/v1 提供服务",
            )
        )
        run(service, guard, listening, drain_s=drain)
