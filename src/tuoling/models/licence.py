"""What went into a model, under which licence, and who said so: found, carried along beside the weights, read again.

`lineage.json` lies beside all weights and rows that we write. What it does not say is unknown, never taken for allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from tuoling.errors import DataError, ModelError
from tuoling.families import Family, family_of
from tuoling.files import read_json, write_json
from tuoling.language import tr
from tuoling.models.adapter_files import adapter_config_file, is_adapter_folder
from tuoling.models.licence_table import BY_ID, HOSTS, KINDS, KNOWN, TEXTS, Kind

if TYPE_CHECKING:
    from tuoling.models.source import ModelSource

LINEAGE = "lineage.json"
"""{"parts": [Part, ...]}: beside the weights of every output, and beside generated rows."""

SaidBy = Literal["user", "card", "file", "name", "family", "nobody"]
"""The user's own word; the front matter of README.md; a LICENSE file; the table, by its name or by the model's family."""

_TRUST: tuple[SaidBy, ...] = ("user", "card", "file", "name", "family", "nobody")
_LICENCE_FILES = ("LICENSE*", "LICENCE*", "license*", "COPYING*", "MODEL_LICENSE*", "DATA_LICENSE*")
_SAYS_NOTHING = {"other", "unknown", "none", ""}
_MOST_TEXT = 40_000


@dataclass(frozen=True, slots=True)
class Part:
    """Something that went in.

    named:    as the user or a card named it. licences: ids, all of which count; none: unknown.
    said_by, where: who says so, and the file, web page or config key.
    note:     what else was said, such as a card that the user contradicts.
    """

    kind: Kind
    named: str
    licences: tuple[str, ...] = ()
    said_by: SaidBy = "nobody"
    where: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in ("", ())}


def part_from_json(value: Any, where: str) -> Part:
    """Raises DataError where it is no part of a lineage."""
    if (
        not isinstance(value, Mapping)
        or value.get("kind") not in KINDS
        or not isinstance(value.get("named"), str)
    ):
        raise DataError(tr("not a part of a lineage", "不是来源记录中的一项"), where=where)
    said = value.get("said_by")
    return Part(
        kind=value["kind"],
        named=value["named"],
        licences=tuple(str(one) for one in value.get("licences") or ()),
        said_by=said if said in _TRUST else "nobody",
        where=str(value.get("where") or ""),
        note=str(value.get("note") or ""),
    )


def licence_id(words: str) -> str:
    """The table's id for what people write: `Apache License 2.0`, `CC BY-NC 4.0`, `llama-2`; else small letters."""
    plain = re.sub(r"[\s_]+", "-", words.strip().casefold())
    plain = re.sub(r"^the-|-(public-)?licen[sc]e(?=-|$)", "", plain).strip("-")
    plain = re.sub(r"-v(?=\d)|-version-", "-", plain).replace(",", "")
    found = BY_ID.get(plain) or BY_ID.get(plain.removesuffix(".0")) or BY_ID.get(f"{plain}.0")
    return found.id if found else plain


def union(*groups: Iterable[Part]) -> tuple[Part, ...]:
    """All parts, each once: of two that mean the same the one that is better known. Order of first sight."""
    found: dict[tuple[str, str], Part] = {}
    for part in (one for group in groups for one in group):
        key = (part.kind, part.named.rstrip("/").casefold())
        there = found.get(key)
        if there is None or _TRUST.index(part.said_by) < _TRUST.index(there.said_by):
            found[key] = part
    return tuple(found.values())


# -- what is found ------------------------------------------------------------------------------------------------


def by_name(kind: Kind, named: str) -> Part:
    """A part that is known by its name alone, or not at all."""
    plain = named.replace("\\", "/").replace("_", "-").casefold().rstrip("/")
    names = [plain] if kind != "data" else [plain, plain.rsplit("/", 1)[-1]]
    for known in KNOWN:
        if any(known.fits(kind, name) for name in names):
            return Part(kind, named, known.licences, "name", known.source)
    return Part(kind, named)


def of_generator(model: str, url: str | None, licence: str | None = None) -> Part:
    """What answered: by the user's word, else the host of the endpoint, else the name of the model it serves."""
    if licence is not None:
        return Part("generator", model, _ids(licence), "user", "--licence")
    host = re.sub(r"^\w+://([^/:]*).*$", r"\1", url or "")
    for end, terms in HOSTS:
        if host == end or host.endswith("." + end):
            return Part("generator", model, (terms,), "name", host)
    return by_name("generator", model)


def of_file(file: Path, named: str | None = None) -> tuple[Part, ...]:
    """Of a file of rows: what went into rows that we made; else the card of its folder, its name, a LICENSE there.

    A LICENSE comes last: beside rows it is often that of somebody's code.
    """
    recorded = _recorded(file.parent)
    if recorded is not None:
        return recorded
    named = named or str(file)
    return (_by_card("data", file.parent, named) or _of_data(file.parent, named),)


def of_data(path: str) -> tuple[Part, ...]:
    """Of what a source names: a file, or a dataset of the hub by its id."""
    return of_file(Path(path), path) if Path(path).is_file() else (by_name("data", path),)


def _of_data(folder: Path, named: str) -> Part:
    part = by_name("data", named)
    return part if part.licences else _by_licence_file("data", folder, named) or part


def of_folder(folder: Path, named: str | None = None) -> tuple[Part, ...]:
    """Everything known to be in a model, adapter or data folder.

    Its own lineage where we wrote it; else the folder itself, and the base and data that its card or adapter names.
    """
    recorded = _recorded(folder)
    if recorded is not None:
        return recorded
    named = named or hub_id_of(folder) or folder.resolve().name
    kind: Kind = "adapter" if is_adapter_folder(folder) else "model"
    part = _by_card(kind, folder, named) or _by_licence_file(kind, folder, named) or by_name(kind, named)
    if part.said_by == "nobody":
        part = _by_family(part, folder)
    card = front_matter(folder / "README.md")
    bases = [by_name("model", name) for name in _strings(card.get("base_model")) if name != named]
    config = adapter_config_file(folder) if kind == "adapter" else None
    if config is not None and not bases:
        base = _object(config).get("base_model_name_or_path")
        bases = [by_name("model", hub_id_of(Path(base)) or base)] if isinstance(base, str) and base else []
    return union([part], bases, (by_name("data", name) for name in _strings(card.get("datasets"))))


def of_model(source: ModelSource) -> tuple[Part, ...]:
    """Everything known to be in a model, and in the base below an adapter."""
    parts = of_folder(source.path, _named(source))
    if source.base is not None and not any(part.kind == "model" for part in parts):
        parts = union(parts, of_folder(source.base.path, _named(source.base)))
    return parts


def _named(source: ModelSource) -> str | None:
    """The hub id it was asked for by; a folder is called by its own name, wherever it lies."""
    return source.name if source.name and not Path(source.name).exists() else None


def _recorded(folder: Path) -> tuple[Part, ...] | None:
    """lineage.json, also of the run that a checkpoint belongs to; for an older run what its run.json names."""
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    for place in places:
        if (place / LINEAGE).is_file():
            return read_lineage(place / LINEAGE)
        run = _object(place / "run.json")
        config, base = run.get("config"), run.get("base")
        if isinstance(config, dict) and isinstance(base, dict):
            model = by_name("model", str(base.get("named")))
            if not model.licences and isinstance(base.get("licence"), str):
                model = replace(model, licences=(base["licence"],), said_by="family", where="run.json")
            names = [*_strings(config.get("data")), *_strings(config.get("dataset"))]
            return (model, *(by_name("data", name) for name in names))
    return None


def _by_card(kind: Kind, folder: Path, named: str) -> Part | None:
    """What the front matter says; under `other` the name that it gives its licence."""
    file = folder / "README.md"
    card = front_matter(file)
    said = [licence_id(word) for word in _strings(card.get("license"))]
    if set(said) <= _SAYS_NOTHING:
        said = [licence_id(word) for word in _strings(card.get("license_name"))]
    said = [one for one in said if one not in _SAYS_NOTHING]
    return Part(kind, named, tuple(said), "card", file.name) if said else None


def _by_licence_file(kind: Kind, folder: Path, named: str) -> Part | None:
    for file in sorted(
        {file for pattern in _LICENCE_FILES for file in folder.glob(pattern) if file.is_file()}
    ):
        with file.open(encoding="utf-8", errors="replace") as opened:
            found = of_text(opened.read(_MOST_TEXT))
        if found:
            return Part(kind, named, (found,), "file", file.name)
    return None


def _by_family(part: Part, folder: Path) -> Part:
    """What a family's published weights come under, where there is nothing nearer."""
    family: Family = family_of(_object(folder / "config.json").get("model_type"))
    if family.licence is None:
        return part
    return replace(part, licences=(family.licence,), said_by="family", where=f"model_type {family.name}")


def of_text(text: str) -> str | None:
    """The licence whose words a text holds."""
    plain = " ".join(text.casefold().split())
    return next((licence for words, licence in TEXTS if words in plain), None)


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a card; empty where there is none that can be read."""
    if not card.is_file():
        return {}
    head, _, rest = card.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff").partition("---\n")
    if head.strip():
        return {}
    try:
        value = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def hub_id_of(folder: Path) -> str | None:
    """`owner/name` of a folder in the hub's cache (`models--owner--name/snapshots/...`)."""
    found = next(
        (part for part in reversed(folder.parts) if part.startswith(("models--", "datasets--"))), None
    )
    return "/".join(found.split("--")[1:]) if found else None


def _strings(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [one for one in value or () if isinstance(one, str)]


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _ids(words: str) -> tuple[str, ...]:
    return tuple(licence_id(word) for word in re.split(r"[,+]", words) if word.strip())


# -- the user's word ----------------------------------------------------------------------------------------------


def as_said(parts: Sequence[Part], said: Mapping[str, str], where: str = "licences") -> tuple[Part, ...]:
    """The parts with the licences that the user gives them: by name, end of a path, a folder above, or kind.

    Raises ModelError where a name fits no part. What was found instead is kept in the note.
    """
    result = list(parts)
    for name, words in said.items():
        places = [index for index, part in enumerate(result) if _meant(part, name)]
        if not places:
            there = ", ".join(part.named for part in parts)
            raise ModelError(
                tr(f"nothing that goes in is called {name}", f"用到的内容里没有 {name}"),
                where=f"{where}: {name}",
                remedy=tr(
                    f"there are: {there}; or model, adapter, data", f"现有：{there}；或 model、adapter、data"
                ),
            )
        for index in places:
            part = result[index]
            ids = _ids(words)
            found = f"{part.said_by}: {', '.join(part.licences)}" if part.licences else ""
            note = found if part.said_by not in ("user", "nobody") and part.licences != ids else part.note
            result[index] = replace(part, licences=ids, said_by="user", where=f"{where}: {name}", note=note)
    return tuple(result)


def _meant(part: Part, name: str) -> bool:
    own, asked = part.named.rstrip("/"), name.rstrip("/")
    inside = own.endswith(f"/{asked}") or own.startswith(f"{asked}/")
    return asked in (part.kind, own) or inside or asked.endswith(f"/{own}")


# -- kept beside the weights --------------------------------------------------------------------------------------


def to_json(parts: Iterable[Part]) -> dict[str, Any]:
    """What lineage.json holds."""
    return {"parts": [part.to_json() for part in parts]}


def without_places(parts: Iterable[Part]) -> tuple[Part, ...]:
    """For a file that is given on: of an absolute path the name alone, so that it does not say where things lay."""
    return tuple(
        replace(part, named=Path(part.named).name) if Path(part.named).is_absolute() else part
        for part in parts
    )


def from_json(value: Any, where: str) -> tuple[Part, ...]:
    """Raises DataError where it is no lineage."""
    if not isinstance(value, Mapping) or not isinstance(value.get("parts"), list):
        raise DataError(tr("not a lineage: no list `parts`", "不是来源记录：没有列表 parts"), where=where)
    return tuple(part_from_json(one, f"{where}: parts[{index}]") for index, one in enumerate(value["parts"]))


def read_lineage(file: Path) -> tuple[Part, ...]:
    """Raises DataError where the file is damaged."""
    return from_json(read_json(file), str(file))


def write_lineage(folder: Path, *groups: Iterable[Part]) -> None:
    """Write what went into the weights in `folder` beside them; with what is written there already."""
    file = folder / LINEAGE
    there = read_lineage(file) if file.is_file() else ()
    parts = union(there, *groups)
    if parts:
        write_json(file, to_json(parts))
