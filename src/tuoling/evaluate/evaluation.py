"""One call of `tuoling evaluate`: which models, which suite, which judge, where the results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling.errors import EndpointError, UsageError
from tuoling.evaluate import leaks
from tuoling.evaluate.answers import Log
from tuoling.evaluate.arena import Arena, require_two
from tuoling.evaluate.classes import BELLE_CLASSES
from tuoling.evaluate.forgetting import forgetting
from tuoling.evaluate.items import Items, read_items
from tuoling.evaluate.judge import GENERAL_PROMPT, Judge, default_prompts, read_prompts
from tuoling.evaluate.outcome import Outcome, read_scores
from tuoling.evaluate.sides import Contender, contenders, rival
from tuoling.evaluate.suites import open_answers
from tuoling.evaluate.suites.arithmetic import read_arithmetic, same_number
from tuoling.files import require_writable
from tuoling.infer.endpoint import Endpoint
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.infer.client import Client

SUITES = ("mine", "belle", "math", "choice", "lm-eval:TASK")
PROMPTS_BESIDE = "eval_prompt.json"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is asked for. model: a run, a model folder or a hub id. file: the suite's file or folder.

    load: options of opening a model (template, base, dtype, …). settings: generation settings the user changes.
    judge: where a judge answers. arena: it compares the sides, and those in `against`, in pairs. general: rows whose likelihood tells forgetting. out: else beside the run.
    """

    model: str
    suite: str = "mine"
    file: str | None = None
    judge: Endpoint | None = None
    judge_prompts: Path | None = None
    alone: bool = False
    arena: bool = False
    against: tuple[str, ...] = ()
    general: str | None = None
    class_column: str | None = None
    format: str | None = None
    columns: Mapping[str, str] | None = None
    limit: int | None = None
    shots: int = 0
    in_template: bool = False
    batch_size: int = 8
    load: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None

    @property
    def folder(self) -> Path:
        """RUN/evaluation/SUITE-FILE; ./evaluation/MODEL/SUITE-FILE for what is no run."""
        if self.out is not None:
            return self.out
        place = Path(self.model).expanduser()
        above = place if (place / "run.json").is_file() else None
        root = above / "evaluation" if above else Path("evaluation") / place.name
        kind = "arena" if self.arena else self.suite.replace(":", "-")
        return root / (f"{kind}-{Path(self.file).stem}" if self.file else kind)


@dataclass(slots=True)
class Result:
    """Where each suite's results lie, and the error that kept the last one from being whole."""

    folders: list[Path] = field(default_factory=list)
    failed: EndpointError | None = None

    def scores(self) -> list[dict[str, Any]]:
        """scores.json of each."""
        return [read_scores(folder) for folder in self.folders]


def evaluate(
    asked: Evaluation,
    *,
    progress: open_answers.Progress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Run the suite, then the general rows, and write the results. Raises TuolingError for bad input; a judge that
    fails half-way is `failed` in the result, whose files hold what there is."""
    _check(asked)
    sides, why = contenders(asked.model, alone=asked.alone, options=asked.load)
    if why:
        say(tr(f"no base beside it: {why}", f"没有基座对照：{why}"))
    sides += [rival(other, asked.load) for other in asked.against]
    if asked.arena:
        require_two(sides, asked.model)
    require_writable(asked.folder)
    result = Result()
    if asked.suite == "choice":
        from tuoling.evaluate.suites.choice import choice

        choice(asked, sides, progress=progress, say=say)
    elif asked.suite.startswith("lm-eval:"):
        from tuoling.evaluate.suites.lm_eval import lm_eval

        lm_eval(asked, sides, say=say)
    else:
        result.failed = _open_answers(asked, sides, progress, say)
    result.folders.append(asked.folder)
    if asked.general is not None and result.failed is None:
        items = read_items(asked.general, class_column=asked.class_column, limit=asked.limit)
        folder = asked.folder.parent / f"general-{Path(asked.general).stem}"
        forgetting(sides, items.items, asked.general, progress=progress).write(folder)
        result.folders.append(folder)
    return result


def _check(asked: Evaluation) -> None:
    """What can be said before a model is loaded."""
    known = asked.suite in SUITES or asked.suite.startswith("lm-eval:")
    if not known or asked.suite == "lm-eval:TASK":
        raise UsageError(
            tr(f"no suite is called {asked.suite}", f"没有名为 {asked.suite} 的评测"),
            remedy="--suite " + " | ".join(SUITES),
        )
    if asked.file is None and not asked.suite.startswith("lm-eval:"):
        hint = f"tuoling evaluate {asked.model} FILE --suite {asked.suite}"
        if asked.suite == "belle":
            hint += tr(
                "   (eval/eval_set.json of github.com/LianjiaTech/BELLE)",
                "   （github.com/LianjiaTech/BELLE 的 eval/eval_set.json）",
            )
        raise UsageError(
            tr(f"the suite {asked.suite} needs a file", f"{asked.suite} 评测需要一个文件"), remedy=hint
        )
    if asked.arena and asked.judge is None:
        raise UsageError(
            tr("an arena needs a judge", "两两比较需要裁判"),
            remedy=f"tuoling evaluate {asked.model} {asked.file} --arena --judge URL MODEL",
        )
    if asked.against and not asked.arena:
        raise UsageError(tr("--against is for --arena", "--against 只用于 --arena"), remedy="--arena")
    if asked.judge is not None:
        asked.judge.key()  # a missing key is said now
        if asked.suite not in ("mine", "belle"):
            raise UsageError(tr(f"--suite {asked.suite} asks no judge", f"--suite {asked.suite} 不使用裁判"))


def read_suite(asked: Evaluation) -> Items:
    """The items of a suite whose questions are answered in words."""
    if asked.file is None:
        raise UsageError(tr(f"the suite {asked.suite} needs a file", f"{asked.suite} 评测需要一个文件"))
    if asked.suite == "math":
        return read_arithmetic(asked.file, limit=asked.limit, class_column=asked.class_column)
    column = asked.class_column or ("class" if asked.suite == "belle" else None)
    return read_items(
        asked.file,
        class_column=column,
        format=asked.format,
        columns=asked.columns,
        limit=asked.limit,
        belle=asked.suite == "belle",
    )


def judge_of(asked: Evaluation, client: Client, say: Callable[[str], None]) -> Judge:
    """BELLE's prompts from the file given, or from the one beside the eval set; else our own for its classes."""
    path = asked.judge_prompts
    if path is None and asked.file is not None:
        beside = Path(asked.file).with_name(PROMPTS_BESIDE)
        path = beside if beside.is_file() else None
    prompts = read_prompts(path) if path is not None else default_prompts()
    said = str(path) if path is not None else tr("Tuoling's own", "驼铃自带")
    say(tr(f"judge prompts: {said}", f"评分提示：{said}"))
    if path is not None and asked.suite == "belle":
        missing = ", ".join(name for name in BELLE_CLASSES if name not in prompts)
        if missing:
            say(tr(f"no prompt for {missing}", f"没有这些类别的评分提示：{missing}"))
    return Judge(client, prompts, general=None if asked.suite == "belle" else GENERAL_PROMPT)


def _open_answers(
    asked: Evaluation,
    sides: list[Contender],
    progress: open_answers.Progress,
    say: Callable[[str], None],
) -> EndpointError | None:
    from tuoling.infer.client import Client

    items = read_suite(asked)
    plan = open_answers.Plan(
        "arena" if asked.arena else asked.suite, str(asked.file), items, sides, asked.folder
    )
    plan.settings, plan.batch_size, plan.progress, plan.say = asked.settings, asked.batch_size, progress, say
    if asked.suite == "math":
        plan.metrics = {"accuracy": same_number}
    client = Client(asked.judge) if asked.judge is not None else None
    try:
        if client is not None and asked.arena:
            plan.arena = _arena(asked, client, progress)
        elif client is not None:
            plan.judge = judge_of(asked, client, say)
        outcome, failed = open_answers.run(plan)
    finally:
        if client is not None:
            client.close()
        if plan.arena is not None:
            plan.arena.log.close()
    _leak_check(asked, outcome, say)
    outcome.write(asked.folder)
    for note in outcome.notes:
        say(str(note))
    return failed


def _arena(asked: Evaluation, client: Client, progress: open_answers.Progress) -> Arena:
    log = Log(asked.folder / open_answers.JUDGEMENTS)
    return Arena(client, log, lambda done, total: progress(tr("judge", "裁判"), done, total))


def _leak_check(asked: Evaluation, outcome: Outcome, say: Callable[[str], None]) -> None:
    run = leaks.run_record(asked.model)
    if run is None:
        return
    found = leaks.find_leaks(outcome.items, run)
    outcome.facts["leaks"] = found.to_json(outcome.items)
    say(str(found.words(len(outcome.items))))
