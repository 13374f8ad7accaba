"""Multiple choice questions from the files of C-Eval, CMMLU and AGIEval, or in the same shapes from anybody."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuoling.data.encoding import detect_encoding, missing_file, open_text
from tuoling.data.read import read_rows
from tuoling.data.sources import resolve_sources
from tuoling.errors import DataError, UsageError
from tuoling.evaluate.subjects import Collection
from tuoling.language import tr

LETTERS = "ABCDEFGHIJ"
SPLITS = ("dev", "val", "test")
ASKED = ("test", "val")
"""The split that is asked: the first of these whose rows have answers (C-Eval's test rows have none)."""
_SPLIT_END = re.compile(r"_(dev|val|test)$")


@dataclass(frozen=True, slots=True)
class Choice:
    """One question. text: what is shown before the answer. continuations: what may follow, each with its leading
    space. gold: indices of right ones (AGIEval may have several)."""

    place: str
    subject: str
    collection: Collection
    text: str
    continuations: tuple[str, ...]
    gold: frozenset[int]


@dataclass(slots=True)
class Choices:
    """Questions, examples by subject in the file's order, and rows that were left out (`place: why`)."""

    questions: list[Choice] = field(default_factory=list)
    examples: dict[str, list[Choice]] = field(default_factory=lambda: defaultdict(list))
    left_out: list[str] = field(default_factory=list)


def read_choices(path: str | Path, *, limit: int | None = None) -> Choices:
    """A folder by subject (dev, val, test below it, or `law_val.csv` beside `law_dev.csv`), or one CSV or JSONL file.

    limit: the first questions of each subject. Raises DataError where nothing has an answer.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise missing_file(str(place))
    by_split = _files(place)
    found = Choices()
    for file in by_split["dev"]:
        for choice in _read(file, found.left_out):
            found.examples[choice.subject].append(choice)
    for split in (*ASKED, ""):
        unanswered: list[str] = []
        seen: dict[str, int] = defaultdict(int)
        for file in by_split[split]:
            for choice in _read(file, unanswered):
                seen[choice.subject] += 1
                if limit is None or seen[choice.subject] <= limit:
                    found.questions.append(choice)
        if found.questions:
            found.left_out += unanswered
            return found
        found.left_out += unanswered[:5]
    raise DataError(
        tr("no multiple choice question with an answer", "没有带答案的选择题"),
        where=found.left_out[0] if found.left_out else str(place),
        remedy=tr(
            "CSV with question,A,B,C,D,answer, or JSONL with question, options (or A, B, …) and answer",
            "CSV 需有列 question,A,B,C,D,answer；JSONL 需有 question、options（或 A、B……）与 answer",
        ),
    )


def require_examples(found: Choices, shots: int) -> None:
    """Raise UsageError where a subject has fewer examples than are to be shown."""
    for subject in dict.fromkeys(choice.subject for choice in found.questions):
        there = len(found.examples.get(subject, ()))
        if there < shots:
            raise UsageError(
                tr(
                    f"{shots} examples are asked for, {subject} has {there}",
                    f"要求 {shots} 个示例，{subject} 只有 {there} 个",
                ),
                remedy=tr("they lie in dev/; or --shots 0", "示例应在 dev/ 目录；或用 --shots 0"),
            )


def _files(place: Path) -> dict[str, list[Path]]:
    """Data files by split; "" for those that say none. Of one file (or a split's own folder) dev stands beside it."""
    found: dict[str, list[Path]] = defaultdict(list)
    if place.is_dir() and place.name in ASKED:
        found[place.name] = _data_files(place)
        found["dev"] = _data_files(place.with_name("dev"))
        return found
    if place.is_dir():
        for file in _data_files(place):
            found[_split_of(file, place)].append(file)
        return found
    found[""] = [place]
    subject = _subject_of(place)
    beside = (place.with_name(f"{subject}_dev.csv"), place.parent.with_name("dev"))
    if beside[0].is_file() and beside[0] != place:
        found["dev"] = [beside[0]]
    elif place.parent.name in ASKED:
        found["dev"] = [file for file in _data_files(beside[1]) if _subject_of(file) == subject]
    return found


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".csv", ".jsonl", ".json"))


def _split_of(file: Path, root: Path) -> str:
    for part in file.relative_to(root).parts[:-1]:
        if part in SPLITS:
            return part
    ends = _SPLIT_END.search(file.stem)
    return ends[1] if ends else ""


def _subject_of(file: Path) -> str:
    return _SPLIT_END.sub("", file.stem)


def _read(file: Path, left_out: list[str]) -> Iterator[Choice]:
    for place, record in _csv_rows(file) if file.suffix.lower() == ".csv" else _json_rows(file):
        choice = _choice(place, record, _subject_of(file))
        if isinstance(choice, str):
            left_out.append(f"{place}: {choice}")
        else:
            yield choice


def _csv_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open_text(str(file), detect_encoding(str(file))) as opened:
        rows = csv.DictReader(opened)
        for record in rows:
            yield f"{file}:{rows.line_num}", record


def _json_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for source in resolve_sources([str(file)]):
        for row in read_rows(source):
            if isinstance(row.record, Mapping):
                yield str(row.place), row.record


def _choice(place: str, record: Mapping[str, Any], subject: str) -> Choice | str:
    """The question of a record, or why there is none."""
    if isinstance(record.get("choices"), list) and "gold" in record and "query" in record:
        return _agieval_hub(place, record, subject)
    if isinstance(record.get("options"), list) and "label" in record:
        return _agieval(place, record, subject)
    question = record.get("question", record.get("Question"))
    options = record.get("options", record.get("choices"))
    if not isinstance(options, list):
        options = [record[letter] for letter in LETTERS if record.get(letter) is not None]
    if not isinstance(question, str) or len(options) < 2:
        return tr("no question with options", "没有题目与选项")
    gold = _gold(record.get("answer", record.get("Answer")), options)
    if gold is None:
        return tr("no answer", "没有答案")
    collection: Collection = "cmmlu" if "Question" in record else "ceval" if "A" in record else "own"
    lines = [
        question.strip(),
        *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)),
    ]
    letters = tuple(f" {letter}" for letter in LETTERS[: len(options)])
    own = record.get("subject") if collection == "own" or record.get("subject") else None
    return Choice(
        place, str(own or subject), collection, "\n".join(lines) + "\n答案：", letters, frozenset((gold,))
    )


def _gold(answer: Any, options: Sequence[Any]) -> int | None:
    """The index of the right option: a letter, an index, or the option's own text."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(options) else None
    text = str(answer or "").strip()
    letter = text.strip("()（）.").upper()
    if len(letter) == 1 and letter in LETTERS[: len(options)]:
        return LETTERS.index(letter)
    return options.index(text) if text in options else None


def _agieval_hub(place: str, record: Mapping[str, Any], subject: str) -> Choice | str:
    """The form on the hub: a whole prompt, whole options, a list of right indices."""
    gold = record["gold"] if isinstance(record["gold"], list) else [record["gold"]]
    right = frozenset(int(index) for index in gold if str(index).isdigit())
    if not right:
        return tr("no answer", "没有答案")
    options = tuple(f" {option}" for option in record["choices"])
    return Choice(place, subject, "agieval", str(record["query"]), options, right)


def _agieval(place: str, record: Mapping[str, Any], subject: str) -> Choice | str:
    """The form of its own repository: passage, question, options `(A)…`, label; asked as the hub's prompts are."""
    options = [str(option) for option in record["options"]]
    label = record.get("label")
    labels = label if isinstance(label, list) else [label]
    right = frozenset(
        LETTERS.index(str(one)) for one in labels if str(one) in LETTERS[: len(options)] and one
    )
    if not right:
        return tr("no answer", "没有答案")
    passage = str(record.get("passage") or "")
    question, last = str(record.get("question") or ""), LETTERS[len(options) - 1]
    shown = " ".join(options)
    if any("一" <= char <= "鿿" for char in question + shown):
        text = f"{passage}问题：{question} 选项：{shown}\n答案：从A到{last}, 我们应选择"
    else:
        text = f"{passage}Q: {question} Answer Choices: {shown}\nA: Among A through {last}, the answer is"
    letters = tuple(f" {letter}" for letter in LETTERS[: len(options)])
    return Choice(place, subject, "agieval", text, letters, right)
