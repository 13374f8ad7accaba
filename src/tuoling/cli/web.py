"""tuoling web"""

from __future__ import annotations

from typing import Annotated

import typer

from tuoling.cli.chat import (
    Adapters,
    Base,
    Device,
    Dtype,
    Endpoint,
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
    """Open a page to talk to a model in the browser: a run, an adapter, a model folder, a GGUF file or a hub id.

    Chinese and English, several people at once, nothing fetched from elsewhere. With an adapter its base can be asked
    too, alone or side by side. The page is for this machine only; any other --host asks for user and password.""",
    """打开一个网页，在浏览器里与模型对话：可以是运行目录、适配器、模型目录、GGUF 文件或模型库编号。

    中英文界面，可多人同时使用，不访问任何外部网络。若是适配器，其基座也可单独提问或并排对比。
    网页默认只供本机访问；换用其它 --host 时需要用户名与密码。""",
)


def command(
    run_or_model: RunOrModel,
    adapter: Adapters = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            metavar="RUN_OR_MODEL",
            help=tr(
                "another model to choose or compare; may be repeated", "另一个可选、可对比的模型，可重复"
            ),
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help=tr("address to listen at", "监听的地址"))] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help=tr("0: any free one", "0 为任选空闲端口"))
    ] = 7860,
    auth: Annotated[
        bool,
        typer.Option(
            "--auth",
            help=tr(
                "ask for user and password here too: TUOLING_WEB_AUTH=USER:PASSWORD, or some made now and shown once",
                "本机访问也要用户名与密码：取自 TUOLING_WEB_AUTH=用户名:密码，未设置则现场生成并显示一次",
            ),
        ),
    ] = False,
    merge: Merge = False,
    engine: Engine = None,
    endpoint: Endpoint = None,
    template: Template = None,
    base: Base = None,
    lora_alpha: LoraAlpha = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization_bit: QuantizationBit = None,
    allow_remote_code: RemoteCode = False,
) -> None:
    from contextlib import ExitStack, suppress

    from tuoling import console, environment
    from tuoling.api import load
    from tuoling.infer.open_engine import EngineOptions, parse_adapters
    from tuoling.serve.web import address, choose_auth, page_server, require_gradio, web_app
    from tuoling.serve.web_models import web_models

    require_gradio()
    from tuoling.serve.server import Address, listen

    place = Address(host, port)
    key, made = choose_auth(environment.secret("TUOLING_WEB_AUTH"), local=place.local, asked=auth)
    every: EngineOptions = {
        "template": template,
        "base": base,
        "lora_alpha": lora_alpha,
        "revision": revision,
        "dtype": dtype,
        "device": device,
        "quantization_bit": quantization_bit,
        "allow_remote_code": allow_remote_code,
    }
    first: EngineOptions = {
        **every,
        "adapters": parse_adapters(adapter or []),
        "merge": merge,
        "engine": engine,
        "endpoint": endpoint,
    }
    with ExitStack() as opened:
        found = opened.enter_context(listen(place))
        engines = {run_or_model: opened.enter_context(load(run_or_model, **first)).engine}
        for path in compare or ():
            engines[path] = opened.enter_context(load(path, **every)).engine
        models = web_models(engines)
        app = web_app(models, title=models.names[0], auth=key, local=key is None)
        if made and key is not None:
            console.note(tr("user and password, shown only now:", "用户名与密码，仅此一次显示："))
            console.out.print(f"{key[0]}:{key[1]}")
        console.note(tr("Ctrl-C stops the page", "按 Ctrl-C 停止"))
        console.out.print(address(found))
        with suppress(KeyboardInterrupt, SystemExit):  # uvicorn raises the signal once more when it is done
            page_server(app).run(sockets=[found])
