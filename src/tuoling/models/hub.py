"""Models from Hugging Face (or its mirrors) and ModelScope: resumed, checksummed, kept in one cache.

Loading by id and `tuoling download` come through `fetch`; a snapshot that was fetched whole and verified once is
used without asking the network again.
"""

from __future__ import annotations

import glob
import hashlib
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tuoling import console, environment
from tuoling.errors import ModelError
from tuoling.files import read_json, sha256_file, write_json
from tuoling.language import tr
from tuoling.models.transfer import TransferError, fetch_part

HubName = Literal["hf", "modelscope"]

_NEVER = (
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".gguf",
    ".tflite",
    ".mlmodel",
    ".pth",
    ".pt",
    ".gitattributes",
    ".gitignore",
)
_WEIGHTS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. sha256 is known for large files; git_sha1 (of git's blob) for the others."""

    path: str
    size_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


def choose_files(files: Iterable[RemoteFile], *, weights: bool = True) -> list[RemoteFile]:
    """What a causal model needs: safetensors where there are any, else .bin; no other framework's weights.

    Only the top folder and `original`-like subfolders differ: files below a subfolder are left out unless the top
    has no config.json.
    """
    files = list(files)
    if any(file.path == "config.json" or file.path == "adapter_config.json" for file in files):
        files = [file for file in files if "/" not in file.path]
    kept = [file for file in files if not file.path.endswith(_NEVER)]
    if not weights:
        return [file for file in kept if not file.path.endswith(_WEIGHTS)]
    if any(file.path.endswith(".safetensors") for file in kept):
        kept = [file for file in kept if not file.path.endswith((".bin", ".bin.index.json"))]
    return kept


def fetch(
    model_id: str,
    *,
    revision: str | None = None,
    to: Path | None = None,
    source: HubName | None = None,
    weights: bool = True,
    again: bool = False,
) -> Path:
    """The local folder of a hub id, downloaded if need be.

    to:      a folder of the user's choice instead of the cache.
    source:  `hf` (HF_ENDPOINT is respected) or `modelscope`; by default what the environment says.
    weights: False fetches config and tokenizer only.
    again:   ask the hub and verify every file, even where the cache was whole.
    Raises ModelError where the id is unknown, the hub cannot be reached, or a checksum is wrong.
    """
    if source == "modelscope" or (source is None and environment.modelscope_endpoint()):
        from tuoling.models.modelscope import fetch_modelscope

        return fetch_modelscope(model_id, revision=revision, to=to, weights=weights, again=again)
    return _fetch_hf(model_id, revision=revision, to=to, weights=weights, again=again)


def _fetch_hf(model_id: str, *, revision: str | None, to: Path | None, weights: bool, again: bool) -> Path:
    environment.quiet_libraries()
    cached = None if to is not None else cached_snapshot(model_id, revision)
    if cached is not None and not again and is_verified(cached, weights=weights):
        return cached

    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=environment.hub_endpoint())
    try:
        commit = api.repo_info(model_id, revision=revision).sha
        files = [
            RemoteFile(e.path, e.size, e.lfs.sha256 if e.lfs else None, None if e.lfs else e.blob_id)
            for e in api.list_repo_tree(model_id, recursive=True, revision=commit)
            if isinstance(e, RepoFile)
        ]
        wanted = _require_some(choose_files(files, weights=weights), model_id)
        _announce(model_id, wanted, api.endpoint)
        fresh = _fetch_large(api.endpoint, model_id, str(commit), wanted, to)
        folder = Path(
            api.snapshot_download(
                model_id,
                revision=revision,
                local_dir=to,
                allow_patterns=[glob.escape(file.path) for file in wanted],
            )
        )
    except (
        httpx2.HTTPError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        return _without_hub(model_id, cached, error, again=again)
    except TransferError as error:
        return _without_hub(model_id, cached, error, again=True)
    verify(folder, [file for file in wanted if file not in fresh])
    mark_verified(folder, weights=weights)
    return folder


def _fetch_large(
    endpoint: str, model_id: str, commit: str, files: list[RemoteFile], to: Path | None
) -> list[RemoteFile]:
    """Put large files where huggingface_hub looks first, resumed; its own download starts over after a kill.

    Returns those that came and were verified now.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.file_download import repo_folder_name

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model_id, repo_type="model") / "blobs"
    large = [file for file in files if file.sha256]
    fresh = []
    with console.progress() as bar:
        task = bar.add_task(tr("MiB", "MiB"), total=sum(file.size_bytes for file in large) >> 20, detail="")
        for file in large:
            path = to / file.path if to is not None else blobs / str(file.sha256)
            if path.is_file():
                continue
            part = path.with_name(path.name + ".part")
            url = f"{endpoint}/{model_id}/resolve/{commit}/{urllib.parse.quote(file.path)}"
            fetch_part(
                url,
                part,
                file.size_bytes,
                headers=headers,
                came=lambda count: bar.update(task, advance=count / 2**20),
            )
            verify(part.parent, [replace(file, path=part.name)], name=file.path)
            part.replace(path)
            fresh.append(file)
    return fresh


def cached_snapshot(model_id: str, revision: str | None) -> Path | None:
    """The folder in Hugging Face's cache that holds this revision's config, if any."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(model_id, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _without_hub(model_id: str, cached: Path | None, error: Exception, *, again: bool) -> Path:
    """What lies in the cache where the hub does not answer; else say why there is nothing."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        raise ModelError(
            tr("the model is gated: its owner must let you in", "该模型需要申请权限"),
            where=model_id,
            remedy=tr("accept its terms on the hub, then set HF_TOKEN", "在网站上同意条款后设置 HF_TOKEN"),
        ) from error
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        raise ModelError(
            tr(
                "no such model on the hub, and no such local folder",
                "模型库里没有这个模型，本地也没有这个目录",
            ),
            where=model_id,
            remedy=tr("check the spelling and the revision", "请检查拼写与版本"),
        ) from error
    if cached is not None and not again:
        console.note(tr(f"the hub does not answer: using {cached}", f"无法连接模型库：使用 {cached}"))
        return cached
    detail = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise ModelError(
        tr(
            f"there is no such folder here, and the hub cannot be reached: {detail}",
            f"本地没有这个目录，模型库也无法连接：{detail}",
        ),
        where=model_id,
        remedy=tr(
            "run it again (what has come is kept); or set HF_ENDPOINT to a mirror, or --source modelscope",
            "再运行一次（已下载的部分会保留）；或把 HF_ENDPOINT 设为镜像，或用 --source modelscope",
        ),
    ) from error


def _require_some(files: list[RemoteFile], model_id: str) -> list[RemoteFile]:
    if not files:
        raise ModelError(tr("the repository holds no model files", "该仓库里没有模型文件"), where=model_id)
    return files


def _announce(model_id: str, files: list[RemoteFile], host: str) -> None:
    size = sum(file.size_bytes for file in files) / 2**20
    console.note(
        tr(
            f"{model_id}: {len(files)} files, {size:,.1f} MiB, from {host}",
            f"{model_id}：{len(files)} 个文件，{size:,.1f} MiB，来自 {host}",
        )
    )


def verify(folder: Path, files: Iterable[RemoteFile], *, name: str | None = None) -> None:
    """Hash every file against what the hub says. A wrong one is removed and raises ModelError (under `name`)."""
    for file in files:
        path = folder / file.path
        if file.sha256:
            got, want = sha256_file(path), file.sha256
        elif file.git_sha1:
            got, want = git_sha1(path), file.git_sha1
        else:
            continue
        if got != want:
            _remove(path)
            raise ModelError(
                tr(
                    f"{name or file.path} came with a wrong checksum and was removed",
                    f"{name or file.path} 校验和不符，已删除",
                ),
                where=str(path),
                remedy=tr(
                    f"run it again; got {got}, should be {want}", f"请重新运行；得到 {got}，应为 {want}"
                ),
            )


def git_sha1(path: Path) -> str:
    """Git's id of a file's content: SHA-1 of `blob <size>\\0` and the bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """Remove a file, and in Hugging Face's cache the blob that its link points to."""
    target = path.resolve()
    path.unlink(missing_ok=True)
    target.unlink(missing_ok=True)


def _marker(folder: Path) -> Path:
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return environment.cache_dir() / "hub" / f"{name}.json"


def is_verified(folder: Path, *, weights: bool) -> bool:
    """True where `fetch` once brought this folder whole (with its weights, if they are asked for)."""
    marker = _marker(folder)
    if not marker.is_file():
        return False
    said = read_json(marker)
    return said["folder"] == str(folder.resolve()) and (said["weights"] or not weights)


def mark_verified(folder: Path, *, weights: bool) -> None:
    """Remember that this folder is whole."""
    if not (weights is False and is_verified(folder, weights=True)):
        write_json(_marker(folder), {"folder": str(folder.resolve()), "weights": weights})
