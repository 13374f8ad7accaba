"""Licences found, carried and answered for: the cases that users bring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuoling.errors import ModelError
from tuoling.models.licence import (
    LINEAGE,
    Part,
    as_said,
    by_name,
    licence_id,
    of_file,
    of_folder,
    of_generator,
    of_text,
    read_lineage,
    union,
    write_lineage,
)
from tuoling.models.licence_answer import answer, one_licence, permission, sentences, warning
from tuoling.models.licence_table import BY_ID, HOSTS, KNOWN, LICENCES, TEXTS


def model_folder(folder: Path, model_type: str = "llama", card: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def rows(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}\n")
    return folder / name


def test_the_table_names_no_licence_that_it_does_not_have() -> None:
    named = {one for known in KNOWN for one in known.licences}
    named |= {licence for _, licence in TEXTS} | {licence for _, licence in HOSTS}
    assert named <= {licence.id for licence in LICENCES}
    assert len(BY_ID) == sum(1 + len(licence.aliases) for licence in LICENCES)  # no name stands for two


def test_bloom_and_own_rows(tmp_path: Path) -> None:
    model = of_folder(model_folder(tmp_path / "my-bloom", "bloom"))
    data = of_file(rows(tmp_path / "data", "rows.json"))
    assert [part.licences for part in model] == [("bigscience-bloom-rail-1.0",)]
    assert model[0].said_by == "family"
    found = answer(union(model, data))
    assert (found.commercial, found.publish) == ("unknown", "unknown")  # nobody said whose the rows are
    said = answer(as_said(found.parts, {"rows.json": "own"}))
    assert (said.commercial, said.publish) == ("conditions", "conditions")
    assert any("attachment A" in line for line in sentences(said, "en"))
    assert any("附件 A" in line for line in sentences(said, "zh"))
    assert warning(said) is None
    assert one_licence(said.parts) == "bigscience-bloom-rail-1.0"


def test_llama_1_and_belle_rows(tmp_path: Path) -> None:
    data = of_file(rows(tmp_path, "Belle.train.json"))
    found = answer(union([by_name("model", "decapoda-research/llama-7b-hf")], data))
    assert (found.commercial, found.publish) == ("no", "diff")
    assert data[0].licences == ("odc-by", "research-only", "openai-outputs")
    assert "llama-7b-hf" in sentences(found, "en")[0] and "Belle.train.json" in sentences(found, "en")[0]
    assert sentences(found, "zh")[1].startswith("能否发布权重：只能以差分或适配器形式")
    assert "Belle.train.json" in (warning(found) or "")


def test_apache_model_and_rows_under_cc_by_nc(tmp_path: Path) -> None:
    model = of_folder(model_folder(tmp_path / "m", card="---\nlicense: apache-2.0\n---\n# m\n"))
    folder = tmp_path / "d"
    data = of_file(rows(folder, "rows.json"))
    assert data[0].licences == ()
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n", encoding="utf-8")
    data = of_file(folder / "rows.json")
    assert data[0] == Part("data", str(folder / "rows.json"), ("cc-by-nc-4.0",), "card", "README.md")
    found = answer(union(model, data))
    assert (found.commercial, found.publish) == ("no", "conditions")
    assert one_licence(found.parts) == "other"


@pytest.mark.parametrize(
    ("name", "licences"),
    [
        ("bigscience/bloomz-7b1-mt", ("bigscience-bloom-rail-1.0",)),
        ("BelleGroup/BELLE-7B-2M", ("bigscience-bloom-rail-1.0", "research-only")),
        ("BelleGroup/BELLE-LLaMA-7B-2M-enc", ("llama-1", "research-only")),
        ("meta-llama/Llama-2-7b-hf", ("llama2",)),
        ("meta-llama/Meta-Llama-3-8B", ("llama3",)),
        ("meta-llama/Llama-3.1-8B-Instruct", ("llama3.1",)),
        ("openlm-research/open_llama_7b", ("apache-2.0",)),
        ("Qwen/Qwen2.5-7B", ("apache-2.0",)),
        ("Qwen/Qwen2.5-3B-Instruct", ("qwen-research",)),
        ("Qwen/Qwen2.5-72B", ("qwen",)),
        ("Qwen/Qwen1.5-4B", ("qwen-research",)),
        ("Qwen/Qwen-7B-Chat", ("tongyi-qianwen",)),
        ("gpt-4o-mini", ("openai-outputs",)),
        ("gpt2", ("mit",)),
        ("somebody/llama-remix", ()),
        ("my-model", ()),
    ],
)
def test_models_by_name(name: str, licences: tuple[str, ...]) -> None:
    assert by_name("model", name).licences == licences


def test_data_by_name_is_not_taken_for_a_model() -> None:
    assert by_name("data", "bloom-questions.json").licences == ()
    assert by_name("data", "data/alpaca_gpt4_data_zh.json").licences == ("cc-by-nc-4.0", "openai-outputs")
    assert by_name("data", "BelleGroup/train_1M_CN").licences[1] == "research-only"


def test_a_card_is_nearer_than_a_file_and_a_file_nearer_than_a_name(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "bloom-560m", "bloom")
    assert of_folder(folder)[0].said_by == "name"
    (folder / "LICENSE.txt").write_text(
        "Copyright\n\nPermission is hereby  granted,\nfree of charge, to any person"
    )
    assert of_folder(folder)[0] == Part("model", "bloom-560m", ("mit",), "file", "LICENSE.txt")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama-2\n---\n")
    assert of_folder(folder)[0] == Part("model", "bloom-560m", ("llama2",), "card", "README.md")


def test_a_licence_beside_rows_does_not_cover_what_is_known_by_name(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("Apache License\nVersion 2.0")
    assert of_file(rows(tmp_path, "train_1M_CN.json"))[0].licences[1] == "research-only"
    assert of_file(rows(tmp_path, "my.json"))[0].licences == ("apache-2.0",)


def test_what_a_card_names_counts_as_well(tmp_path: Path) -> None:
    card = "---\nlicense: apache-2.0\nbase_model: huggyllama/llama-7b\ndatasets:\n- BelleGroup/train_0.5M_CN\n---\n"
    parts = of_folder(model_folder(tmp_path / "tuned", card=card))
    assert [(part.kind, part.named) for part in parts] == [
        ("model", "tuned"),
        ("model", "huggyllama/llama-7b"),
        ("data", "BelleGroup/train_0.5M_CN"),
    ]
    assert answer(parts).publish == "diff"


def test_a_licence_that_no_table_has_is_unknown(tmp_path: Path) -> None:
    parts = of_folder(model_folder(tmp_path / "m", card="---\nlicense: acme-1.0\n---\n"))
    assert parts[0].licences == ("acme-1.0",)
    assert answer(parts).commercial == "unknown"
    mixed = Part("data", "d", ("acme-1.0", "cc-by-nc-4.0"), "user")
    assert permission(mixed, "commercial") == "no"


def test_nothing_known_is_not_allowed() -> None:
    assert answer([]).commercial == "unknown"
    assert permission(Part("data", "rows.json"), "publish") == "unknown"


def test_the_users_word_wins_and_says_what_it_overrides(tmp_path: Path) -> None:
    parts = as_said([by_name("data", "data/alpaca_data.json")], {"data": "own"})
    assert parts[0].licences == ("own",)
    assert parts[0].said_by == "user"
    assert parts[0].note == "name: cc-by-nc-4.0, openai-outputs"
    with pytest.raises(ModelError, match=r"called row\.json") as raised:
        as_said(parts, {"row.json": "own"})
    assert "alpaca_data.json" in (raised.value.remedy or "")


def test_generators() -> None:
    assert of_generator("gpt-4o", "https://api.openai.com/v1").licences == ("openai-outputs",)
    assert of_generator("anything", "https://notopenai.com/v1").licences == ()
    assert of_generator("Qwen2.5-7B-Instruct", "http://127.0.0.1:8000/v1").licences == ("apache-2.0",)
    assert of_generator("m", None, "mit + own").licences == ("mit", "own")
    assert permission(of_generator("Qwen2.5-7B", None), "commercial") == "yes"  # its answers are nobody's
    assert permission(of_generator("huggyllama/llama-7b", None), "commercial") == "no"
    assert permission(Part("model", "x", ("llama2",)), "commercial") == "conditions"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("Apache License 2.0", "apache-2.0"),
        ("Apache-2.0", "apache-2.0"),
        ("CC BY-NC 4.0", "cc-by-nc-4.0"),
        ("MIT License", "mit"),
        ("BSD", "bsd-3-clause"),
        ("The Unlicense", "unlicense"),
        ("Llama-2", "llama2"),
        ("odc-by-1.0", "odc-by"),
        ("Acme 3", "acme-3"),
    ],
)
def test_what_people_write(words: str, expected: str) -> None:
    assert licence_id(words) == expected


def test_texts() -> None:
    assert of_text("BigScience RAIL License v1.0\ndated May 19") == "bigscience-bloom-rail-1.0"
    assert of_text("Creative Commons\nAttribution-NonCommercial 4.0 International") == "cc-by-nc-4.0"
    assert of_text("ours") is None


def test_written_and_read_again_and_joined(tmp_path: Path) -> None:
    write_lineage(tmp_path, [Part("model", "a"), Part("data", "d", ("mit",), "card", "README.md")])
    write_lineage(tmp_path, [Part("model", "A", ("apache-2.0",), "file", "LICENSE")])
    assert read_lineage(tmp_path / LINEAGE) == (
        Part("model", "A", ("apache-2.0",), "file", "LICENSE"),  # the same part, better known
        Part("data", "d", ("mit",), "card", "README.md"),
    )


def test_a_run_of_before_is_answered_from_its_run_json(tmp_path: Path) -> None:
    run = {
        "config": {"data": ["belle/Belle.train.json"]},
        "base": {"named": "x/y", "licence": "bigscience-bloom-rail-1.0"},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    assert [part.licences for part in of_folder(checkpoint)] == [
        ("bigscience-bloom-rail-1.0",),
        ("odc-by", "research-only", "openai-outputs"),
    ]
