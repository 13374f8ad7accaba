"""Who may call a server that others can reach: keys that are shown once and kept as hashes."""

from __future__ import annotations

import hmac
import secrets
import time
from pathlib import Path
from typing import Any

from tuoling.errors import OutputError
from tuoling.files import read_json, sha256_text, write_json
from tuoling.language import tr

PREFIX = "tuoling-"


class ApiKeys:
    """The hashes of the keys that are accepted. A key has 256 random bits, so that a plain hash cannot be undone."""

    def __init__(self, hashes: dict[str, str] | None = None) -> None:
        """hashes: SHA-256 in hex by the key's name."""
        self._hashes = dict(hashes or {})

    def __len__(self) -> int:
        return len(self._hashes)

    def accept(self, name: str, key: str) -> None:
        """Take one more key, for this process alone."""
        self._hashes[name] = sha256_text(key)

    def owner(self, key: str) -> str | None:
        """The name of a key; None for one that is not known. Takes as long whichever it is."""
        found = None
        hashed = sha256_text(key)
        for name, known in self._hashes.items():
            if hmac.compare_digest(hashed, known):
                found = name
        return found


def read_keys(file: Path) -> ApiKeys:
    """The keys in a file; none where there is no file."""
    if not file.exists():
        return ApiKeys()
    content: Any = read_json(file)
    entries = content.get("keys") if isinstance(content, dict) else None
    usable = isinstance(entries, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and len(str(entry.get("sha256"))) == 64
        for entry in entries
    )
    if not usable:
        raise OutputError(
            tr("not a file of keys", "不是密钥文件"),
            where=str(file),
            remedy=tr("choose another --key-file", "请用 --key-file 指定其他文件"),
        )
    return ApiKeys({entry["name"]: entry["sha256"] for entry in entries or []})


def make_key(file: Path, name: str) -> str:
    """Make a key, add its hash to the file and return it: nobody can read it again. A name's old key is replaced."""
    kept = read_keys(file)._hashes
    key = PREFIX + secrets.token_urlsafe(32)
    kept[name] = sha256_text(key)
    made = time.strftime("%Y-%m-%d")
    write_json(
        file, {"keys": [{"name": one, "sha256": hashed} for one, hashed in kept.items()], "written": made}
    )
    file.chmod(0o600)
    return key
