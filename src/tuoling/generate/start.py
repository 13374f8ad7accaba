"""From what the user asks for to a job: its task, its place, who answers, and what went in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tuoling.errors import UsageError
from tuoling.files import read_json, require_writable, sha256_file, write_json
from tuoling.generate import self_cognition
from tuoling.generate.augment import Augment, How
from tuoling.generate.book import ROWS
from tuoling.generate.domain import PERSONA, Domain
from tuoling.generate.from_text import LONGEST_PASSAGE, FromText
from tuoling.generate.request import Task
from tuoling.generate.seeds import Seeds, read_passages, read_seeds
from tuoling.generate.self_instruct import SelfInstruct
from tuoling.language import tr
from tuoling.models import licence
from tuoling.models.licence import Part

if TYPE_CHECKING:
    from tuoling.generate.asker import Asker
    from tuoling.generate.job import Job
    from tuoling.models.source import ModelSource

GENERATION = "generation.json"
"""{"order": what was asked for, "result": Tally}: a job is gone on with only by the same order."""

TASKS = ("self-instruct", "domain", "self-cognition", "augment", "from-text")
PER_CALL = {"self-instruct": 8, "domain": 2, "augment": 2, "from-text": 3}
"""Items asked for in a request."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be made of what. new: domain asks for new questions, not only for answers."""

    task: str
    seeds: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    persona: str = PERSONA
    how: How = "paraphrase"
    per_call: int | None = None
    new: bool = True
    seed: int = 0
    skip_bad: bool = False
    passage: int = LONGEST_PASSAGE
    options: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UsageError(
                tr(f"no such kind: {self.task}", f"没有这种生成方式：{self.task}"), remedy=", ".join(TASKS)
            )
        if self.how not in get_args(How):
            raise UsageError(f"--how {self.how}", remedy=", ".join(get_args(How)))
        if not self.seeds and self.task not in ("self-cognition",):
            raise UsageError(
                tr(f"{self.task} needs --seeds", f"{self.task} 需要 --seeds"),
                remedy=tr("seed tasks, questions, rows or documents", "种子任务、问题、数据或文档"),
            )

    @property
    def files(self) -> tuple[str, ...]:
        """Everything that the rows are made from."""
        return (*self.seeds, *self.questions)

    def identity(self) -> dict[str, Any]:
        """What may not change between the runs of a job: the task, its texts and its draws."""
        names = ("task", "how", "persona", "seed", "per_call", "passage", "values")
        own = {name: value for name, value in asdict(self).items() if name in names}
        return {**own, "files": {path: _content(Path(path)) for path in (*self.files, *self.answered)}}


def _content(path: Path) -> str:
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        return ",".join(sha256_file(file)[:16] for file in inside)
    return sha256_file(path)[:16] if path.is_file() else ""


def make_task(order: Order) -> tuple[Task, tuple[str, ...]]:
    """The task and `place: why` of seeds left out. Raises DataError where the seeds cannot be used."""
    per_call = order.per_call or PER_CALL[order.task]
    options = dict(order.options)
    if order.task == "from-text":
        return FromText(read_passages(order.seeds, order.passage), per_call=per_call, options=options), ()
    answered = order.task in ("self-instruct", "augment")
    read = read_seeds(order.seeds, answered=answered, skip_bad=order.skip_bad)
    if order.task == "self-instruct":
        against = _instructions(order.against)
        task: Task = SelfInstruct(
            read.seeds, per_call=per_call, seed=order.seed, options=options, known=against
        )
        return task, read.bad
    if order.task == "augment":
        return Augment(read.seeds, order.how, per_call=per_call, options=options), read.bad
    questions = (
        read_seeds(order.questions, answered=False, skip_bad=order.skip_bad) if order.questions else Seeds(())
    )
    task = Domain(
        read.seeds,
        questions=questions.seeds,
        answered=_instructions((*order.answered, *order.against)),
        persona=order.persona,
        per_call=per_call,
        new=order.new,
        seed=order.seed,
        options=options,
    )
    return task, (*read.bad, *questions.bad)


def _instructions(specs: Sequence[str]) -> list[str]:
    return (
        [one.instruction for one in read_seeds(specs, answered=False, skip_bad=True).seeds] if specs else []
    )


# -- the folder ---------------------------------------------------------------------------------------------------


def claim(folder: Path, order: Order) -> bool:
    """Make the folder this order's own; True where the job was begun before.

    Raises UsageError where it holds another job, or something else.
    """
    file = folder / GENERATION
    identity = order.identity()
    if not file.is_file():
        if folder.is_dir() and (folder / ROWS).exists():
            raise UsageError(
                tr(f"there is a {ROWS} that no job here made", f"已有 {ROWS}，但不是这里的任务生成的"),
                where=str(folder),
                remedy=tr("choose another --out", "换一个 --out"),
            )
        require_writable(folder)
        write_json(file, {"order": identity})
        return False
    there = read_json(file).get("order", {})
    changed = [name for name in identity if there.get(name) != identity[name]]
    if changed:
        raise UsageError(
            tr(
                f"this folder holds another job: {', '.join(changed)} differ",
                f"该目录里是另一个任务：{'、'.join(changed)} 不同",
            ),
            where=str(file),
            remedy=tr(
                "the same call goes on with it; choose another --out",
                "用原来的命令可接着做；否则换一个 --out",
            ),
        )
    return True


def record(folder: Path, order: Order, result: dict[str, Any]) -> None:
    """What came of it, beside the rows."""
    write_json(folder / GENERATION, {"order": order.identity(), "result": result})


# -- who answers, and what went in -------------------------------------------------------------------------------------------------


def opener_of(who: tuple[str, str | None, dict[str, Any]] | str) -> tuple[Any, tuple[Part, ...]]:
    """What makes an asker of a log, and the parts of the generator. Raises UsageError without a key."""
    if isinstance(who, str):
        from tuoling.models.source import find_model

        def own(job: Job) -> Asker:
            from tuoling.generate.asker import EngineAsker
            from tuoling.infer.open_engine import open_engine

            return EngineAsker(open_engine(who), job.log)

        return own, generator_of_model(find_model(who))
    from tuoling.infer.endpoint import Endpoint

    url, model, asked = who
    if model is None:
        raise UsageError(tr("--endpoint needs --model", "--endpoint 需要 --model"), remedy="--model NAME")
    place = Endpoint(url, model, **asked)
    place.key()

    def remote(job: Job) -> Asker:
        from tuoling.generate.asker import EndpointAsker

        return EndpointAsker(place, job.log)

    return remote, generator_of_endpoint(url, model)


def generator_of_endpoint(url: str, model: str) -> tuple[Part, ...]:
    return (licence.of_generator(model, url),)


def generator_of_model(source: ModelSource) -> tuple[Part, ...]:
    """Everything in the model that answers: of each part its licence's word on outputs counts."""
    return tuple(replace(part, kind="generator") for part in licence.of_model(source))


def lineage(order: Order, generator: Sequence[Part], said: Mapping[str, str]) -> tuple[Part, ...]:
    """What goes into the rows. said: the user's own word, as for `tuoling licence`."""
    files = [part for path in order.files for part in _parts_of(path)]
    if order.task == "self-cognition" and not order.seeds:
        files.append(Part("data", "tuoling: self-cognition rows", ("apache-2.0",), "card", "tuoling"))
    return licence.as_said(licence.union(generator, files), said, "--licence")


def _parts_of(path: str) -> tuple[Part, ...]:
    return licence.of_folder(Path(path), path) if Path(path).is_dir() else licence.of_data(path)


def licence_words(parts: Sequence[Part]) -> list[str]:
    """The licences of the generator, for each row; `unknown` where nobody says one."""
    own = [part for part in parts if part.kind == "generator"]
    return list(dict.fromkeys(one for part in own for one in (part.licences or ("unknown",)))) or ["none"]


def fill_in(order: Order) -> tuple[list[dict[str, Any]], dict[str, int], tuple[str, ...]]:
    """self-cognition: rows, rejected by reason, and bad seeds."""
    from tuoling.generate.filters import placeholder

    read = read_seeds(order.seeds, answered=True, skip_bad=order.skip_bad) if order.seeds else None
    rows, rejected = [], {"placeholder": 0}
    for candidate in self_cognition.rows(read.seeds if read else None, order.values):
        if any(placeholder(text) for text in candidate.row.values()):
            rejected["placeholder"] += 1
            continue
        rows.append({**candidate.row, "provenance": {"task": order.task, **candidate.about}})
    return rows, {name: count for name, count in rejected.items() if count}, read.bad if read else ()
