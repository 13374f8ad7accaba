"""tuoling chat"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tuoling.language import tr

HELP = tr(
    """Talk to a model in the terminal: a run, an adapter, a model folder, a GGUF file or a hub id.

    Base, template and stops are read from what lies there. /help in the chat lists the commands; lines from a
    pipe are answered one by one.""",
    """在终端与模型对话：可以是运行目录、适配器、模型目录、GGUF 文件或模型库编号。

    基座、模板与停止符都从目录里读取。对话中输入 /help 查看命令；从管道读入时逐行回答。""",
)

RunOrModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        help=tr(
            "run, adapter or model folder, .gguf file, or hub id",
            "运行、适配器或模型目录，.gguf 文件，或模型库编号",
        ),
    ),
]
Template = Annotated[
    str | None, typer.Option("--template", help=tr("another prompt template", "改用别的提示模板"))
]
Base = Annotated[
    str | None, typer.Option("--base", help=tr("where the adapter's base lies", "适配器的基座位置"))
]
LoraAlpha = Annotated[
    float | None,
    typer.Option("--lora-alpha", help=tr("of an adapter that does not say it", "适配器未写明时的 alpha")),
]
Revision = Annotated[str | None, typer.Option("--revision", help=tr("hub revision", "模型库版本"))]
Dtype = Annotated[str, typer.Option("--dtype", help="auto | bf16 | fp16 | fp32")]
Device = Annotated[str, typer.Option("--device", help="auto | cpu | cuda | mps")]
QuantizationBit = Annotated[
    int | None,
    typer.Option(
        "--quantization-bit",
        metavar="0|4|8",
        help=tr(
            "bits of the base, else as trained; 0: not quantised", "基座的位数，默认与训练时相同；0 为不量化"
        ),
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="0=10GiB,cpu=20GiB",
        help=tr("spread over cards, memory, disk", "把模型分到显卡、内存、磁盘"),
    ),
]
RemoteCode = Annotated[
    bool,
    typer.Option(
        "--allow-remote-code",
        help=tr("run Python code from the model folder", "允许运行模型目录中的 Python 代码"),
    ),
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help=tr("longest answer, in tokens", "回答的最大 token 数"))
]
MinNewTokens = Annotated[
    int | None, typer.Option("--min-new-tokens", help=tr("shortest answer, in tokens", "回答的最小 token 数"))
]
Sample = Annotated[
    bool | None,
    typer.Option("--do-sample/--no-sample", help=tr("draw tokens, or take the best", "采样，或总取最优")),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="[NAME=]PATH",
        help=tr("one more adapter on the same base; may be repeated", "同一基座上的另一个适配器；可重复"),
    ),
]
Merge = Annotated[
    bool,
    typer.Option(
        "--merge",
        help=tr("the adapter goes into the weights in memory: faster", "在内存中把适配器并入权重：更快"),
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="torch|llama.cpp|vllm",
        help=tr("instead of what the path decides", "代替由路径决定的引擎"),
    ),
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL[#MODEL],…",
        help=tr("running servers that speak OpenAI's API", "正在运行的 OpenAI 接口服务，可用逗号分隔多个"),
    ),
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help=tr("turns sampling on", "设置后开启采样"))
]
TopP = Annotated[float | None, typer.Option("--top-p", help=tr("turns sampling on", "设置后开启采样"))]
TopK = Annotated[int | None, typer.Option("--top-k", help=tr("turns sampling on", "设置后开启采样"))]
Beams = Annotated[
    int | None, typer.Option("--num-beams", "--beams", help=tr("beams; 1 is greedy", "束数；1 为贪心"))
]
Penalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help=tr("on the answer only; 1 is off", "只作用于回答；1 为关闭")),
]
NoRepeat = Annotated[
    int | None,
    typer.Option("--no-repeat-ngram-size", help=tr("on the answer only; 0 is off", "只作用于回答；0 为关闭")),
]
Seed = Annotated[int | None, typer.Option("--seed", help=tr("of sampling", "采样的随机种子"))]


def command(
    run_or_model: RunOrModel,
    template: Template = None,
    system: Annotated[str | None, typer.Option("--system", help=tr("system prompt", "系统提示"))] = None,
    base: Base = None,
    lora_alpha: LoraAlpha = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: MinNewTokens = None,
    do_sample: Sample = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    num_beams: Beams = None,
    repetition_penalty: Penalty = None,
    no_repeat_ngram_size: NoRepeat = None,
    seed: Seed = None,
    memory_tokens: Annotated[
        int | None,
        typer.Option(
            "--memory-tokens", min=16, help=tr("limit of prompt and answer together", "提示与回答合计的上限")
        ),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(
            "--history",
            help=tr(
                "append every talk to this file, as a training row", "把每段对话作为训练数据追加到该文件"
            ),
        ),
    ] = None,
    adapter: Adapters = None,
    merge: Merge = False,
    engine: Engine = None,
    endpoint: Endpoint = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization_bit: QuantizationBit = None,
    max_memory: MaxMemory = None,
    allow_remote_code: RemoteCode = False,
) -> None:
    from tuoling import console
    from tuoling.api import load
    from tuoling.infer.engine import GenerationSettings
    from tuoling.infer.open_engine import parse_adapters
    from tuoling.infer.session import ChatSession
    from tuoling.infer.terminal import Terminal, pipe_reader, terminal_reader, warn_idle

    values = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "num_beams": num_beams,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "seed": seed,
    }
    GenerationSettings().with_values(values)  # a bad value is said before a model is loaded
    with load(
        run_or_model,
        template=template,
        base=base,
        lora_alpha=lora_alpha,
        revision=revision,
        dtype=dtype,
        device=device,
        quantization_bit=quantization_bit,
        max_memory=max_memory,
        allow_remote_code=allow_remote_code,
        adapters=parse_adapters(adapter or []),
        merge=merge,
        engine=engine,
        endpoint=endpoint,
    ) as model:
        settings = model.settings(**values)
        session = ChatSession(
            model.engine,
            settings,
            system=system,
            memory_tokens=memory_tokens,
            history=history,
            say=console.note,
        )
        warn_idle(session.settings)
        interactive = sys.stdin.isatty()
        if interactive:
            console.note(tr("/help lists the commands, /exit leaves", "输入 /help 查看命令，/exit 退出"))
        terminal = Terminal(
            session,
            read_line=terminal_reader(tr("you> ", "你> ")) if interactive else pipe_reader(sys.stdin),
            out=sys.stdout,
            interactive=interactive,
        )
        try:
            code = terminal.run()
        finally:
            session.finish()
    raise typer.Exit(code)
