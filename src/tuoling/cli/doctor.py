"""`tuoling doctor`: what this machine can do, and what on it is known to go wrong."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from tuoling import console, environment
from tuoling.language import tr

HELP = tr(
    """Show what this machine can do: versions, devices, precisions, memory, disk, fonts, known-bad pairs; and try it.

    Each path that was found (CPU and card, precisions, 8 and 4 bits, two processes, chat, GGUF) is tried for about ten
    seconds on a tiny model made for it, and held against float32 on the CPU. --no-test leaves that out.""",
    """查看这台机器的能力：版本、设备、精度、内存、磁盘、字体，以及已知有问题的搭配；然后实际试一遍。

    找到的每条路径（CPU 与显卡、各种精度、8 位和 4 位、两个进程、对话、GGUF）都用临时造的小模型试跑约十秒，并与 CPU fp32 的结果对照。
    --no-test 则不试。""",
)

OPTIONAL = (
    *("datasets", "pyarrow", "deepspeed", "bitsandbytes", "gptqmodel", "gguf", "llama_cpp_python", "vllm"),
    *(
        "fastapi",
        "gradio",
        "lm_eval",
        "sacrebleu",
        "rouge_chinese",
        "jieba",
        "tensorboard",
        "wandb",
        "swanlab",
    ),
)


@dataclass(frozen=True)
class BadPair:
    """`package` installed, and `other` outside what it works with (a PEP 440 specifier)."""

    package: str
    other: str
    works_with: str


BAD_PAIRS = (
    BadPair("gptqmodel", "numpy", "==2.2.6"),
    BadPair("gradio", "pillow", "<13"),
    BadPair("tuoling", "torch", ">=2.13,<2.14"),
    BadPair("tuoling", "transformers", ">=5.23,<6"),
)


def command(
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("Print one JSON object.", "输出一个 JSON 对象。"))
    ] = False,
    test: Annotated[
        bool, typer.Option("--test/--no-test", help=tr("Try each path.", "实际试跑每条路径。"))
    ] = True,
) -> None:
    """Collect the facts, try the paths, print; exit 1 when something is known to be wrong."""
    found = facts()
    if not as_json:
        _show(found)
    if test and found["device"]:
        found["tests"] = _try(found, quiet=as_json)
        found["problems"] += [
            f"{each['name']}: {each['problem']}" for each in found["tests"] if each["problem"]
        ]
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    if found["problems"]:
        raise typer.Exit(1)


def facts() -> dict[str, Any]:
    """Everything the command shows, as plain values."""
    from tuoling.plots import cjk_font

    return {
        "versions": environment.versions(),
        "optional": {name: version for name in OPTIONAL if (version := _version(name))},
        "machine": environment.machine(),
        "memory_available_gib": round(environment.memory_available_bytes() / 2**30, 1),
        "disk_free_gib": round(environment.disk_free_bytes(Path.cwd()) / 2**30, 1),
        "cache": str(environment.cache_dir()),
        **_device(),
        "precisions": _precisions(),
        "cjk_font": cjk_font(),
        "hub": environment.modelscope_endpoint() or environment.hub_endpoint() or "https://huggingface.co",
        "problems": bad_pairs(),
    }


def _try(found: dict[str, Any], *, quiet: bool) -> list[dict[str, Any]]:
    """The self-test, each path told as it is done."""
    from tuoling.demo.self_test import self_test

    tests = []
    with tempfile.TemporaryDirectory(prefix="tuoling-doctor-") as folder:
        for finding in self_test(Path(folder), found["device"], found["dtype"]):
            tests.append(asdict(finding))
            if quiet:
                continue
            seconds = tr(f"{finding.seconds:.0f} s", f"{finding.seconds:.0f} 秒")
            if finding.problem:
                console.warn(f"{finding.name}: {finding.problem} ({seconds})")
            else:
                console.out.print(f"✓ {finding.name}: {finding.said} ({seconds})", markup=False)
    return tests


def bad_pairs() -> list[str]:
    """Installed pairs that are known not to work together."""
    from packaging.specifiers import SpecifierSet

    found = []
    for pair in BAD_PAIRS:
        version = _version(pair.other)
        if (
            _version(pair.package)
            and version
            and not SpecifierSet(pair.works_with).contains(version, prereleases=True)
        ):
            found.append(
                tr(
                    f"{pair.package} needs {pair.other}{pair.works_with}; installed is {version}",
                    f"{pair.package} 需要 {pair.other}{pair.works_with}，当前安装的是 {version}",
                )
            )
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    """Device and precision a run would choose; a torch that cannot be imported is one of the things to report."""
    try:
        device = environment.pick_device()
        found: dict[str, Any] = {"device": device, "dtype": environment.pick_dtype("auto", device)}
        if device == "cuda":
            import torch

            found["gpus"] = [
                {
                    "name": torch.cuda.get_device_properties(index).name,
                    "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
                }
                for index in range(torch.cuda.device_count())
            ]
        return found
    except (ImportError, OSError) as error:
        return {"device": None, "dtype": None, "device_problem": str(error)}


def _precisions() -> dict[str, list[str]]:
    """What each device trains in; fp16 never on a CPU. 8 and 4 bits are those of a LoRA's base."""
    low = ["int8", "nf4"] if _version("bitsandbytes") else []
    found = {"cpu": ["bf16" if environment.cpu_has_bf16() else "", "fp32", *low]}
    try:
        device = environment.pick_device()
        if device != "cpu":
            best = environment.pick_dtype("auto", device)
            found[device] = [*dict.fromkeys((best, "fp16", "fp32")), *(low if device == "cuda" else [])]
    except (ImportError, OSError):
        pass  # `_device` tells it
    return {name: [kind for kind in kinds if kind] for name, kinds in found.items()}


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    machine = found["machine"]
    yes, no = tr("yes", "有"), tr("no", "无")
    rows = [
        (
            tr("versions", "版本"),
            ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        ),
        (
            tr("optional", "可选包"),
            ", ".join(f"{name} {version}" for name, version in found["optional"].items()) or no,
        ),
        (tr("system", "系统"), f"{machine['system']} {machine['processor']}"),
        (tr("device", "设备"), _device_text(found)),
        (tr("cores", "处理器核数"), str(machine["cores"])),
        (
            tr("memory", "内存"),
            tr(
                f"{found['memory_available_gib']} of {machine['memory_gib']} GiB free",
                f"可用 {found['memory_available_gib']} / 共 {machine['memory_gib']} GiB",
            ),
        ),
        (
            tr("disk", "磁盘"),
            tr(f"{found['disk_free_gib']} GiB free here", f"当前目录可用 {found['disk_free_gib']} GiB"),
        ),
        (tr("native bf16", "原生 bf16"), yes if machine["cpu_bf16"] or found["dtype"] == "bf16" else no),
        (
            tr("precisions", "可用精度"),
            "; ".join(f"{name}: {', '.join(kinds)}" for name, kinds in found["precisions"].items()),
        ),
        (
            tr("Chinese font", "中文字体"),
            found["cjk_font"]
            or tr(
                "none: plots are labelled in English (install fonts-noto-cjk)",
                "无：图中用英文标注（可安装 fonts-noto-cjk）",
            ),
        ),
        (tr("hub", "模型下载源"), found["hub"]),
        (tr("cache", "缓存目录"), found["cache"]),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    from rich.markup import escape

    for name, value in rows:
        table.add_row(name, escape(value))
    console.out.print(table)
    for problem in found["problems"]:
        console.warn(problem)
    if not found["problems"]:
        console.out.print(tr("no known-bad pairs", "没有发现已知有问题的搭配"))


def _device_text(found: dict[str, Any]) -> str:
    if found["device"] is None:
        return tr(
            f"torch cannot be used: {found['device_problem']}", f"torch 无法使用：{found['device_problem']}"
        )
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in found.get("gpus", []))
    return f"{found['device']}{f': {gpus}' if gpus else ''}, {found['dtype']}"
