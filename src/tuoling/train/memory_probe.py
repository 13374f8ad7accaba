"""Two real steps of the longest batch in a process of their own: the measured peak and speed, or "does not fit"."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tuoling import environment
from tuoling.errors import TrainingError
from tuoling.language import tr
from tuoling.train.memory import largest_micro_batch_lengths

if TYPE_CHECKING:
    from tuoling.config import RunConfig
    from tuoling.train.prepare import Setup

CHILD = (sys.executable, "-m", "tuoling.train.memory_probe")
STEPS = 2
"""The optimizer makes its states in the first: only the second holds everything."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


@dataclass(frozen=True, slots=True)
class Probe:
    """peak_bytes: measured, None where the run does not fit; why: what ended it then. tokens_per_s: of the last step."""

    peak_bytes: int | None
    why: str = ""
    tokens_per_s: float | None = None


def probe_memory(config: RunConfig, *, command: Sequence[str] = CHILD) -> Probe:
    """Run the longest batch twice in a child process. That it is killed for its memory is an answer.

    Raises TrainingError where the child fails for any other reason.
    """
    done = subprocess.run(
        list(command), input=config.model_dump_json(), capture_output=True, text=True, check=False
    )
    if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return Probe(None, tr("the system killed it for its memory", "系统因内存不足将其终止"))
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        answer = json.loads(lines[-1])
        return Probe(**answer)
    last = (done.stderr.strip().splitlines() or [str(done.returncode)])[-1]
    if is_out_of_memory(last):
        return Probe(None, last)
    raise TrainingError(
        tr(f"the probe failed: {last}", f"试跑失败：{last}"),
        remedy=tr("leave out --probe to see the estimate", "去掉 --probe 可只看估算"),
    )


def is_out_of_memory(message: str) -> bool:
    """Whether an error's text says that memory ran out, in Python's, torch's or CUDA's words."""
    return "MemoryError" in message or any(words in message.lower() for words in OUT_OF_MEMORY)


def main() -> None:
    """The child: a config on stdin, a Probe as JSON on stdout."""
    from tuoling.config import RunConfig

    with suppress(OSError):  # where memory runs out, the probe goes and nothing else
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    environment.quiet_libraries()
    config = RunConfig.model_validate_json(sys.stdin.read()).model_copy(
        update={"report_to": (), "ignore_memory_plan": True}
    )
    try:
        answer = _two_steps(config)
    except (MemoryError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if not is_out_of_memory(text):
            raise
        answer = Probe(None, text)
    print(json.dumps(asdict(answer)))  # noqa: T201


def _two_steps(config: RunConfig) -> Probe:
    """Peak of this process (CPU), or what torch took of the device, over two steps of the longest batch; speed of the last."""
    import torch

    from tuoling.train.loop import assemble, train_step
    from tuoling.train.prepare import prepare
    from tuoling.train.run_folder import RunFolder

    setup = prepare(config, say=lambda _: None)
    with tempfile.TemporaryDirectory() as folder:
        parts = assemble(setup, RunFolder(Path(folder), {}), {}, lambda _: None)
    parts.model.train()
    batch = longest_batch(setup)
    took = 0.0
    on_cuda = setup.device.startswith("cuda")
    for _ in range(STEPS):
        began = time.perf_counter()
        train_step(parts.fast, parts.optimizer, parts.engine, [batch], config.max_grad_norm)
        if on_cuda:  # the optimizer's kernels are still to come
            torch.cuda.synchronize()
        took = time.perf_counter() - began
    peak = torch.cuda.max_memory_reserved() if on_cuda else environment.peak_rss_gib() * 2**30
    return Probe(int(peak), tokens_per_s=round(len(batch.input_ids) / took, 1))


def longest_batch(setup: Setup) -> Any:
    """The longest rows that can meet in one forward pass, as a batch."""
    from tuoling.data.pack import collate

    count = len(largest_micro_batch_lengths(setup.config, setup.train.lengths))
    rows = np.argsort(-setup.train.lengths, kind="stable")[:count]
    return collate([setup.train[int(row)] for row in rows])


if __name__ == "__main__":
    main()
