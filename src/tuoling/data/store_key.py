"""The key of a token store: a hash for each thing that decides its bytes, so that a change can be named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling.data.sources import Source
from tuoling.data.token_store import META
from tuoling.errors import DataError
from tuoling.files import read_json, sha256_file, sha256_text
from tuoling.language import tr
from tuoling.text.templates import Template
from tuoling.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from tuoling.data.store import StoreSettings

_PACKAGE = Path(__file__).resolve().parents[1]


def key_parts(
    sources: Sequence[Source], *, tokenizer: TextTokenizer, template: Template, settings: StoreSettings
) -> dict[str, str]:
    """Hashes of everything that decides a store's bytes, by name. A file's path is not among them."""
    reading = []
    for source in sources:
        how = {key: value for key, value in vars(source).items() if key not in ("path", "skipped")}
        reading.append(json.dumps(how, sort_keys=True, default=_plain))
    files = [source.path if source.hub is not None else sha256_file(_existing(source)) for source in sources]
    code = [
        path.read_text(encoding="utf-8")
        for folder in ("text", "data")
        for path in sorted((_PACKAGE / folder).rglob("*.py"))
    ]
    return {
        "files": sha256_text("\n".join(files)),
        "reading": sha256_text("\n".join(reading)),
        "template": f"{template.id} {template.fingerprint()}",
        "tokenizer": tokenizer.fingerprint(),
        "settings": json.dumps(asdict(settings), sort_keys=True),
        "code": sha256_text("\n".join(code)),
    }


def _existing(source: Source) -> str:
    if not Path(source.path).is_file():
        raise DataError(tr("no such file", "没有这个文件"), where=source.path)
    return source.path


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else dict(value)


def what_changed(cache_dir: Path, parts: dict[str, str]) -> tuple[str, ...]:
    """The parts in which the most alike of the newest stores differs; () if nothing is alike."""
    metas = sorted(cache_dir.glob(f"*/{META}"), key=lambda path: path.stat().st_mtime)[-20:]
    best: tuple[str, ...] = tuple(parts)
    for path in metas:
        try:
            other = read_json(path)["parts"]
        except (DataError, KeyError, TypeError):
            continue
        differ = tuple(name for name in parts if other.get(name) != parts[name])
        best = min(best, differ, key=len)
    return best if len(best) < len(parts) - 2 else ()
