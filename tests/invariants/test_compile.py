"""Compiling the same rows twice gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import sum_rows, tiny_tokenizer, write_rows

from tuoling.data.sources import Source
from tuoling.data.store import StoreSettings, compile_store
from tuoling.files import MANIFEST
from tuoling.text.templates import TEMPLATES
from tuoling.text.tokenizer import TextTokenizer


@pytest.mark.slow
def test_two_builds_have_the_same_hash(tmp_path: Path) -> None:
    rows = [*sum_rows(600), {"instruction": "坏", "output": ""}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    manifests, keys = [], []
    for cache in ("one", "two"):
        store, report = compile_store(
            [Source(f"{file}"), Source(f"{file}", sample=50)],
            tokenizer=TextTokenizer(tiny_tokenizer()),
            template=TEMPLATES["alpaca"],
            settings=StoreSettings(allow_bad=0.01),
            cache_dir=tmp_path / cache,
        )
        assert not report.reused
        manifests.append((store.path / MANIFEST).read_bytes())
        keys.append(store.key)
    assert manifests[0] == manifests[1] and keys[0] == keys[1]
