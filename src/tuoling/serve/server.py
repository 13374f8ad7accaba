"""From a model to a listening server: address, keys, names, and an end that cuts nobody off."""

from __future__ import annotations

import ipaddress
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from tuoling import console, environment
from tuoling.errors import UsageError
from tuoling.infer.engine import Engine
from tuoling.language import tr
from tuoling.serve.api import Service, make_app
from tuoling.serve.guard import GuardSettings
from tuoling.serve.jobs import Backend
from tuoling.serve.keys import ApiKeys, make_key, read_keys
from tuoling.serve.one_by_one import OneByOne
from tuoling.serve.requests import Names

KEY_VARIABLE = "TUOLING_API_KEY"
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen."""

    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def local(self) -> bool:
        """True where only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def listen(address: Address) -> socket.socket:
    """The socket, bound before a model is loaded. Raises UsageError where the port is taken or the address is not ours."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((address.host, address.port))
        made.listen(128)  # SO_REUSEADDR lets two bind; the second one to listen fails
    except OSError as error:
        made.close()
        raise UsageError(
            tr(f"cannot listen: {error.strerror or error}", f"无法监听：{error.strerror or error}"),
            where=f"{address.host}:{address.port}",
            remedy=tr("choose another --port, or stop what has it", "换一个 --port，或停掉占用它的程序"),
        ) from error
    return made


def keys_for(address: Address, file: Path, *, required: bool, new: str | None = None) -> ApiKeys | None:
    """The keys that are asked for; None on an address that only this machine can reach, unless `required`.

    Where keys are needed and there is none yet, one is made and shown. new: make one of this name in any case.
    """
    given = environment.secret(KEY_VARIABLE)
    keys = read_keys(file)
    if new is not None or ((required or not address.local) and not len(keys) and not given):
        name = new or "first"
        key = make_key(file, name)
        console.note(
            tr(
                f"API key {name!r}, shown this once and kept as a hash in {file}:\n{key}",
                f"API 密钥 {name!r}，只显示这一次，{file} 中仅保存其哈希：\n{key}",
            )
        )
        keys, required = read_keys(file), True
    if given:
        keys.accept(KEY_VARIABLE, given)
        required = True
    return keys if required or not address.local else None


def backend_of(engine: Engine, *, rows: int, waiting: int, memory_tokens: int | None = None) -> Backend:
    """Continuous batching where the engine's model allows it; else one answer at a time, and why."""
    if engine.name != "torch":
        console.note(tr(f"one answer at a time ({engine.name})", f"逐个回答（{engine.name}）"))
        return OneByOne(waiting=waiting)
    from tuoling.infer.torch_engine import TorchEngine
    from tuoling.serve.batching import Batcher
    from tuoling.serve.stepper import Unbatchable

    assert isinstance(engine, TorchEngine)
    prompt_tokens = 2048 if engine.device.type == "cuda" else 256
    try:
        return Batcher(
            engine, rows=rows, waiting=waiting, prompt_tokens=prompt_tokens, memory_tokens=memory_tokens
        )
    except Unbatchable as error:
        console.note(tr(f"one answer at a time, because {error}", f"逐个回答，因为{error}"))
    return OneByOne(waiting=waiting)


def names_of(engine: Engine, main: str) -> Names:
    """What requests may call the models: the main name for what was opened, each adapter's, the base's."""
    others = {name: engine.using(name) for name in engine.adapters if name != engine.adapter}
    return Names({main: engine, **{name: one for name, one in others.items() if name != main}}, main)


class GracefulServer(uvicorn.Server):
    """uvicorn's server, whose first signal lets answers finish for `drain_s` seconds and refuses new ones.

    A second signal ends at once; what is unfinished at the end is told so, in a stream as an event.
    """

    def __init__(self, service: Service, config: uvicorn.Config, drain_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, the second one shortens it."""
        if self._service.closing:
            self._close(0.0)
            return
        self._service.closing = True
        running, waiting = self._service.backend.load()
        if running or waiting:
            console.note(
                tr(
                    f"finishing {running + waiting} answers, at most {self._drain_s:g} s; once more to end now",
                    f"正在完成 {running + waiting} 个回答，最多 {self._drain_s:g} 秒；再按一次立即结束",
                )
            )
        self._close(self._drain_s)
        self.should_exit = True

    def _close(self, drain_s: float) -> None:
        closing = threading.Thread(target=self._service.backend.close, args=(drain_s,), daemon=True)
        closing.start()


def make_server(service: Service, guard: GuardSettings, *, drain_s: float = 30.0) -> GracefulServer:
    """The server, not yet running. Its `handle_exit` ends it from another thread too."""
    config = uvicorn.Config(
        make_app(service, guard),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=int(drain_s) + 10,
        h11_max_incomplete_event_size=64 << 10,
    )
    return GracefulServer(service, config, drain_s)


def run(service: Service, guard: GuardSettings, listening: socket.socket, *, drain_s: float = 30.0) -> None:
    """Serve until SIGINT or SIGTERM; returns when the last answer is sent."""
    server = make_server(service, guard, drain_s=drain_s)
    with suppress(KeyboardInterrupt, SystemExit):  # uvicorn raises the signal once more when it is done
        server.run(sockets=[listening])
    service.backend.close(0.0)
