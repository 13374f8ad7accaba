"""What runs survive: kills, full disks, flipped bits, crashes; and how long training stands still for a checkpoint.

    python benchmarks/faults.py                  all of it
    python benchmarks/faults.py kills disk flips supervise stall   some of it
    python benchmarks/faults.py --write          the figures into faults.json, the tables into faults.md

Every row is a run of twelve steps with dropout, a checkpoint every three and an evaluation every four, that something
happens to and that is resumed: "equal" means the same weights, bit for bit, and the same losses, gradients and rates as
the run nothing happens to. `disk` needs the right to mount a tmpfs for its second table.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.faults.runs import Bench, Left, bench, left  # noqa: E402
from tests.faults.trials import broken_run, fill, kills, spoil, starve, straight_run, survive  # noqa: E402
from tests.tiny import sum_rows, tiny_model, write_rows  # noqa: E402

Section = dict[str, Any]


def table_of_kills(made: Bench, straight: Left) -> Section:
    rows = []
    for number, fault in enumerate(kills(), 1):
        came, logged, found = survive(made, made.folder / f"kill-{number}", fault)
        where = {
            "step": "in a step",
            "save": f"in a save, from step {fault.get('step')} on",
            "file": "tokenising",
        }
        name = where.get(
            fault["kind"], {"evaluate": "in an evaluation", "tokenise": "tokenising"}.get(fault["kind"])
        )
        rows.append([number, name, fault["at"], logged, _yes(came), _yes(found == straight)])
    good = sum(row[4] == row[5] == "yes" for row in rows)
    return {
        "title": f"kill -9: {good} of {len(rows)} survived, bit for bit",
        "head": ["", "where", "at its moment", "steps logged then", "killed", "resumed equal"],
        "rows": rows,
    }


def table_of_full_disks(made: Bench, straight: Left) -> Section:
    rows, at, came = [], 0, True
    while True:
        at += 1
        came, said, names, found = starve(made, made.folder / f"full-{at}", at)
        if not came:
            break
        rows.append([at, ", ".join(names), _short(said), _yes(found == straight)])
    return {
        "title": f"Disk full from the n-th write on, counted from step 6: {_equal(rows)} of {len(rows)} went on equal",
        "head": ["write", "whole checkpoints left", "what is said", "resumed equal"],
        "rows": rows,
    }


def table_of_small_disks(made: Bench, straight: Left) -> Section:
    whole = sum(path.stat().st_size for path in (made.folder / "straight").rglob("*") if path.is_file())
    rows = []
    for tenth in range(1, 15):
        size = max(1, round(tenth * whole / 10 / 4096)) * 4096
        said, names, found = fill(made, made.folder / f"disk-{tenth}", size)
        rows.append(
            [size // 1024, ", ".join(names) or "none", _short(said) or "enough", _yes(found == straight)]
        )
    return {
        "title": f"A tmpfs of so many KiB, enlarged before the run goes on: {_equal(rows)} of {len(rows)} equal",
        "head": ["KiB", "whole checkpoints left", "what is said", "went on equal"],
        "rows": rows,
    }


def table_of_flips(made: Bench, straight: Left) -> Section:
    rows = []
    for path in sorted((broken_run(made) / "checkpoint-9").iterdir()):
        said, found = spoil(made, made.folder / f"flip-{path.name}", path.name)
        rows.append([path.name, _short(said), "checkpoint-6", _yes(found == straight)])
    return {
        "title": f"One bit flipped in a file of the newest checkpoint: {_equal(rows)} of {len(rows)} named and refused",
        "head": ["file", "what is said", "--skip-damaged takes", "resumed equal"],
        "rows": rows,
    }


def supervised(made: Bench, straight: Left) -> Section:
    """`tuoling train --supervise`, whose training process is killed in two places."""
    run = made.folder / "supervised"
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "TUOLING_LANG": "en",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    words = [
        sys.executable,
        "-m",
        "tuoling",
        *made.words(run, "max_steps=400", "save_steps=20"),
        "--supervise",
    ]
    log = made.folder / "supervised.txt"
    with log.open("w") as out:
        process = subprocess.Popen(words, env=env, stdout=out, stderr=subprocess.STDOUT)
        for step in (90, 230):
            while _logged(run) < step and process.poll() is None:
                time.sleep(0.02)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
            while _crashes(run) < (1 if step == 90 else 2) and process.poll() is None:
                time.sleep(0.02)
        code = process.wait()
    kept = re.compile(r"supervisor|going on|same loss|made again|put aside|^step (1|200|400) ")
    said = [
        line.replace(str(made.folder), "runs") for line in log.read_text().splitlines() if kept.search(line)
    ]
    events = (
        (run / "supervisor.jsonl")
        .read_text()
        .replace(str(made.folder), "runs")
        .replace(sys.executable, "python")
    )
    told = made.train(made.folder / "unsupervised", "max_steps=400", "save_steps=20")
    assert told.status == 0, told.said
    equal = left(run) == left(made.folder / "unsupervised")
    return {
        "title": f"--supervise with two crashes in it: exit code {code}, "
        f"{'equal' if equal else 'NOT equal'} to a run without them",
        "text": "\n".join([*said, "", "supervisor.jsonl:", *events.splitlines()]),
    }


def _logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def _crashes(run: Path) -> int:
    path = run / "supervisor.jsonl"
    return path.read_text().count('"event": "end"') if path.is_file() else 0


def stall() -> Section:
    """How long training stands still for a LoRA checkpoint, against the time from one to the next."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="tuoling-") as name:
        folder = Path(name)
        model = tiny_model(folder / "model", "llama", layers=4, hidden=256)
        data = write_rows(folder / "rows.jsonl", sum_rows(400))
        for rank in (8, 64):
            run = folder / f"run-{rank}"
            keys = f"lora_rank={rank} lora_target=all save_steps=50 max_steps=250 save_total_limit=2 plot_loss=false "
            keys += (
                "device=cpu dtype=fp32 template=domain_bloom per_device_train_batch_size=8 disk_reserve_mib=0"
            )
            words = [
                "train",
                "--model",
                str(model),
                "--data",
                str(data),
                "--out",
                str(run),
                *keys.split(),
                "--json",
            ]
            env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TUOLING_LANG": "en"}
            out = subprocess.run(
                [sys.executable, "-m", "tuoling", *words], env=env, check=True, capture_output=True, text=True
            )
            done = json.loads(out.stdout[out.stdout.index("{") :])
            saves = len(range(50, 250, 50))
            newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            size = sum(path.stat().st_size for path in newest.iterdir())
            interval, each = 50 * done["seconds"] / (done["steps"] - 1), done["checkpoint_stall_s"] / saves
            share = f"{each / (interval + each):.2%}"
            rows.append([rank, f"{size / 2**20:.1f}", saves, f"{interval:.2f}", f"{1000 * each:.1f}", share])
    return {
        "title": "Training standing still for its checkpoints (LoRA, written beside the next steps)",
        "head": ["rank", "MiB", "saves", "s from one to the next", "ms of stall each", "share"],
        "rows": rows,
    }


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _equal(rows: list[list[Any]]) -> int:
    return sum(row[-1] == "yes" for row in rows)


def _short(said: str) -> str:
    return re.sub(r"\s+", " ", said).strip()


def markdown(section: Section) -> str:
    if "text" in section:
        return f"## {section['title']}\n\n```\n{section['text']}\n```\n"
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (section["head"], *section["rows"])]
    return (
        "\n".join([f"## {section['title']}\n", lines[0], "|" + "---|" * len(section["head"]), *lines[1:]])
        + "\n"
    )


def main(words: list[str]) -> None:
    write = "--write" in words
    asked = [word for word in words if word != "--write"] or ["kills", "disk", "flips", "supervise", "stall"]
    mine: dict[str, list[Callable[[Bench, Left], Section]]] = {
        "kills": [table_of_kills],
        "disk": [table_of_full_disks, table_of_small_disks],
        "flips": [table_of_flips],
        "supervise": [supervised],
    }
    stored = HERE / "faults.json"
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="tuoling-") as name:
        made = bench(Path(name))
        straight = straight_run(made) if set(asked) & mine.keys() else None
        for word in asked:
            sections = (
                [stall()] if word == "stall" else [make(made, straight) for make in mine[word] if straight]
            )
            for section in sections:
                print(markdown(section), flush=True)
            found[word] = sections
            if write:
                store(found)
        made.server.close()


def store(found: dict[str, Any]) -> None:
    """The figures as JSON and as tables, section by section: the next one may take minutes."""
    (HERE / "faults.json").write_text(
        json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    tables = "\n".join(markdown(section) for sections in found.values() for section in sections)
    (HERE / "faults.md").write_text(f"# What runs survive\n\n{tables}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
