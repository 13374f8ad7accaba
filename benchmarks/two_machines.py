"""Two machines train together, one is killed and comes back: the documented commands, and what they print.

    sudo python benchmarks/two_machines.py [--write]

Needs root and iproute2: the machines are two network namespaces that share nothing but a cable (a veth pair, 10.77.0.1
and 10.77.0.2) and the disk. Each command is run inside one of them by `ip netns exec`, just as it stands in the guide:

1. one process alone: the losses the others are held against,
2. both machines by `--nnodes 2 --node-rank I --master 10.77.0.1`,
3. the same from the first machine alone by `--hostfile`,
4. machine 1 killed (SIGKILL, launcher and rank) in the middle of a run; what machine 0 says; `tuoling resume` on both,
5. the cable pulled in the middle of a run: both end with clear words after timeout_s,
6. a hostfile with a machine that is not there, and a machine 1 whose machine 0 has not been started,
7. each engine, all weights in float32: the bytes of a step that the cable carries, beside what scaling.py says; and the
   three operations they are made of alone, which tells where the two differ.

Prints a transcript and, in the end, how far the losses are apart. Takes about seven minutes on two cores. --write:
two_machines.txt beside this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import scaling
from safetensors.torch import load_file
from tests.faults.machines import (
    ADDRESSES,
    NAMES,
    Machine,
    Transcript,
    can_be_made,
    losses,
    machines,
    plug_cable,
    pull_cable,
    together,
    wait_for_steps,
)
from tests.tiny import settings_without_chance, sum_rows, tiny_model, write_rows

HERE = Path(__file__).parent
STEPS, KILLED_AFTER = 40, 12


def cable_bytes() -> int:
    """What machine 0 has sent."""
    path = "/sys/class/net/cable0/statistics/tx_bytes"
    found = subprocess.run(
        ["ip", "netns", "exec", NAMES[0], "cat", path], check=True, capture_output=True, text=True
    )
    return int(found.stdout)


def count_bytes(
    folder: Path, say: Transcript, configs: dict[str, str], paper: Callable[[str], float]
) -> None:
    """The bytes of a step under each engine, between its 10th and about its 50th."""
    say("| engine | MB a step on the cable | on paper |")
    for engine, config in configs.items():
        quiet = Transcript(shown=False)
        both = together(folder, quiet, "train", config)
        marks = []
        for wanted in (10, 50):
            wait_for_steps(folder / engine / "run", wanted)
            marks.append((len(losses(folder / engine / "run")), cable_bytes()))
        for machine in both:
            machine.wait()
        (first, before), (last, after) = marks
        say(f"| {engine} | {(after - before) / (last - first) / 1e6:.2f} | {paper(engine) / 1e6:.2f} |")


OPERATION = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
whole, part = torch.ones(1_000_000), torch.ones(500_000)
ask = {
    "all-reduce": lambda: dist.all_reduce(whole),
    "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
    "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
}[sys.argv[1]]
for _ in range(25):
    ask()
dist.barrier()
dist.destroy_process_group()
"""


def count_operations(folder: Path, say: Transcript) -> None:
    """The bytes of each operation on a million float32 numbers, 4 MB, in the mean of 25."""
    say("| gloo, 4 MB over two machines | MB on the cable | on paper |")
    on_paper = {
        "all-reduce": scaling.all_reduce_bytes(4e6, 2),
        "all-gather": scaling.all_gather_bytes(4e6, 2),
        "reduce-scatter": scaling.all_gather_bytes(4e6, 2),
    }
    for number, (name, paper) in enumerate(on_paper.items()):
        before, started = cable_bytes(), []
        for rank in (0, 1):
            place = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(29700 + number), "WORLD_SIZE": "2"}
            place |= {"RANK": str(rank), "GLOO_SOCKET_IFNAME": f"cable{rank}", "OMP_NUM_THREADS": "1"}
            command = ["ip", "netns", "exec", NAMES[rank], sys.executable, "-c", OPERATION, name]
            started.append(subprocess.Popen(command, env={**os.environ, **place}, cwd=folder))
        codes = [process.wait(timeout=1800) for process in started]
        if any(codes):
            raise SystemExit(f"{name} failed")
        say(f"| {name} | {(cable_bytes() - before) / 25 / 1e6:.2f} | {paper / 1e6:.2f} |")


def play(folder: Path, say: Transcript) -> dict[str, float]:
    """All seven scenes. Returns how far the losses of each run are from those of one process."""
    model = tiny_model(folder / "model", hidden=256, layers=4)
    data = write_rows(folder / "rows.jsonl", sum_rows(64))
    # steps nearly proportional to their gradients: an error in one is neither hidden nor blown up. At a rate of 1e-1 the
    # loss jumps about, and the last bits of sums taken in another order by two processes had grown to half of it
    keys: dict[str, Any] = {"adam_epsilon": 1e-1, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    keys |= {"max_steps": STEPS, "batch_size": 8, "save_steps": 5, "timeout_s": 1800}

    def config(name: str, **more: Any) -> str:
        settings = settings_without_chance(folder / name, model, data, {**keys, "logging_steps": 10, **more})
        (folder / f"{name}.json").write_text(json.dumps(settings, indent=1))
        return f"{name}.json"

    def run_of(name: str) -> Path:
        return folder / name / "run"

    say("# 1. one process alone")
    Machine(0, folder, "train", config("alone"), say=say).wait()
    straight = losses(run_of("alone"))

    say("\n# 2. two machines, each given the command")
    for machine in together(folder, say, "train", config("two")):
        machine.wait()

    say("\n# 3. two machines, started from the first one")
    (folder / "hosts.txt").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    from_hostfile = ("--hostfile", "hosts.txt", "--master", ADDRESSES[0], "--remote-shell", "ip netns exec")
    Machine(0, folder, "train", config("hosts"), *from_hostfile, say=say).wait()

    say(f"\n# 4. machine 1 is killed after step {KILLED_AFTER}, and brought back")
    both = together(folder, say, "train", config("killed"))
    wait_for_steps(run_of("killed"), KILLED_AFTER)
    both[1].kill()
    say(f"  machine 1: SIGKILL to all its processes at step {len(losses(run_of('killed')))}")
    for machine in both:
        machine.wait()
    for machine in together(folder, say, "resume", "killed/run"):
        machine.wait()

    say(f"\n# 5. the cable is pulled after step {KILLED_AFTER} (timeout_s=30)")
    both = together(folder, say, "train", config("cut"), "timeout_s=30")
    wait_for_steps(run_of("cut"), KILLED_AFTER)
    pull_cable()
    for machine in both:
        machine.wait()
    plug_cable()
    for machine in together(folder, say, "resume", "cut/run"):
        machine.wait()

    say("\n# 6. a machine that is not there, and one that was not started")
    (folder / "hosts.txt").write_text(f"{NAMES[0]}\n{NAMES[1]}\ngpu03\n")
    Machine(0, folder, "train", config("none"), *from_hostfile, say=say).wait()
    alone = ("--nnodes", "2", "--node-rank", "1", "--master", ADDRESSES[0])
    Machine(1, folder, "train", config("none"), "timeout_s=8", *alone, say=say).wait()
    say("\n# 7. the bytes of a step")
    parameters = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    outside = (
        len(load_file(model / "model.safetensors")["transformer.word_embeddings.weight"]) * 256 + 4 * 256
    )
    step = scaling.Run(parameters, parameters, 2, outside, weight_bytes=4, half=False)
    keys |= {"finetuning_type": "full", "max_steps": 60, "save_steps": 0, "per_device_train_batch_size": 4}
    installed = importlib.util.find_spec("deepspeed") is not None
    engines = [engine for engine in scaling.ENGINES if installed or not engine.startswith("zero")]
    configs = {engine: config(engine, parallel=engine) for engine in engines}
    count_bytes(folder, say, configs, lambda engine: scaling.sent_bytes(engine, step))
    count_operations(folder, say)
    found = {}
    for name in ("two", "hosts", "killed", "cut"):
        curve = losses(run_of(name))
        pairs = list(zip(straight, curve, strict=False))
        found[name] = max(abs(a - b) / a for a, b in pairs) if len(curve) == STEPS else float("inf")
    return found


def neutral(lines: Sequence[str], folder: Path) -> str:
    """The transcript without this machine's own paths and numbers of processes."""
    text = (
        "\n".join(lines).replace(f"{folder}/", "").replace(str(folder), ".").replace(sys.executable, "python")
    )
    for number, name in enumerate(NAMES):
        text = text.replace(name, f"machine{number}")
    return re.sub(r"/tmp/tuoling-\w+", "/tmp/tuoling-x", text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if not can_be_made():
        raise SystemExit("network namespaces need root and iproute2")
    say = Transcript()
    with tempfile.TemporaryDirectory() as name, machines():
        found = play(Path(name), say)
        say(f"\n# losses of {STEPS} steps, largest relative distance from one process alone")
        for run, apart in found.items():
            say(f"{run:>8}  {apart:.1e}")
        text = neutral(say.lines, Path(name))
    if args.write:
        (HERE / "two_machines.txt").write_text(text + "\n", encoding="utf-8")
    if max(found.values()) > 1e-5:
        raise SystemExit("the losses are apart")


if __name__ == "__main__":
    main()
