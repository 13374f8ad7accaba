"""Rows to token store: what is kept, what is cut, what is refused, and that it is made only once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny import sum_rows, tiny_tokenizer, write_rows

from tuoling.data.overlong import smallest_limits, split_text
from tuoling.data.sources import Source
from tuoling.data.store import StoreReport, StoreSettings, TokenStore, compile_store
from tuoling.errors import DataError, ModelError
from tuoling.text.conversation import Conversation, Turn
from tuoling.text.templates import TEMPLATES, get_template
from tuoling.text.tokenizer import TextTokenizer

TOKENIZER = TextTokenizer(tiny_tokenizer())


def build(
    tmp_path: Path, rows: list[dict[str, Any]] | Path, template: str = "belle_v2", **settings: Any
) -> tuple[TokenStore, StoreReport]:
    file = rows if isinstance(rows, Path) else write_rows(tmp_path / "rows.jsonl", rows)
    return compile_store(
        [Source(str(file))],
        tokenizer=settings.pop("tokenizer", TOKENIZER),
        template=get_template(template),
        settings=StoreSettings(**settings),
        cache_dir=tmp_path / "cache",
    )


def text(store: TokenStore, index: int) -> str:
    return TOKENIZER.decode(store[index].input_ids.tolist(), keep_special=True)


def learned(store: TokenStore, index: int) -> list[str]:
    example = store[index]
    return [
        TOKENIZER.decode(example.input_ids[begin:end].tolist(), keep_special=True)
        for begin, end in example.spans.tolist()
    ]


def left_behind(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".jsonl"))


def dialogue(*turns: str) -> dict[str, Any]:
    roles = ("human", "assistant")
    return {"conversations": [{"from": roles[i % 2], "value": turn} for i, turn in enumerate(turns)]}


@pytest.mark.slow
def test_store_holds_what_the_template_renders(tmp_path: Path) -> None:
    rows = sum_rows(700)  # more than one batch
    store, report = build(tmp_path, rows, "domain_bloom")
    assert len(store) == report.rows == report.good == report.examples == 700
    for index in (0, 511, 512, 699):
        turns = (Turn("user", rows[index]["instruction"]), Turn("assistant", rows[index]["output"]))
        ids, spans = TOKENIZER.encode_segments(TEMPLATES["domain_bloom"].render(Conversation(turns)))
        assert store[index].input_ids.tolist() == ids
        assert store[index].spans.tolist() == [list(span) for span in spans]
        assert store.place(index) == f"{tmp_path / 'rows.jsonl'}:{index + 1}"
    assert report.tokens == store.lengths.sum() and report.learned_tokens == store.learned.sum()
    assert report.max_len == store.lengths.max()
    assert report.formats == {"alpaca": 700}
    with pytest.raises(IndexError):
        store[700]


def test_second_run_reuses_and_says_so(tmp_path: Path) -> None:
    first, made = build(tmp_path, sum_rows(5))
    again, reused = build(tmp_path, sum_rows(5))
    assert (made.reused, reused.reused) == (False, True)
    assert made.facts() == reused.facts()
    assert first.key == again.key and again[3].input_ids.tolist() == first[3].input_ids.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"rows": sum_rows(6)}, "files"),
        ({"template": "belle_apr"}, "template"),
        ({"max_seq_len": 999}, "settings"),
        ({"tokenizer": TextTokenizer(tiny_tokenizer(vocab_size=310))}, "tokenizer"),
    ],
)
def test_a_change_makes_a_new_store_and_is_named(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    build(tmp_path, sum_rows(5))
    _, report = build(tmp_path, change.pop("rows", sum_rows(5)), **change)
    assert not report.reused and report.changed == (part,)


@pytest.mark.slow
def test_a_damaged_store_is_made_again(tmp_path: Path) -> None:
    store, _ = build(tmp_path, sum_rows(5))
    file = store.path / "tokens-00000.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\0\1")
    again, report = build(tmp_path, sum_rows(5))
    assert not report.reused and (again.path / "tokens-00000.bin").read_bytes() == whole


@pytest.mark.slow
def test_two_processes_may_build_the_same_store(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", sum_rows(5))
    given = {
        "tokenizer": TOKENIZER,
        "template": get_template("alpaca"),
        "settings": StoreSettings(),
        "cache_dir": tmp_path / "cache",
    }
    faster: list[TokenStore] = []

    def other_process(_: int) -> None:
        faster.append(compile_store([Source(str(file))], **given)[0])

    store, report = compile_store([Source(str(file))], **given, progress=other_process)
    assert store.path == faster[0].path and report.good == 5
    assert store[4].input_ids.tolist() == faster[0][4].input_ids.tolist()
    assert len(left_behind(tmp_path)) == 1


def test_moved_file_is_reused_under_its_new_place(tmp_path: Path) -> None:
    build(tmp_path, sum_rows(5))
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "rows.jsonl").rename(moved)
    store, report = build(tmp_path, moved)
    assert report.reused and store.place(0) == f"{moved}:1"


def test_overlong_rows_are_an_error_with_the_numbers(tmp_path: Path) -> None:
    rows = [{"instruction": "问", "output": "a" * n} for n in range(1, 101)]
    lengths = build(tmp_path, rows)[0].lengths
    limit = int(lengths.max()) - 3
    with pytest.raises(DataError, match=rf"3 of 100 rows are longer than max_seq_len={limit}") as caught:
        build(tmp_path, rows, max_seq_len=limit)
    keep = smallest_limits(lengths)
    assert keep == {100: lengths.max(), 99: np.sort(lengths)[98], 95: np.sort(lengths)[94]}
    for share, kept in keep.items():
        assert (lengths <= kept).mean() >= share / 100 > (lengths <= kept - 1).mean()
        assert f"max_seq_len={kept}" in (caught.value.remedy or "") or share < 100
    assert str(keep[95]) in (caught.value.remedy or "")
    assert "#" in caught.value.problem  # the histogram
    assert len(left_behind(tmp_path)) == 1  # the good store of the first line only


@pytest.mark.parametrize("policy", ["error", "drop", "cut_prompt", "split"])
def test_max_seq_len_shorter_than_every_prompt(tmp_path: Path, policy: str) -> None:
    with pytest.raises(DataError, match="max_seq_len=8 is shorter than every row"):
        build(tmp_path, sum_rows(5), max_seq_len=8, overlong=policy)
    assert left_behind(tmp_path) == []


def test_drop_counts(tmp_path: Path) -> None:
    rows = [{"instruction": "问", "output": "短"}, {"instruction": "问" * 100, "output": "短"}]
    store, report = build(tmp_path, rows, max_seq_len=64, overlong="drop")
    assert (len(store), report.good, report.dropped_overlong) == (1, 2, 1)


@pytest.mark.slow
def test_cut_prompt_drops_oldest_turns_first(tmp_path: Path) -> None:
    rows = [dialogue("甲" * 40, "乙", "丙", "丁")]
    store, report = build(tmp_path, rows, max_seq_len=64, overlong="cut_prompt")
    assert text(store, 0) == "Human: \n丙\n\nAssistant: \n丁</s>"
    assert report.cut == 1


def test_cut_prompt_cuts_context_then_question_from_the_left(tmp_path: Path) -> None:
    rows = [
        {"instruction": "说明", "input": "材料" * 60 + "尾", "output": "答案"},
        {"instruction": "问" * 90 + "尾", "input": "料", "output": "答案"},
    ]
    store, report = build(tmp_path, rows, "belle_v2", max_seq_len=80, overlong="cut_prompt")
    first, second = text(store, 0), text(store, 1)
    assert first.startswith("Human: \n说明") and "尾\n\nAssistant: \n答案</s>" in first
    assert second.startswith("Human: \n问") and second.endswith("尾\n\nAssistant: \n答案</s>")
    assert report.cut == 2
    for index in (0, 1):
        assert 75 <= store.lengths[index] <= 80  # as much as fits is kept
        assert learned(store, index) == ["答案</s>"]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["cut_prompt", "split"])
def test_a_cut_answer_has_no_end_token_and_is_not_learned(tmp_path: Path, policy: str) -> None:
    rows = [{"instruction": "问", "output": "答" * 80}, {"instruction": "问", "output": "短"}]
    store, report = build(tmp_path, rows, max_seq_len=60, overlong=policy)
    assert (len(store), report.dropped_overlong) == (1, 1)
    store, report = build(tmp_path, rows, max_seq_len=60, overlong=policy, learn_cut_answers=True)
    assert len(store) == 2 and store.lengths[0] == 60
    assert "</s>" not in text(store, 0) and set(learned(store, 0)[0]) <= {"答", "\ufffd"}
    assert learned(store, 1) == ["短</s>"]


@pytest.mark.slow
def test_a_cut_answer_has_no_part_of_a_spelled_end_mark(tmp_path: Path) -> None:
    rows = [{"instruction": "问", "output": "a" * n} for n in range(1, 60)]
    whole, _ = build(tmp_path, rows, "chatml")  # the tokenizer spells <|im_end|> in several tokens
    limit = int(np.median(whole.lengths))
    store, report = build(
        tmp_path, rows, "chatml", max_seq_len=limit, overlong="split", learn_cut_answers=True
    )
    said = [learned(store, index)[0] for index in range(len(store))]
    fits = int((whole.lengths <= limit).sum())
    assert report.split == 59 - fits
    assert sum(one.endswith("a<|im_end|>") for one in said) == fits
    assert sum(set(one) == {"a"} for one in said) == 59 - fits


def test_split_cuts_a_dialogue_between_turns(tmp_path: Path) -> None:
    turns = [part for n in range(6) for part in (f"问{n}", f"答{n}")]
    store, report = build(tmp_path, [dialogue(*turns)], max_seq_len=70, overlong="split")
    assert report.split == 1 and len(store) > 1
    assert [one for index in range(len(store)) for one in learned(store, index)] == [
        f"答{n}</s>" for n in range(6)
    ]
    assert all(length <= 70 for length in store.lengths)
    assert all(text(store, index).startswith("Human: \n问") for index in range(len(store)))


def test_split_counts_the_turns_it_leaves_out(tmp_path: Path) -> None:
    turns = ["问0", "答0", "问1", "答" * 80, "问2", "答2"]
    store, report = build(tmp_path, [dialogue(*turns)], max_seq_len=70, overlong="split")
    assert [one for index in range(len(store)) for one in learned(store, index)] == ["答0</s>", "答2</s>"]
    assert (report.split, report.left_out, report.dropped_overlong) == (1, 1, 0)


def test_only_bad_rows_left_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row is left") as caught:
        build(tmp_path, [{"instruction": "问", "output": ""}], allow_bad=1.0)
    assert "rows.jsonl:1:output" in caught.value.problem


def test_split_with_learn_last_keeps_the_end(tmp_path: Path) -> None:
    turns = [part for n in range(6) for part in (f"问{n}", f"答{n}")]
    store, _ = build(tmp_path, [dialogue(*turns)], max_seq_len=70, overlong="split", learn="last")
    assert len(store) == 1 and learned(store, 0) == ["答5</s>"]
    assert "问4" in text(store, 0)


def test_plain_text_is_split_and_learned_whole(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    body = "今天天气很好，我们去公园。" * 8
    file.write_text(json.dumps({"text": body}, ensure_ascii=False) + "\n", encoding="utf-8")
    store, report = build(tmp_path, file, "empty", stage="pt", max_seq_len=50)
    assert report.split == 1
    ids = [token for index in range(len(store)) for token in store[index].input_ids.tolist()]
    assert TOKENIZER.decode(ids, keep_special=True) == body + "</s>"
    assert store.learned.tolist() == (store.lengths - 1).tolist()  # all but each first token


@pytest.mark.parametrize("count", range(1, 40))
def test_pieces_of_text_fit_and_can_be_learned(count: int) -> None:
    pieces = list(split_text(list(range(count)), 6))
    assert [token for ids, _ in pieces for token in ids] == list(range(count))
    assert all(len(ids) <= 6 and (spans or count == 1) for ids, spans in pieces)


@pytest.mark.slow
def test_stage_and_rows_must_agree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 2 rows are bad") as caught:
        build(tmp_path, sum_rows(2), stage="pt")
    assert "stage pt learns plain text" in caught.value.problem
    with pytest.raises(DataError, match="only stage=pt"):
        build(tmp_path, [{"text": "纯文本"}])


@pytest.mark.slow
def test_bad_rows_are_named_and_the_ledger_holds_all(tmp_path: Path) -> None:
    rows = [*sum_rows(8), {"instruction": "问", "output": ""}, {"instruction": "问", "output": ["x"]}]
    with pytest.raises(DataError, match="2 of 10 rows are bad") as caught:
        build(tmp_path, rows)
    assert f"{tmp_path / 'rows.jsonl'}:9:output: " in caught.value.problem
    assert "allow_bad=20%" in (caught.value.remedy or "")
    ledger = Path(caught.value.where or "")
    entries = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    assert [entry["line"] for entry in entries] == [9, 10]
    assert left_behind(tmp_path) == []
    store, report = build(tmp_path, rows, allow_bad=0.2)
    assert (len(store), report.bad, report.good) == (8, 2, 8)
    assert report.ledger is not None and report.ledger.exists()
    _, again = build(tmp_path, rows, allow_bad=0.2)
    assert again.reused and again.bad == 2 and again.ledger == report.ledger


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"input": "问", "predict": "答", "target": "目标"}, "predictions"),
        ({"prompt": "问", "chosen": "好", "rejected": "坏"}, "preference"),
    ],
)
def test_formats_that_are_not_trained_are_named(tmp_path: Path, row: dict[str, str], name: str) -> None:
    with pytest.raises(DataError, match=f"`{name}` are not trained") as caught:
        build(tmp_path, [row])
    assert name in (caught.value.remedy or "") and ":1" in (caught.value.where or "")


@pytest.mark.slow
def test_max_samples_takes_the_first(tmp_path: Path) -> None:
    store, report = build(tmp_path, sum_rows(20), max_samples=3)
    assert len(store) == report.rows == 3


def test_nothing_to_learn_is_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        build(tmp_path, [{"instruction": "问", "output": "  "}])


def test_empty_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        build(tmp_path, tmp_path / "nowhere.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError):
        build(tmp_path, empty)
    assert left_behind(tmp_path) == []


def test_no_end_token_leaves_nothing_behind(tmp_path: Path) -> None:
    hf = tiny_tokenizer()
    hf.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        build(tmp_path, sum_rows(3), tokenizer=TextTokenizer(hf))
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_real_rows(tmp_path: Path, shared_data: Path) -> None:
    """domain-bloom's 1,666 rows at its own 512: 317 do not fit, and the error says what would."""
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"  # gpt-neox begins and ends texts with it
    file = shared_data / "tokenizers" / "gpt-neox-20b" / "20B_tokenizer.json"
    hf = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=end, eos_token=end)
    tokenizer = TextTokenizer(hf)
    file = shared_data / "domain" / "domain.train.json"
    with pytest.raises(DataError, match=r"317 of 1666 rows are longer than max_seq_len=512") as caught:
        build(tmp_path, file, "domain_bloom", tokenizer=tokenizer, max_seq_len=512)
    assert "keeps all rows" in (caught.value.remedy or "")
    store, report = build(tmp_path, file, "domain_bloom", tokenizer=tokenizer, max_seq_len=2048)
    assert len(store) == report.good == 1666 and report.bad == 0


def test_leaving_out_every_row_is_no_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        build(tmp_path, [{"text": "从前有座山"}, {"text": "山里有座庙"}])
    assert "stage=pt" in caught.value.problem and "rows.jsonl:1: " in caught.value.problem
    assert "allow_bad" not in (caught.value.remedy or "")
