"""A server in a process of its own, and callers of it: what serve.py and soak.py measure with."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

HTTP = httpx.Client(trust_env=False, verify=False, limits=httpx.Limits(max_connections=None))
"""One for all: making a client takes longer than many an answer, for it reads the certificates."""
OPENING_S = 180.0
"""A server that does not answer by then has failed."""


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    process: subprocess.Popen[bytes]
    opened_s: float

    def resident_mb(self) -> float:
        """Of the process and those it started."""
        parent = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in [parent, *parent.children(recursive=True)]) / 1e6


@contextmanager
def serving(
    words: Sequence[str], log: Path, *, ready: str, variables: dict[str, str] | None = None
) -> Iterator[Running]:
    """Start `words`, with {port} filled in, wait for GET `ready`, and end it in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    filled = {name: value.replace("{port}", port) for name, value in (variables or {}).items()}
    begun = time.monotonic()
    with log.open("wb") as said:
        process = subprocess.Popen(
            [word.replace("{port}", port) for word in words],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **filled},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url + ready, process, log)
        yield Running(url, process, time.monotonic() - begun)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + OPENING_S
    while time.monotonic() < limit:
        if process.poll() is not None:
            break
        try:
            if HTTP.get(url, timeout=5).status_code < 500:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"no answer at {url}:\n{log.read_text('utf-8', 'replace')[-2000:]}")


@dataclass(frozen=True)
class Speaks:
    """How a server wants to be asked. chat: /v1/chat/completions, else /v1/completions. more: fields of its own."""

    model: str
    chat: bool = False
    more: dict[str, Any] | None = None

    def request(self, prompt: str, tokens: int, *, stream: bool) -> tuple[str, dict[str, Any]]:
        """Path and body of a greedy request."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": stream,
            **(self.more or {}),
        }
        if self.chat:
            return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}
        return "/v1/completions", {**body, "prompt": prompt}


def first_text_s(url: str, speaks: Speaks, prompt: str, limit_s: float) -> float | None:
    """Seconds from the request to the first text of its stream, which is then left to its end (8 tokens)."""
    path, body = speaks.request(prompt, 8, stream=True)
    begun, first = time.monotonic(), None
    try:
        with HTTP.stream("POST", url + path, json=body, timeout=limit_s) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if time.monotonic() - begun > limit_s:
                    break
                if first is None and _has_text(line):
                    first = time.monotonic() - begun
    except httpx.TimeoutException:
        return first
    return first


def _has_text(line: str) -> bool:
    if not line.startswith("data: {"):
        return False
    choices = json.loads(line[6:]).get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return bool(delta.get("content") or choices[0].get("text"))


def answered_tokens(url: str, speaks: Speaks, prompt: str, tokens: int, limit_s: float) -> int:
    """Tokens of a whole answer as the server counts them; 0 where it does not come in time."""
    path, body = speaks.request(prompt, tokens, stream=False)
    try:
        answer = HTTP.post(url + path, json=body, timeout=limit_s)
    except httpx.TimeoutException:
        return 0
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"])


def all_at_once(calls: Sequence[Any]) -> list[Any]:
    """Every call in a thread of its own, all started together; their results. The first error is raised."""
    gate = threading.Barrier(len(calls))
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def work(at: int) -> None:
        gate.wait()
        try:
            results[at] = calls[at]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def median(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    have = [value for value in values if value is not None]
    return statistics.median(have) if have else None
