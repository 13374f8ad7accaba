"""Rows compiled in shards: the same bytes in one process and in several, and after an interruption."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import sum_rows, tiny_tokenizer, write_rows

from tuoling.data import shard_pool, shards
from tuoling.data.json_stream import read_json_lines
from tuoling.data.read import read_rows
from tuoling.data.shards import cut_into_shards
from tuoling.data.sources import Source
from tuoling.data.store import StoreReport, StoreSettings, TokenStore, compile_store
from tuoling.errors import DataError, ModelError, TuolingError
from tuoling.files import MANIFEST, read_json
from tuoling.text.templates import get_template
from tuoling.text.tokenizer import TextTokenizer

TOKENIZER = TextTokenizer(tiny_tokenizer())


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    monkeypatch.setattr(shards, "SHARD_ROWS", 30)


def build(
    cache: Path, *files: Path, tokenizer: TextTokenizer = TOKENIZER, **more: Any
) -> tuple[TokenStore, StoreReport]:
    keys = {key: more.pop(key) for key in ("workers", "progress") if key in more}
    template = get_template(more.pop("template", "belle_v2"))
    sources = [Source(str(file)) for file in files]
    settings = StoreSettings(**more)
    return compile_store(
        sources, tokenizer=tokenizer, template=template, settings=settings, cache_dir=cache, **keys
    )


def hashes(store: TokenStore) -> dict[str, Any]:
    found: dict[str, Any] = read_json(store.path / MANIFEST)
    return found


def mixed_files(folder: Path) -> list[Path]:
    """JSON lines with blank lines, CRLF and bad rows; a JSON array; a byte order mark; two small files."""
    rows = sum_rows(300)
    body = []
    for number, row in enumerate(rows):
        body.append(json.dumps(row, ensure_ascii=False) + ("\r\n" if number % 3 else "\n"))
        if number % 50 == 7:
            body.append("\n")
        if number % 100 == 20:
            body.append('{"instruction": "问", "output": ""}\n')
        if number == 250:
            body.append('{"instruction" "broken"}\n')
    lines, array, marked = folder / "lines.jsonl", folder / "array.json", folder / "marked.jsonl"
    lines.write_bytes("".join(body).encode())
    array.write_text(json.dumps(rows[:70], ensure_ascii=False), encoding="utf-8")
    marked.write_bytes(b"\xef\xbb\xbf" + "".join(body[:40]).encode())
    small = [write_rows(folder / f"small-{n}.jsonl", sum_rows(5)) for n in range(2)]
    return [lines, *small, array, marked]


def test_shards_hold_every_line_once(tmp_path: Path) -> None:
    files = mixed_files(tmp_path)
    sources = [Source(str(file)) for file in files]
    found = list(cut_into_shards(sources, None))
    assert [shard.number for shard in found] == list(range(len(found))) and len(found) >= 20
    for file, path in enumerate(files):
        pieces = [piece for shard in found for piece in shard.pieces if piece.file == file]
        if pieces:
            assert [piece.begin for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
            assert pieces[-1].end == path.stat().st_size
            assert all(path.read_bytes()[piece.end - 1 : piece.end] == b"\n" for piece in pieces)
    records = [record for shard in found for record in shard.records]
    assert [number for _, number, _ in records] == list(range(1, 71))
    assert all(len(shard.records) <= 30 for shard in found)


@pytest.mark.slow
def test_one_process_and_two_make_the_same_bytes(tmp_path: Path) -> None:
    files = mixed_files(tmp_path)
    seen: list[int] = []
    one, said = build(tmp_path / "one", *files, workers=1, allow_bad=0.1)
    two, also = build(tmp_path / "two", *files, workers=2, allow_bad=0.1, progress=seen.append)
    assert hashes(one) == hashes(two) and len(hashes(one)) >= 20
    assert said.facts() == also.facts() and max(seen) == also.rows
    ledgers = [report.ledger.read_bytes() for report in (said, also) if report.ledger]
    assert ledgers[0] == ledgers[1]

    rows = [row for file in files for row in read_rows(Source(str(file)))]
    good = [row for row in rows if not row.problems]
    assert (said.rows, said.good, said.bad) == (len(rows), len(good), len(rows) - len(good)) and said.bad == 5
    template = get_template("belle_v2")
    for index in (0, 1, 60, 299, 300, 310, 333, len(good) - 1):
        assert good[index].conversation is not None
        ids, spans = TOKENIZER.encode_segments(template.render(good[index].conversation))
        assert two[index].input_ids.tolist() == ids
        assert two[index].spans.tolist() == [list(span) for span in spans]
        assert two.place(index) == str(good[index].place)
    entries = [json.loads(line) for line in ledgers[1].decode().splitlines()]
    bad = [row for row in rows if row.problems]
    assert [(e["path"], e["line"], e["row"]) for e in entries] == [
        (row.place.path, row.place.line, row.place.row) for row in bad
    ]


@pytest.mark.slow
def test_what_an_interrupted_build_finished_is_used(tmp_path: Path) -> None:
    files = mixed_files(tmp_path)
    straight, _ = build(tmp_path / "straight", *files, allow_bad=0.1)

    def stop(rows: int) -> None:
        if rows > 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", *files, allow_bad=0.1, progress=stop)
    (building,) = (tmp_path / "cache").glob(".*.building")
    parts = sorted(building.glob("tokens-*.bin"))
    assert len(parts) > 3
    written = {part.name: part.stat().st_mtime_ns for part in parts}
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[:-4] + b"\0\0\0\1")  # damaged since: is made again
    store, report = build(tmp_path / "cache", *files, allow_bad=0.1)
    assert hashes(store) == hashes(straight) and 100 < report.resumed < 150
    kept = {name for name, made in written.items() if (store.path / name).stat().st_mtime_ns == made}
    assert kept == {part.name for part in parts if part != parts[1]}
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [store.path.name]


@pytest.mark.slow
def test_a_killed_worker_is_told_and_what_it_finished_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = (
        "import os, signal, sys\n"
        "from tuoling.data import shard_worker\n"
        "compile = shard_worker.ShardCompiler.compile\n"
        "def dies(self, shard, progress):\n"
        "    if shard.number == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return compile(self, shard, progress)\n"
        "shard_worker.ShardCompiler.compile = dies\n"
        "shard_worker.main()\n"
    )
    file = write_rows(tmp_path / "rows.jsonl", sum_rows(200))
    with monkeypatch.context() as patch:
        patch.setattr(shard_pool, "WORKER", (sys.executable, "-c", killer))
        with pytest.raises(TuolingError, match=f"code -{int(signal.SIGKILL)}") as told:
            build(tmp_path / "cache", file, workers=1 + 1)
    assert "data_workers=1" in (told.value.remedy or "")
    _, report = build(tmp_path / "cache", file)
    assert report.resumed > 0 and report.rows == 200


@pytest.mark.slow
def test_the_first_wrong_format_of_the_rows_is_named_with_its_line(tmp_path: Path) -> None:
    rows = [*sum_rows(120), {"prompt": "问", "chosen": "好", "rejected": "坏"}, *sum_rows(30)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="`preference` are not trained") as caught:
        build(tmp_path / "cache", file)
    assert caught.value.where == f"{file}:121"
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_errors_come_from_workers_as_they_are(tmp_path: Path) -> None:
    hf = tiny_tokenizer()
    hf.eos_token = None
    file = write_rows(tmp_path / "rows.jsonl", sum_rows(100))
    packed = None
    try:
        build(tmp_path / "cache", file, tokenizer=TextTokenizer(hf))
    except TuolingError as error:
        packed = shard_pool.unpacked_error(_through_a_pipe(error))
    assert isinstance(packed, ModelError) and "no end token" in packed.problem and "eos_token" in str(packed)


def _through_a_pipe(error: TuolingError) -> Any:
    import pickle

    from tuoling.data.shard_worker import packed_error

    return pickle.loads(pickle.dumps(packed_error(error)))


def test_a_tokenizer_that_was_pickled_gives_the_same_ids() -> None:
    import pickle

    again = pickle.loads(pickle.dumps(TOKENIZER))
    template = get_template("chatml")
    for row in sum_rows(20):
        conversation = next(iter_conversations([row]))
        segments = template.render(conversation)
        assert again.encode_segments(segments) == TOKENIZER.encode_segments(segments)
    assert again.fingerprint() == TOKENIZER.fingerprint()


def iter_conversations(rows: list[dict[str, str]]) -> Any:
    from tuoling.data.formats.alpaca import FORMAT

    return (FORMAT.parse(row) for row in rows)


def test_many_rows_of_one_array_make_few_files() -> None:
    from tuoling.data.shards import _rows_of

    sizes = [_rows_of(number) for number in range(1000)]
    assert [sizes[number] for number in (0, 63, 64, 127, 128, 640, 999)] == [
        30,
        30,
        60,
        60,
        120,
        30720,
        30720,
    ]


def test_line_counts_hold_for_any_line_end(tmp_path: Path) -> None:
    data = b'{"a": 1}\r\n{"a": 2}\n\n{"a": 3}\r{"a": 4}\r\n'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with path.open(encoding="utf-8") as file:
        last = [number for number, *_ in read_json_lines(file)][-1]
    assert last == data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n") == 5
