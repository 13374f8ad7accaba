"""Rate of the data compiler against the bare tokenizer, on the same distinct rows, on all cores.

    python benchmarks/compile.py ROWS.json TOKENIZER_FOLDER [copies]

Rows are made distinct by a number in question and answer. Prints one JSON line: rows/s of `encode_batch_fast` on the
rendered texts alone, of the whole compile (read, check, render, tokenise, mask, hash, store), and their ratio; the
best of three rounds of each, taken in turns.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tuoling.data.read import read_rows
from tuoling.data.sources import Source
from tuoling.data.store import BATCH_ROWS, StoreSettings, compile_store
from tuoling.models.tokenizers import load_tokenizer
from tuoling.text.templates import get_template


def main(rows: str, tokenizer_folder: str, copies: int = 5) -> None:
    """Run and print."""
    tokenizer, template = load_tokenizer(tokenizer_folder, for_training=False), get_template("alpaca")
    folder = Path(tempfile.mkdtemp())
    file = folder / "rows.jsonl"
    originals = json.loads(Path(rows).read_text(encoding="utf-8"))
    with file.open("w", encoding="utf-8") as out:
        for copy in range(copies):
            for number, row in enumerate(originals):
                mark = f"{copy}.{number} "
                made = {**row, "instruction": mark + row["instruction"], "output": mark + row["output"]}
                out.write(json.dumps(made, ensure_ascii=False) + "\n")
    source = Source(str(file))
    texts = [
        "".join(segment.text for segment in template.render(row.conversation))
        for row in read_rows(source)
        if row.conversation
    ]
    bare, whole = [], []
    backend = tokenizer.hf.backend_tokenizer
    for round_ in range(3):
        start = time.perf_counter()
        for first in range(0, len(texts), BATCH_ROWS):
            backend.encode_batch_fast(texts[first : first + BATCH_ROWS], add_special_tokens=False)
        bare.append(len(texts) / (time.perf_counter() - start))
        store, report = compile_store(
            [source],
            tokenizer=tokenizer,
            template=template,
            settings=StoreSettings(max_seq_len=1 << 20),
            cache_dir=folder / str(round_),
        )
        whole.append(len(store) / report.seconds)
    shutil.rmtree(folder)
    result = {"rows": len(texts), "bare_rows_per_s": max(bare), "compile_rows_per_s": max(whole)}
    print(json.dumps({**result, "ratio": max(whole) / max(bare)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
