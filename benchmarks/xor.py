"""XOR patches against sha256sum, cp and a byte loop, in one sitting.

    python benchmarks/xor.py [--size-mib 2048] [--rounds 5] [--files 8] [--folder /tmp] [--name disk] [--write]

Makes a base, one diff of --size-mib and a folder of as much in --files diffs, reads everything once (warm cache), and
then times in turns, ROUNDS times: `sha256sum` of the diff, Python's own SHA-256 of it, `cp` of it, the whole command
`tuoling patch` on it (result checked and fsynced), the folder with 1 and with 2 workers (without the program's start),
and, on LOOP_MIB only, BELLE's way: a generator over the bytes. The base's own hash is not asked for. Every result is
compared once. --write leaves xor.md and xor.json beside this file, a part for each --name. Needs six times the size on
--folder's disk; on one in memory (/dev/shm) nothing waits for a disk, whose own rate else rules patch's fsync.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tuoling.weights.diff_options import DiffOptions
from tuoling.weights.xor_folder import apply_xor_diff, make_xor_diff

LOOP_MIB = 8
HERE = Path(__file__)
COMMAND = [sys.executable, "-m", "tuoling", "patch"]


def timed(work: Callable[[], Any]) -> float:
    """Wall-clock seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write_noise(path: Path, size_bytes: int, seed: int) -> None:
    """Random bytes, 64 MiB at a time."""
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        for start in range(0, size_bytes, 64 << 20):
            file.write(generator.bytes(min(64 << 20, size_bytes - start)))


def byte_loop(diff: Path, base: Path, out: Path) -> None:
    """The first LOOP_MIB as BELLE's script mixes them, with its hash and its write."""
    with diff.open("rb") as source, base.open("rb") as key, out.open("wb") as sink:
        source.read(32)
        data, part = source.read(LOOP_MIB << 20), key.read(LOOP_MIB << 20)
        mixed = bytes(a ^ b for a, b in zip(data, part, strict=True))
        hashlib.sha256(mixed).hexdigest()
        sink.write(mixed)


def python_sha256(path: Path) -> None:
    """OpenSSL's SHA-256, which knows the processor's own instructions; coreutils may not."""
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def run(*words: str | Path) -> None:
    """One process, quiet, that must succeed."""
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


def patch(base: Path, diff: Path, out: Path, workers: int) -> None:
    """The whole command as a user runs it."""
    run(*COMMAND, base, diff, out, "--workers", str(workers), "--no-base-check")


def patch_folder(base: Path, folder: Path, out: Path, workers: int) -> None:
    """The same in this process."""
    apply_xor_diff(base, folder, out, DiffOptions(workers=workers, check_base=False))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prepare(place: Path, size_bytes: int, files: int) -> tuple[Path, Path, Path]:
    """base, one diff, a folder of diffs; all read once."""
    base, plain, parts = place / "consolidated.00.pth", place / "plain", place / "parts"
    write_noise(base, size_bytes - 12_345, 0)
    parts.mkdir()
    write_noise(plain, size_bytes, 1)
    for number in range(files):
        write_noise(parts / f"model-{number:02d}.bin", size_bytes // files, 2 + number)
    options = DiffOptions(check_base=False)
    one = make_xor_diff(base, plain, place / "one", options)
    make_xor_diff(base, parts, place / "enc", options)
    diff = place / "one" / one.files[0].name
    for target, source, out in ((plain, diff, place / "out"), (parts, place / "enc", place / "outs")):
        patch(base, source, out, 2)
        run("diff", "-r", "-x", "lineage.json", target, out)
        remove(out)
        remove(target)
    run("cat", base, diff, *sorted((place / "enc").iterdir()))
    return base, diff, place / "enc"


def measure(place: Path, size_bytes: int, files: int, rounds: int) -> list[dict[str, float]]:
    """Seconds of every contestant, a row a round, in turns."""
    base, diff, folder = prepare(place, size_bytes, files)
    out = place / "out"
    contestants: dict[str, Callable[[], None]] = {
        "sha256sum": lambda: run("sha256sum", diff),
        "python_sha256": lambda: python_sha256(diff),
        "cp": lambda: run("cp", diff, out),
        "patch": lambda: patch(base, diff, out, 2),
        "patch_one_worker": lambda: patch(base, diff, out, 1),
        "folder_1_worker": lambda: patch_folder(base, folder, out, 1),
        "folder_2_workers": lambda: patch_folder(base, folder, out, 2),
        "byte_loop": lambda: byte_loop(diff, base, out),
    }
    rows = []
    for number in range(rounds):
        row = {}
        names = list(contestants) if number % 2 == 0 else list(reversed(contestants))
        for name in names:
            run("sync")
            row[name] = timed(contestants[name])
            remove(out)
        row["byte_loop"] *= size_bytes / (LOOP_MIB << 20)
        rows.append(row)
        print(json.dumps({name: round(row[name], 3) for name in contestants}), flush=True)
    return rows


def ratios(rows: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the rounds' own ratios."""
    pairs = {
        "patch / sha256sum": ("patch", "sha256sum"),
        "patch / Python's SHA-256": ("patch", "python_sha256"),
        "patch / cp": ("patch", "cp"),
        "patch, one worker / sha256sum": ("patch_one_worker", "sha256sum"),
        "byte loop / patch": ("byte_loop", "patch"),
        "folder: 1 worker / 2 workers": ("folder_1_worker", "folder_2_workers"),
    }
    return {
        name: statistics.median(row[above] / row[below] for row in rows)
        for name, (above, below) in pairs.items()
    }


def table(name: str, rows: list[dict[str, float]], size_mib: int, files: int) -> str:
    """Markdown."""
    lines = [
        f"## {name}",
        "",
        f"One diff of {size_mib} MiB, a folder of {files} diffs with as much together; {len(rows)} rounds; the page cache is",
        f"warm; results are fsynced, which `cp` does not do; the byte loop is measured on {LOOP_MIB} MiB and scaled.",
        "",
        "| | seconds, median | least | most | MiB/s |",
        "|---|---|---|---|---|",
    ]
    for name in rows[0]:
        seconds = [row[name] for row in rows]
        middle = statistics.median(seconds)
        lines.append(
            f"| {name} | {middle:.2f} | {min(seconds):.2f} | {max(seconds):.2f} | {size_mib / middle:,.1f} |"
        )
    lines += ["", "| ratio | median of the rounds |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in ratios(rows).items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-mib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--name", default="disk", help="what --folder lies on")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        rows = measure(Path(place), asked.size_mib << 20, asked.files, asked.rounds)
    print(table(asked.name, rows, asked.size_mib, asked.files))
    if asked.write:
        write(asked.name, rows, asked.size_mib, asked.files)


def write(name: str, rows: list[dict[str, float]], size_mib: int, files: int) -> None:
    """Put the part `name` into both files; other parts stay."""
    data, text = HERE.with_suffix(".json"), HERE.with_suffix(".md")
    parts = json.loads(data.read_text("utf-8")) if data.is_file() else {}
    parts[name] = {"size_mib": size_mib, "files": files, "rounds": rows, "ratios": ratios(rows)}
    data.write_text(json.dumps(parts, indent=1) + "\n", "utf-8")
    tables = [table(one, part["rounds"], part["size_mib"], part["files"]) for one, part in parts.items()]
    text.write_text("# XOR patches\n\n" + "\n".join(tables), "utf-8")


if __name__ == "__main__":
    main()
