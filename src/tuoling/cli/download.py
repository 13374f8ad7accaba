"""tuoling download"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuoling.language import tr

HELP = tr(
    """Fetch a model: resumed where it was cut off, every file's checksum verified.

    From Hugging Face (HF_ENDPOINT names a mirror) or ModelScope. Into the cache that loading by id uses, or --to.""",
    """下载模型：可断点续传，逐个文件校验。

    来自 Hugging Face（可用 HF_ENDPOINT 指定镜像）或 ModelScope；存入按编号加载时使用的缓存，或用 --to 指定目录。""",
)


def command(
    model_id: Annotated[str, typer.Argument(metavar="ID", help=tr("owner/name", "拥有者/名称"))],
    to: Annotated[
        Path | None, typer.Option("--to", help=tr("folder, instead of the cache", "目录，代替缓存"))
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help=tr("branch, tag or commit", "分支、标签或提交"))
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help=tr("hf or modelscope", "hf 或 modelscope"))
    ] = None,
) -> None:
    from tuoling import console
    from tuoling.errors import UsageError
    from tuoling.files import require_writable
    from tuoling.models.hub import fetch
    from tuoling.models.source import is_hub_id

    if source not in (None, "hf", "modelscope"):
        raise UsageError(
            tr(f"--source {source}: hf or modelscope", f"--source {source}：应为 hf 或 modelscope")
        )
    if not is_hub_id(model_id):
        raise UsageError(
            tr(f"{model_id!r} is not a hub id", f"{model_id!r} 不是模型库编号"),
            remedy=tr("it has the form owner/name", "形式应为 拥有者/名称"),
        )
    if to is not None:
        require_writable(to)
    folder = fetch(model_id, revision=revision, to=to, source=source, again=True)  # type: ignore[arg-type]
    console.note(tr("every checksum is right", "所有校验和正确"))
    console.out.print(str(folder), markup=False)
