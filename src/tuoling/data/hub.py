"""Datasets of the Hugging Face hub, through `datasets` (extra `hub`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tuoling.errors import DataError, MissingPackage
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.data.json_stream import Raw
    from tuoling.data.sources import Source


def load_hub_dataset(name: str, *, subset: str | None = None, split: str = "train") -> Any:
    """The `datasets.Dataset` of an id (or a local folder). Raises MissingPackage, DataError."""
    try:
        import datasets
    except ImportError as error:
        purpose = tr("reading datasets of the hub", "读取 hub 数据集")
        raise MissingPackage("datasets", extra="hub", purpose=purpose) from error
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # datasets raises many kinds, network errors among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            tr(
                f"not a file here, and not to be had from the hub: {reason}",
                f"本地没有这个文件，也无法从 hub 取得：{reason}",
            ),
            where=name,
            remedy=tr(
                "check the spelling and the network (HF_ENDPOINT sets a mirror), or give a local path",
                "请检查名字和网络（HF_ENDPOINT 可设镜像），或给本地路径",
            ),
        ) from error


def read_hub_rows(source: Source) -> Iterator[Raw]:
    """One record a row; the row number stands for the line."""
    dataset = load_hub_dataset(source.hub or source.path, subset=source.subset, split=source.split)
    for number, record in enumerate(dataset, 1):
        yield number, record, None, None


def hub_fingerprint(source: Source) -> str:
    """What `datasets` knows the content by."""
    dataset = load_hub_dataset(source.hub or source.path, subset=source.subset, split=source.split)
    return str(dataset._fingerprint)
