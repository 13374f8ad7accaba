"""One file over HTTP, resumed by Range from what an earlier try, or a killed process, left behind.

huggingface_hub 2.4 starts a file over when its process was killed; gigabytes on a bad line need better.
"""

from __future__ import annotations

import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any

from tuoling.errors import OutputError
from tuoling.language import tr

TIMEOUT_S = 30.0
TRIES = 5
_BLOCK = 1 << 20


class TransferError(Exception):
    """The file did not come whole; what came is kept in its `.part`."""


class _KeepSecrets(urllib.request.HTTPRedirectHandler):
    """A redirect to another host (a CDN) must not be given the token."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if (
            new is not None
            and urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc
        ):
            new.remove_header("Authorization")
        return new


def open_url(url: str, headers: Mapping[str, str] | None = None) -> Any:
    """A response to read from. Raises urllib's errors."""
    request = urllib.request.Request(url, headers={"User-Agent": "tuoling", **(headers or {})})
    return urllib.request.build_opener(_KeepSecrets).open(request, timeout=TIMEOUT_S)


def fetch_part(
    url: str,
    part: Path,
    size_bytes: int,
    *,
    headers: Mapping[str, str] | None = None,
    came: Callable[[int], None] = lambda count: None,
) -> None:
    """Fetch `url` into `part`, from where an earlier try ended, until it has `size_bytes`.

    came: told of every block's bytes. Raises TransferError after TRIES tries, OutputError where `part` cannot be
    written.
    """
    from filelock import FileLock

    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{part}.lock"):  # two processes must not append to one file
            last: Exception | None = None
            for _ in range(TRIES):
                try:
                    _append(url, part, size_bytes, headers or {}, came)
                except urllib.error.HTTPError as error:
                    last = error
                    if error.code not in (408, 429, 500, 502, 503, 504):
                        break
                except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
                    last = error
                if part.is_file() and part.stat().st_size == size_bytes:
                    Path(f"{part}.lock").unlink(missing_ok=True)
                    return
    except OSError as error:
        raise OutputError(
            tr(f"cannot write: {error.strerror or error}", f"无法写入：{error.strerror or error}"),
            where=str(part),
        ) from error
    raise TransferError(str(last or "the connection closed early")) from last


def _append(
    url: str, part: Path, size_bytes: int, headers: Mapping[str, str], came: Callable[[int], None]
) -> None:
    """Fetch what is missing behind the end of `part`; start over where the server ignores Range."""
    have = part.stat().st_size if part.is_file() else 0
    if have > size_bytes:
        part.unlink()
        have = 0
    if have == size_bytes and part.is_file():
        return
    asked = {**headers, "Range": f"bytes={have}-"} if have else dict(headers)
    with open_url(url, asked) as response, part.open("ab" if response.status == 206 else "wb") as out:
        while block := response.read1(_BLOCK):
            out.write(block)
            came(len(block))
