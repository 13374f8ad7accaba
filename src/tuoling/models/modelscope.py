"""ModelScope over plain HTTP: list the files, fetch each with Range, check its SHA-256."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
from pathlib import Path
from typing import Any

from tuoling import console, environment
from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.models.hub import RemoteFile, choose_files, is_verified, mark_verified, verify
from tuoling.models.transfer import TransferError, fetch_part, open_url

DEFAULT_REVISION = "master"


def fetch_modelscope(
    model_id: str,
    *,
    revision: str | None = None,
    to: Path | None = None,
    weights: bool = True,
    again: bool = False,
) -> Path:
    """The local folder of a ModelScope id. Unfinished files are kept as `.part` and resumed by Range."""
    revision = revision or DEFAULT_REVISION
    folder = to or environment.cache_dir() / "modelscope" / model_id / revision
    if not again and to is None and is_verified(folder, weights=weights):
        return folder
    endpoint = environment.modelscope_address()
    files = choose_files(_list_files(endpoint, model_id, revision), weights=weights)
    if not files:
        raise ModelError(tr("the repository holds no model files", "该仓库里没有模型文件"), where=model_id)
    size = sum(file.size_bytes for file in files) / 2**20
    console.note(
        tr(
            f"{model_id}: {len(files)} files, {size:,.1f} MiB, from {endpoint}",
            f"{model_id}：{len(files)} 个文件，{size:,.1f} MiB，来自 {endpoint}",
        )
    )
    for file in files:
        _fetch_file(endpoint, model_id, revision, file, folder)
    mark_verified(folder, weights=weights)
    return folder


def _token() -> dict[str, str]:
    token = environment.secret("MODELSCOPE_API_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _list_files(endpoint: str, model_id: str, revision: str) -> list[RemoteFile]:
    query = urllib.parse.urlencode({"Revision": revision, "Recursive": "True"})
    url = f"{endpoint}/api/v1/models/{urllib.parse.quote(model_id)}/repo/files?{query}"
    try:
        with open_url(url, _token()) as response:
            body: Any = json.load(response)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise _unknown(model_id, revision) from error
        raise _unreachable(model_id, error) from error
    except (OSError, ValueError) as error:
        raise _unreachable(model_id, error) from error
    entries = (body.get("Data") or {}).get("Files") if isinstance(body, dict) else None
    if entries is None:
        raise _unknown(model_id, revision)
    return [
        RemoteFile(_inside(entry["Path"]), int(entry.get("Size") or 0), entry.get("Sha256") or None)
        for entry in entries
        if entry.get("Type") != "tree"
    ]


def _inside(path: str) -> str:
    """A server must not name a file outside the model's folder."""
    parts = Path(path).parts
    if not parts or Path(path).is_absolute() or ".." in parts:
        raise ModelError(tr(f"the hub names a forbidden path: {path}", f"模型库给出了非法路径：{path}"))
    return path


def _fetch_file(endpoint: str, model_id: str, revision: str, file: RemoteFile, folder: Path) -> None:
    path = folder / file.path
    if path.is_file() and path.stat().st_size == file.size_bytes:
        verify(folder, [file])
        return
    part = path.with_name(path.name + ".part")
    query = urllib.parse.urlencode({"Revision": revision, "FilePath": file.path})
    url = f"{endpoint}/api/v1/models/{urllib.parse.quote(model_id)}/repo?{query}"
    try:
        fetch_part(url, part, file.size_bytes, headers=_token())
    except TransferError as error:
        raise _unreachable(f"{model_id}/{file.path}", error) from error
    verify(folder, [RemoteFile(file.path + ".part", file.size_bytes, file.sha256)], name=file.path)
    part.replace(path)


def _unknown(model_id: str, revision: str) -> ModelError:
    return ModelError(
        tr(
            f"no such model or revision on ModelScope ({revision})",
            f"ModelScope 上没有该模型或版本（{revision}）",
        ),
        where=model_id,
        remedy=tr("check the spelling", "请检查拼写"),
    )


def _unreachable(what: str, error: Exception) -> ModelError:
    return ModelError(
        tr(f"ModelScope cannot be reached: {error}", f"无法连接 ModelScope：{error}"),
        where=what,
        remedy=tr("run it again: what has come is kept", "再运行一次：已下载的部分会保留"),
    )
