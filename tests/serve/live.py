"""A server on a free port of this machine, in a thread of the test's process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tuoling.infer.engine import Engine
from tuoling.serve.api import Service
from tuoling.serve.guard import GuardSettings
from tuoling.serve.jobs import Backend
from tuoling.serve.requests import Limits, Names, Reader
from tuoling.serve.server import LOCAL_NAMES, Address, GracefulServer, listen, make_server

HTTP = httpx.Client(trust_env=False, verify=False, timeout=60)
"""One for all tests: a new client reads all certificates first."""


@dataclass(eq=False)
class Live:
    """What a test asks and looks into."""

    url: str
    service: Service
    server: GracefulServer
    thread: threading.Thread

    def client(self, **options: Any) -> Any:
        """The real client of OpenAI."""
        from openai import OpenAI

        options = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options}
        return OpenAI(**options, http_client=HTTP)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """A bare request, JSON unless `content` says otherwise."""
        if "content" in options:
            options["headers"] = {"Content-Type": "application/json", **options.get("headers", {})}
        else:
            options["json"] = body
        return HTTP.post(self.url + path, **options)

    def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        lines = HTTP.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def stop(self) -> None:
        """As the first Ctrl-C does."""
        self.server.handle_exit(signal.SIGTERM, None)


@contextmanager
def live(
    backend: Backend,
    engines: dict[str, Engine],
    *,
    limits: Limits | None = None,
    guard: GuardSettings | None = None,
    drain_s: float = 30.0,
) -> Iterator[Live]:
    """Serve `engines` by name, the first one as the main one. The backend is not closed unless the server ends."""
    listening = listen(Address(port=0))
    service = Service(backend, Reader(Names(engines, next(iter(engines))), limits or Limits()))
    server = make_server(
        service, guard or GuardSettings(hosts=frozenset(LOCAL_NAMES), log=False), drain_s=drain_s
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        yield Live(url, service, server, thread)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
