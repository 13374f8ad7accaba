"""Train on a quarter, a half and all of the rows, evaluate each run, and say what more rows bring, class by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import files
from tuoling.data.read import read_rows
from tuoling.data.sources import resolve_sources
from tuoling.errors import UsageError
from tuoling.evaluate.compare import Comparison, compare
from tuoling.evaluate.evaluation import Evaluation, evaluate
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.config_keys import RunConfig

SHARES = (0.25, 0.5, 1.0)


def data_size_study(
    config: RunConfig,
    asked: Evaluation,
    train: Callable[[RunConfig], Any],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Train `config` on each share of its rows below its output_dir, evaluate, compare.

    asked: the evaluation of one run, its `model` filled in here. train: trains one config. Runs that are finished and
    were trained on the same rows are used as they are. Smaller shares are seeded samples of each file (`rows.json#500`),
    each within the next larger one.
    """
    if not config.data:
        raise UsageError(
            tr("a study needs files: data", "数据量研究需要 data 指定的文件"), remedy="--data rows.json"
        )
    root = Path(str(config.output_dir))
    counts = [(spec, _count(spec, config)) for spec in config.data]
    runs = []
    for share in sorted(config.data_shares or SHARES):
        run = root / f"{100 * share:g}"
        data = [_part(spec, count, share) for spec, count in counts]
        say(f"{100 * share:g} %: {', '.join(data)} → {run}")
        if not _is_done(run, data):
            train(
                config.model_copy(update={"data": tuple(data), "output_dir": str(run), "data_shares": None})
            )
        result = evaluate(replace(asked, model=str(run)), say=say)
        if result.failed is not None:
            raise result.failed
        runs.append(run)
    first = replace(asked, model=str(runs[0])).folder.name
    return compare(runs, suite=first, out=root)


def _count(spec: str, config: RunConfig) -> int:
    sources = resolve_sources([str(spec)], format=config.data_format, columns=config.columns)
    return sum(1 for source in sources for _ in read_rows(source))


def _part(spec: str, count: int, share: float) -> str:
    """`rows.json#500`; the file itself for all of it."""
    if share == 1:
        return str(spec)
    plain = str(spec)
    head, mark, tail = plain.rpartition("#")
    if mark and tail.isdigit() and not Path(plain).exists():
        plain = head
    return f"{plain}#{max(1, round(share * count))}"


def _is_done(run: Path, data: Sequence[str]) -> bool:
    if not (run / "run.json").is_file():
        return False
    record = files.read_json(run / "run.json")
    return record.get("status") == "finished" and list(
        (record.get("config") or {}).get("data") or ()
    ) == list(data)
