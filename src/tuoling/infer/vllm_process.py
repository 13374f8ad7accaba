"""`vllm serve` as a child process: started on a free port of this machine, waited for, ended with its engine."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tuoling import environment
from tuoling.errors import MissingPackage, ModelError
from tuoling.language import tr

START_S = 1800.0
"""Large weights over a slow disk, and the graphs that vLLM captures, take many minutes."""

_POLL_S = 0.2
_END_S = 20.0


def require_vllm() -> str:
    """The path of the program. Raises MissingPackage where it is not installed."""
    program = shutil.which("vllm")
    if program is None:
        error = MissingPackage("vllm", extra="", purpose=tr("starting a vLLM server", "启动 vLLM 服务"))
        error.remedy = tr(
            "pip install vllm   (it needs a GPU, and brings its own torch: a virtual environment of its own is best)\n"
            "or name a server that runs: --endpoint http://HOST:8000/v1",
            "pip install vllm   （需要 GPU，并自带一套 torch：最好装在单独的虚拟环境里）\n"
            "或指定正在运行的服务：--endpoint http://主机:8000/v1",
        )
        raise error
    return program


class VllmProcess:
    """A server of ours. `url` is its API, `log` what it printed."""

    def __init__(self, program: str, words: Sequence[str]) -> None:
        """words: what follows `vllm serve`, without host and port."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self.log = environment.cache_dir() / f"vllm-{port}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            self._child = subprocess.Popen(
                [program, "serve", *words, "--host", "127.0.0.1", "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment.variables(VLLM_NO_USAGE_STATS="1"),
            )

    def wait(self, limit_s: float = START_S) -> None:
        """Until it answers. Raises ModelError with its last lines where it ends or takes too long."""
        ready = self.url.removesuffix("/v1") + "/health"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            if self._child.poll() is not None:
                raise self._failed(
                    tr(
                        f"vllm ended with code {self._child.returncode}",
                        f"vllm 已退出，代码 {self._child.returncode}",
                    )
                )
            try:
                with opener.open(ready, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(_POLL_S)
        self.close()
        raise self._failed(
            tr(f"vllm does not answer after {limit_s:.0f} s", f"vllm 启动 {limit_s:.0f} 秒后仍无响应")
        )

    def _failed(self, problem: str) -> ModelError:
        said = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        shown = "\n".join(line.strip()[:200] for line in said[-5:])
        return ModelError(problem, where=str(self.log), remedy=shown or None)

    def close(self) -> None:
        """End it, at first politely."""
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()


def lora_words(name: str, folder: Path, rank: int) -> list[str]:
    """Options of `vllm serve` for an adapter on the base it is started with."""
    most = next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
    return ["--enable-lora", "--max-lora-rank", str(most), "--lora-modules", f"{name}={folder}"]
