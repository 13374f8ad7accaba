"""tuoling licence"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuoling import console, environment
from tuoling.errors import UsageError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.models.licence import Part
    from tuoling.models.licence_answer import Answer

HELP = tr(
    """Say what went into a model, under which licences, and what that allows: commercial use, publishing.

    tuoling licence RUN [--licence rows.json=own]

    What nobody says is unknown, and unknown never counts as allowed. A summary, no legal advice.""",
    """说明一个模型由什么得来、各是什么许可，以及允许什么：能否商用、能否发布。

    tuoling licence 运行目录 [--licence rows.json=own]

    没有人说明的就是未知，未知绝不当作允许。这只是摘要，不是法律意见。""",
)


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help=tr(
                "run, model, adapter, GGUF file, rows, or hub id",
                "运行目录、模型、适配器、GGUF 文件、数据，或模型库编号",
            ),
        ),
    ],
    licence: Annotated[
        list[str] | None,
        typer.Option(
            "--licence",
            metavar="NAME=ID",
            help=tr(
                "your word on a part, or on all of a kind (model, adapter, data); own: it is yours",
                "由你声明某一项或某一类（model、adapter、data）的许可；own 表示归你所有",
            ),
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help=tr("keep it beside the weights", "记录在权重旁边"))
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print one JSON object", "打印一个 JSON 对象"))
    ] = False,
) -> None:
    from tuoling.models.licence import as_said
    from tuoling.models.licence_answer import answer

    parts = as_said(_parts(model), pairs_of(licence or []), "--licence")
    found = answer(parts)
    if as_json:
        _print_json(found)
    else:
        _show(found)
    if write:
        _write(Path(model), parts)


def _parts(model: str) -> tuple[Part, ...]:
    from tuoling.models import licence
    from tuoling.models.adapter_files import is_adapter_folder
    from tuoling.models.source import find_model

    place = Path(model)
    if place.is_file():
        return _of_gguf(place) if place.suffix == ".gguf" else licence.of_file(place, model)
    if place.is_dir() and not ((place / "config.json").is_file() or is_adapter_folder(place)):
        return licence.of_folder(place)
    if place.is_dir() and (place / licence.LINEAGE).is_file():
        return licence.read_lineage(place / licence.LINEAGE)
    return licence.of_model(find_model(model))


def _of_gguf(file: Path) -> tuple[Part, ...]:
    from tuoling.models.licence import Part, by_name, licence_id
    from tuoling.weights.from_ggml import lineage_of_gguf
    from tuoling.weights.gguf_reading import GgufFile

    metadata = GgufFile(file).metadata
    recorded = lineage_of_gguf(metadata)
    if recorded:
        return recorded
    said = metadata.get("general.license")
    if isinstance(said, str):
        return (Part("model", file.name, (licence_id(said),), "card", "general.license"),)
    return (by_name("model", file.stem),)


def pairs_of(words: list[str]) -> dict[str, str]:
    """`rows.json=own` → {"rows.json": "own"}."""
    said = {}
    for word in words:
        name, equals, licence = word.rpartition("=")
        if not (name and equals and licence):
            raise UsageError(
                tr(f"--licence {word}: not NAME=ID", f"--licence {word}：应为 名字=许可"),
                remedy="--licence rows.json=own --licence model=apache-2.0",
            )
        said[name] = licence
    return said


def _print_json(found: Answer) -> None:
    from tuoling.models.licence_answer import permission, sentences

    rows = [
        {
            **part.to_json(),
            "commercial": permission(part, "commercial"),
            "publish": permission(part, "publish"),
        }
        for part in found.parts
    ]
    value = {
        "commercial": found.commercial,
        "publish": found.publish,
        "parts": rows,
        "words": sentences(found, environment.language()),
    }
    print(json.dumps(value, ensure_ascii=False))  # noqa: T201


def _show(found: Answer) -> None:
    from rich.markup import escape
    from rich.table import Table

    from tuoling.models.licence_answer import kind_word, permission, said_word, sentences, word

    language = environment.language()
    table = Table(box=None, pad_edge=False)
    for label in (
        "",
        tr("name", "名称"),
        tr("licence", "许可"),
        tr("said by", "由谁说明"),
        tr("commercial", "商用"),
        tr("publish", "发布权重"),
    ):
        table.add_column(label, overflow="fold")
    for part in found.parts:
        said = said_word(part.said_by, language) + (f" ({part.where})" if part.where else "")
        cells = [
            kind_word(part.kind, language),
            part.named,
            " + ".join(part.licences) or word("unknown", language),
            said + (f" [{part.note}]" if part.note else ""),
            word(permission(part, "commercial"), language),
            word(permission(part, "publish"), language),
        ]
        table.add_row(*(escape(cell) for cell in cells))
    console.out.print(table)
    for line in sentences(found, language):
        console.out.print(line, markup=False)


def _write(place: Path, parts: tuple[Part, ...]) -> None:
    from tuoling.files import write_json
    from tuoling.models.licence import LINEAGE, to_json

    if not place.is_dir():
        raise UsageError(
            tr("--write is for a folder that is here", "--write 只用于本地目录"), where=str(place)
        )
    write_json(place / LINEAGE, to_json(parts))
    console.note(tr(f"written: {place / LINEAGE}", f"已写入：{place / LINEAGE}"))
