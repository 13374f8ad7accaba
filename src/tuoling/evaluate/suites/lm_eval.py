"""Tasks of lm-eval with our model: its own prompts, its own numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tuoling import files
from tuoling.errors import MissingPackage, ModelError, UsageError
from tuoling.evaluate.outcome import FORMAT_VERSION, SCORES
from tuoling.evaluate.sides import Contender
from tuoling.infer.engine import Engine
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.evaluate.evaluation import Evaluation


def lm_eval(asked: Evaluation, sides: Sequence[Contender], *, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the task on every side and write scores.json; FILE names a folder with tasks of the user's own.

    Raises MissingPackage without lm-eval, UsageError for a task it does not know.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingPackage("lm-eval", extra="lm-eval", purpose=asked.suite) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = asked.suite.partition(":")[2].split(",")
    manager = TaskManager(include_path=asked.file)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(
            tr(f"lm-eval has no task {', '.join(unknown)}", f"lm-eval 没有任务 {'、'.join(unknown)}"),
            remedy="lm-eval ls tasks",
        )
    results: dict[str, Mapping[str, Any]] = {}
    models: dict[str, dict[str, Any]] = {}
    for contender in sides:
        with contender.opened() as engine:
            say(f"lm-eval: {contender.name}")
            results[contender.name] = run_tasks(engine, tasks, manager, asked)
            models[contender.name] = {"model": contender.path, "engine": engine.name}
    scores = _scores(asked, models, results)
    files.write_json(asked.folder / SCORES, scores)
    return scores


def run_tasks(engine: Engine, tasks: Sequence[str], manager: Any, asked: Evaluation) -> dict[str, Any]:
    """lm-eval's `results` of one model. Raises ModelError for an engine that is not transformers'."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if engine.name != "torch":
        raise ModelError(tr("lm-eval needs a model folder", "lm-eval 需要模型目录"), where=engine.name)
    model, tokenizer = engine.model, engine.tokenizer.hf  # type: ignore[attr-defined]
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=asked.batch_size),
        tasks=list(tasks),
        num_fewshot=asked.shots or None,
        limit=asked.limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    return dict(found["results"]) if found else {}


def _scores(
    asked: Evaluation, models: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """lm-eval's numbers in the shape of scores.json: a task a class, no intervals of ours."""
    classes: dict[str, Any] = {}
    headline = ""
    for side, by_task in results.items():
        for task, numbers in by_task.items():
            entry = classes.setdefault(task, {"items": numbers.get("sample_len", 0), "metrics": {}})
            for name, value in numbers.items():
                metric = name.partition(",")[0]
                if isinstance(value, float) and not metric.endswith("_stderr"):
                    headline = headline or metric
                    entry["metrics"].setdefault(metric, {})[side] = {"mean": value}
    return {
        "format_version": FORMAT_VERSION,
        "suite": asked.suite,
        "file": asked.file,
        "headline": headline,
        "complete": True,
        "items": sum(entry["items"] or 0 for entry in classes.values()),
        "sides": dict(models),
        "overall": {},
        "classes": classes,
        "notes": [],
        "lm_eval": {name: dict(value) for name, value in results.items()},
    }
