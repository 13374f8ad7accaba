"""The rows that quantisation is calibrated and judged on: the user's own, through the model's own template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from tuoling.config_keys import RunConfig
from tuoling.data.read import guess
from tuoling.data.sources import resolve_sources
from tuoling.errors import DataError, ModelError, UsageError
from tuoling.language import tr
from tuoling.models.load import load_tokenizer
from tuoling.text.templates import Template, choose_template
from tuoling.train.rows import Rows, compile_rows, hold_out

if TYPE_CHECKING:
    from tuoling.models.source import ModelSource
    from tuoling.text.tokenizer import TextTokenizer

HELD_OUT_ROWS = 64
"""Judged on: some thousands of learned tokens, a few seconds of a CPU for each billion parameters."""


@dataclass(frozen=True)
class Sample:
    """One row as tokens, and the ranges of it that are answers."""

    input_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CalibrationRows:
    """calibration: what the quantiser sees. held_out: what perplexity is measured on; none of them is among the first.

    facts: for the record beside the weights. notes: for the user.
    """

    calibration: list[Sample]
    held_out: list[Sample]
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def choose_rows(
    source: ModelSource,
    data: Sequence[str],
    *,
    count: int,
    seed: int = 0,
    template: str | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> CalibrationRows:
    """`count` rows to calibrate on, and up to `HELD_OUT_ROWS` to judge by.

    data: files, folders or hub ids; where there are none, the run's own rows: those it held out are judged by, the
    others calibrate. Raises UsageError where nobody says any rows.
    """
    config = _config(source, data)
    tokenizer = load_tokenizer(source, for_training=False)
    chosen, reason = choose_template(
        requested=template or (None if data else config.template),
        saved=source.template,
        tokenizer=tokenizer,
        family_default=source.family.template,
    )
    say(reason)
    train, held_out, seen = _split(config, tokenizer, chosen, seed, say, trained=not data)
    rng = np.random.Generator(np.random.PCG64(seed))
    picked = np.sort(rng.permutation(len(train))[:count])
    judged = np.sort(rng.permutation(len(held_out))[:HELD_OUT_ROWS])
    facts = {
        "data": list(config.data) + list(config.dataset),
        "store": train.store.key,
        "template": chosen.id,
        "rows": len(picked),
        "tokens": int(train.lengths[picked].sum()),
        "held_out_rows": len(judged),
        "held_out_learned_tokens": int(held_out.learned[judged].sum()),
        "seen_in_training": seen,
        "seed": seed,
    }
    return CalibrationRows(
        [_sample(train, int(row)) for row in picked],
        [_sample(held_out, int(row)) for row in judged],
        facts,
        _notes(facts, count),
    )


def _config(source: ModelSource, data: Sequence[str]) -> RunConfig:
    if data:
        plain_text = {guess(one).format for one in resolve_sources(data)} == {"text"}
        return RunConfig(
            stage="pt" if plain_text else "sft",
            model_name_or_path=str(source.weights_path),
            data=tuple(data),
            max_seq_len=source.max_seq_len or 1024,
            overlong="drop",
            allow_bad=0.99,
        )
    if source.run is None:
        raise UsageError(
            tr(
                "the folder does not say which rows to calibrate on: quantising needs some of your own",
                "该目录没有写明用哪些数据校准：量化需要一些您自己的数据",
            ),
            where=str(source.path),
            remedy=tr(
                "give rows like those it will be asked: --data rows.json\nor do without them, at a worse result: --method rtn",
                "给出与实际用途相近的数据：--data rows.json\n或不用数据，效果较差：--method rtn",
            ),
        )
    try:
        config = RunConfig.model_validate(source.run.get("config") or {})
    except ValidationError as error:
        raise ModelError(
            tr("run.json was written by another version", "run.json 由其他版本写成"),
            where=str(source.run_folder / "run.json"),
            remedy=tr("name the rows: --data rows.json", "请给出数据：--data rows.json"),
        ) from error
    return config.model_copy(update={"share_prefixes": False})


def _split(
    config: RunConfig,
    tokenizer: TextTokenizer,
    template: Template,
    seed: int,
    say: Callable[[str], None],
    *,
    trained: bool,
) -> tuple[Rows, Rows, bool]:
    """(rows to calibrate on, rows to judge by, whether the model was trained on the latter)."""
    try:
        store, _ = compile_rows(config, config.data, config.dataset, tokenizer, template, say)
    except DataError as error:
        raise DataError(
            error.problem,
            where=error.where,
            remedy="\n".join(
                part
                for part in (
                    error.remedy,
                    tr("or name other rows: --data rows.json", "或换一份数据：--data rows.json"),
                )
                if part
            ),
        ) from error
    if config.eval_data or config.eval_dataset:
        other, _ = compile_rows(config, config.eval_data, config.eval_dataset, tokenizer, template, say)
        return Rows(store, np.arange(len(store))), Rows(other, np.arange(len(other))), False
    train, held_out = hold_out(store, config.val_rows(len(store)), config.seed)
    if held_out is not None and len(held_out):
        return train, held_out, False
    train, held_out = hold_out(store, min(HELD_OUT_ROWS, max(1, len(store) // 5)), seed)
    if held_out is None or not len(train):
        raise DataError(
            tr(
                f"{len(store)} different rows are too few: some calibrate, others judge",
                f"{len(store)} 条不同的数据太少：需要一部分校准、一部分评判",
            ),
            where=", ".join(config.data),
            remedy=tr("256 rows are usual", "通常用 256 条"),
        )
    return train, held_out, trained


def _sample(rows: Rows, position: int) -> Sample:
    example = rows[position]
    ids = tuple(int(token) for token in example.input_ids)
    return Sample(ids, tuple((int(begin), int(end)) for begin, end in example.spans))


def _notes(facts: dict[str, Any], asked: int) -> list[str]:
    notes = [
        tr(
            f"calibrated on {facts['rows']:,} rows ({facts['tokens']:,} tokens), judged by {facts['held_out_rows']:,} others",
            f"用 {facts['rows']:,} 条数据（{facts['tokens']:,} 个 token）校准，用另外 {facts['held_out_rows']:,} 条评判",
        )
    ]
    if facts["rows"] < asked:
        notes.append(
            tr(
                f"{asked:,} rows were asked for; few rows calibrate badly",
                f"要求 {asked:,} 条；数据太少会使校准变差",
            )
        )
    if facts["seen_in_training"]:
        notes.append(
            tr(
                "the run held no rows out: the model was trained on those that judge it",
                "该训练没有留出验证数据：评判用的数据模型训练时见过",
            )
        )
    return notes


def rows_to_json(rows: Sequence[Sample]) -> list[dict[str, Any]]:
    """For a child process."""
    return [{"input_ids": list(row.input_ids), "spans": [list(span) for span in row.spans]} for row in rows]


def rows_from_json(rows: Sequence[dict[str, Any]]) -> list[Sample]:
    """The opposite."""
    return [
        Sample(tuple(row["input_ids"]), tuple((begin, end) for begin, end in row["spans"])) for row in rows
    ]
