"""Rows that begin another row are found, exactly those, and what is learned is the same multiset of predictions."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_tokenizer, write_rows

from tuoling.data import prefixes
from tuoling.data.pack import collate
from tuoling.data.prefixes import share_prefixes
from tuoling.data.sources import Source
from tuoling.data.store import StoreSettings, compile_store
from tuoling.data.token_store import Example, ShardWriter, TokenStore, join_columns, write_meta
from tuoling.text.templates import get_template
from tuoling.text.tokenizer import TextTokenizer

Row = tuple[list[int], list[tuple[int, int]]]


def store_of(folder: Path, rows: Sequence[Row]) -> TokenStore:
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, 0) as writer:
        for line, (ids, spans) in enumerate(rows):
            writer.add(ids, spans, 0, line + 1)
        writer.finish(array("i"))
    join_columns(folder, [{}])
    write_meta(folder, {"key": "k", "paths": ["rows.jsonl"]})
    return TokenStore(folder)


def predictions(examples: Sequence[Example]) -> Counter[tuple[tuple[int, ...], int]]:
    """(everything read so far, the token to predict), as often as it is in the batch: all that a causal loss sees."""
    batch = collate(examples)
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    pairs = [(t, label) for t, label in enumerate(batch.labels.tolist()) if label != -100]
    pairs += [] if batch.extra_labels is None else [(t, label) for t, label in batch.extra_labels.tolist()]
    for t, label in pairs:
        start = t - int(batch.position_ids[t])
        found[tuple(batch.input_ids[start : t + 1].tolist()), label] += 1
    assert sum(found.values()) == batch.num_learned
    return found


def search(store: TokenStore, rows: Sequence[int]) -> dict[int, int]:
    """Row → the row it is learned in, by comparing every row with every other."""
    reads = {row: int(store[row].spans[-1, 1]) - 1 for row in rows}
    found = {}
    for row in rows:
        ids = store[row].input_ids[: reads[row]].tolist()
        hosts = [o for o in rows if reads[o] >= len(ids) and store[o].input_ids[: len(ids)].tolist() == ids]
        found[row] = min(hosts, key=lambda other: (-reads[other], other))
    return found


def assert_right(store: TokenStore, rows: Sequence[int]) -> int:
    """Against the search; returns how many rows begin another."""
    shared = share_prefixes(store, np.array(rows, dtype=np.int64))
    host_of = {
        int(row): int(host)
        for number, host in enumerate(shared.hosts.tolist())
        for row in [host, *shared.members_of(number).tolist()]
    }
    assert host_of == search(store, rows)
    assert shared.hosts.tolist() == sorted(shared.hosts.tolist())
    merged = [shared.example(store, number) for number in range(len(shared.hosts))]
    assert predictions(merged) == predictions([store[row] for row in rows])
    assert [collate([example]).num_learned for example in merged] == shared.learned(store).tolist()
    return len(shared.members)


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    """Rows over two or three ids, so that many begin alike; spans anywhere after the first token."""
    made: list[Row] = []
    for _ in range(draw(st.integers(1, 25))):
        ids = draw(st.lists(st.integers(0, draw(st.integers(1, 2))), min_size=2, max_size=9))
        cuts = draw(st.lists(st.integers(1, len(ids)), min_size=2, max_size=4, unique=True))
        cuts = sorted(cuts)[: len(cuts) // 2 * 2]
        made.append((ids, list(zip(cuts[::2], cuts[1::2], strict=True))))
    return made


@pytest.mark.slow
@given(rows(), st.data())
@settings(max_examples=150, deadline=None)
def test_random_rows_against_a_search_of_all_pairs(made: list[Row], data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        store = store_of(Path(folder) / "store", made)
        kept = data.draw(st.sets(st.sampled_from(range(len(made))), min_size=1))
        assert_right(store, range(len(made)))
        assert_right(store, sorted(kept))


def test_chunks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    made = []
    for _ in range(120):
        ids = draw.integers(0, 2, draw.integers(2, 12)).tolist()
        made.append((ids, [(len(ids) - 1, len(ids))]))
    store = store_of(tmp_path, made)
    whole = share_prefixes(store, np.arange(120))
    assert len(whole.members) > 60
    for size in (1, 7, 64):
        monkeypatch.setattr(prefixes, "_CHUNK_TOKENS", size)
        found = share_prefixes(store, np.arange(120))
        assert (
            found.hosts.tolist() == whole.hosts.tolist() and found.members.tolist() == whole.members.tolist()
        )


def test_equal_hashes_are_not_equal_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, [([1, 2, 3, 4], [(2, 4)]), ([1, 5, 3], [(2, 3)]), ([1, 2, 9], [(2, 3)])])
    monkeypatch.setattr(prefixes, "splitmix64", np.zeros_like)
    shared = share_prefixes(store, np.arange(3))
    assert shared.hosts.tolist() == [0, 1] and shared.members.tolist() == [2]


def test_an_end_token_that_the_longer_row_does_not_have(tmp_path: Path) -> None:
    """Only the longer row's last reply is followed by an end token (2); both rows keep theirs."""
    store = store_of(tmp_path, [([5, 6, 2], [(1, 3)]), ([5, 6, 7, 8, 2], [(3, 5)])])
    shared = share_prefixes(store, np.arange(2))
    batch = collate([shared.example(store, 0)])
    assert shared.hosts.tolist() == [1] and batch.extra_labels is None
    assert batch.labels.tolist() == [6, 2, 8, 2, -100] and batch.num_learned == 4


def test_a_token_learned_by_both_rows_counts_twice(tmp_path: Path) -> None:
    store = store_of(tmp_path, [([5, 6, 2], [(1, 3)]), ([5, 6, 7, 8, 2], [(1, 2), (3, 5)])])
    batch = collate([share_prefixes(store, np.arange(2)).example(store, 0)])
    assert batch.labels.tolist() == [6, 2, 8, 2, -100] and batch.num_learned == 5
    assert batch.extra_labels is not None and batch.extra_labels.tolist() == [[0, 6]]


def test_no_rows(tmp_path: Path) -> None:
    store = store_of(tmp_path, [([1, 2], [(1, 2)])])
    shared = share_prefixes(store, np.arange(0))
    assert len(shared.hosts) == len(shared.members) == len(shared.learned(store)) == 0


def unfolded(turns: Sequence[str]) -> list[dict[str, str]]:
    """BELLE multiturn_chat_0.8M's shape: for each answer one row, with the dialogue so far as its instruction."""
    made, so_far = [], ""
    for question, answer in zip(turns[::2], turns[1::2], strict=False):
        so_far += f"Human:{question}\nAssistant:"
        made.append({"instruction": so_far, "input": "", "output": answer})
        so_far += f"{answer}\n"
    return made


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["last", "all"])
@pytest.mark.parametrize("template", ["domain_bloom", "belle_multiturn_rows", "vicuna_chat", "lf/chatml"])
def test_real_dialogues_in_belles_shape(tmp_path: Path, shared_data: Path, template: str, learn: Any) -> None:
    with (shared_data / "dialogue" / "smile_1500.jsonl").open(encoding="utf-8") as lines:
        dialogues = [json.loads(line)["messages"] for _, line in zip(range(12), lines, strict=False)]
    made = [row for d in dialogues for row in unfolded([turn["content"][:40].strip() for turn in d[:10]])]
    store, report = compile_store(
        [Source(str(write_rows(tmp_path / "rows.jsonl", made)))],
        tokenizer=TextTokenizer(tiny_tokenizer()),
        template=get_template(template),
        settings=StoreSettings(max_seq_len=4096, learn=learn),
        cache_dir=tmp_path / "cache",
    )
    assert report.formats == {"belle_multiturn": len(made)}
    assert assert_right(store, range(len(store))) >= len(made) - len(dialogues)
