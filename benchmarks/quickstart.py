"""Print what `tuoling quickstart` reached: accuracy by kind before and after, and seconds.

python benchmarks/quickstart.py [--family bloom|llama] [--seed 42]     run it, then print
python benchmarks/quickstart.py --of FOLDER                            print a run that is there
--write                                                                also write benchmarks/quickstart.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", default="bloom")
    parser.add_argument("--seed", default="42")
    parser.add_argument("--of", type=Path)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.of or Path(scratch) / "quickstart"
        if asked.of is None:
            call = ["quickstart", "--out", str(folder), "--family", asked.family, "--seed", asked.seed]
            subprocess.run([sys.executable, "-m", "tuoling", *call], check=True)
        done = json.loads((folder / "run" / "all_results.json").read_text(encoding="utf-8"))
        machine = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))["machine"]
    kinds = done["accuracy_by_kind"]
    for kind, share in kinds.items():
        print(f"| {kind} | {share['before']:.0%} | {share['after']:.0%} |")
    print(f"| **mean** | **{done['accuracy_before']:.0%}** | **{done['accuracy_after']:.0%}** |")
    print(f"{done['quickstart_seconds']:.0f} s, {machine['cores']} cores")
    if asked.write:
        keys = ("accuracy_before", "accuracy_after", "accuracy_by_kind", "quickstart_seconds")
        found = {**{key: done[key] for key in keys}, "machine": machine}
        path = Path(__file__).with_suffix(".json")
        path.write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
