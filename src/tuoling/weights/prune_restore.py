"""An adapter or a model trained with a small vocabulary, back on the full one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuoling import console
from tuoling.data.sources import resolve_sources
from tuoling.errors import DataError, ModelError, OutputError
from tuoling.files import atomic_folder, read_json, sha256_file, write_json
from tuoling.language import tr
from tuoling.models.adapter_files import ADAPTER_CONFIG
from tuoling.models.adapter_reading import read_adapter
from tuoling.models.licence import of_model, write_lineage
from tuoling.models.source import TEMPLATE_FILE, ModelSource, find_model, hub_name
from tuoling.models.tokenizers import load_tokenizer
from tuoling.text.render import Segment
from tuoling.text.templates import choose_template
from tuoling.weights.companions import copy_code, copy_companions
from tuoling.weights.parity import PROBES, Beside, Weights
from tuoling.weights.prune_corpus import Rows
from tuoling.weights.prune_score import TextScore, score, short_rows
from tuoling.weights.prune_weights import WordTensors, rows_sha256, word_tensors, write_rows
from tuoling.weights.tensors import TensorSource, open_weights
from tuoling.weights.vocabulary_map import MAP_FILE, VocabularyMap, renumber_config

REPORT_FILE = "restore.json"


@dataclass(frozen=True)
class RestoreReport:
    """before, after: the full model as it was, and what was restored, on the same texts; `outside` of each is the
    probability on words that training never saw. texts: where those came from."""

    out: Path
    kind: str
    trained_rows: int
    full_rows: int
    before: TextScore | None
    after: TextScore | None
    texts: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "out": str(self.out),
            "kind": self.kind,
            "trained_rows": self.trained_rows,
            "full_rows": self.full_rows,
            "texts": self.texts,
            "before": self.before.to_json() if self.before else None,
            "after": self.after.to_json() if self.after else None,
        }


def restore_vocab(
    pruned: str | Path,
    full: str | Path,
    out: Path,
    *,
    held_out: Sequence[str] = (),
    verify: bool = True,
    allow_remote_code: bool = False,
    say: Callable[[str], None] = console.note,
) -> RestoreReport:
    """Write `out`: the adapter for the full model, or the full model with every row that was trained.

    Rows that were pruned away keep what the full model had. held_out: rows to measure on; else the parity probes.
    Raises ModelError where `full` is not the model that was pruned, or where the vocabulary map is not found.
    """
    if out.exists():
        raise OutputError(
            tr("already exists", "已经存在"), where=str(out), remedy=tr("choose another place", "换一个位置")
        )
    trained, whole = find_model(pruned), find_model(full)
    if whole.is_adapter:
        raise ModelError(tr("the full model is an adapter", "所给的完整模型是适配器"), where=str(whole.path))
    found = VocabularyMap.read(_map_folder(trained))
    weights = open_weights(whole.path)
    words = word_tensors(whole, weights, allow_remote_code=allow_remote_code)
    _require_same_model(found, whole, weights, words)
    with atomic_folder(out) as folder:
        if trained.is_adapter:
            _restore_adapter(trained, whole, found, words, folder)
            restored = Weights(whole.path, (Beside(folder),), allow_remote_code=allow_remote_code)
        else:
            _restore_model(trained, whole, found, weights, words, folder, allow_remote_code=allow_remote_code)
            restored = Weights(folder, allow_remote_code=allow_remote_code)
        before = after = None
        texts, where = _texts(trained, whole, held_out)
        if verify:
            tokenizer = load_tokenizer(whole, for_training=False)
            unchanged = Weights(whole.path, allow_remote_code=allow_remote_code)
            before = score(unchanged, tokenizer, texts, kept=found.old_ids)
            after = score(restored, tokenizer, texts, kept=found.old_ids)
        kind = "adapter" if trained.is_adapter else "model"
        report = RestoreReport(out, kind, len(found), found.full_rows, before, after, where)
        write_json(folder / REPORT_FILE, report.to_json())
    say(_line(report))
    return report


def _line(report: RestoreReport) -> str:
    if report.before is None or report.after is None:
        return tr("nothing was measured (--no-verify)", "没有测量（--no-verify）")
    before, after = report.before, report.after
    return tr(
        f"{report.full_rows - report.trained_rows:,} words were never trained: {after.outside:.3%} of the probability "
        f"falls on them ({before.outside:.3%} before training), and they are the first choice at "
        f"{after.outside_best:.2%} of places ({before.outside_best:.2%} before); measured on {report.texts}",
        f"有 {report.full_rows - report.trained_rows:,} 个词从未训练：它们占概率的 {after.outside:.3%}"
        f"（训练前 {before.outside:.3%}），在 {after.outside_best:.2%} 的位置上是首选"
        f"（训练前 {before.outside_best:.2%}）；测量所用文本：{report.texts}",
    )


def _map_folder(trained: ModelSource) -> Path:
    """Where the vocabulary map lies: beside the weights, with their base, or with the model that a run began from."""
    places = [trained.path, trained.run_folder]
    places += [trained.base.path] if trained.base else []
    said = (trained.run or {}).get("config") or {}
    if isinstance(said, Mapping) and said.get("model_name_or_path"):
        places.append(Path(said["model_name_or_path"]).expanduser())
    for place in places:
        if (place / MAP_FILE).is_file():
            return place
    raise ModelError(
        tr(f"no {MAP_FILE} beside the weights or their base", f"权重和基座旁都没有 {MAP_FILE}"),
        where=str(trained.path),
        remedy=tr(
            f"copy {MAP_FILE} from the pruned model into this folder",
            f"请把裁剪后模型中的 {MAP_FILE} 复制到该目录",
        ),
    )


def _require_same_model(
    found: VocabularyMap, whole: ModelSource, weights: TensorSource, words: WordTensors
) -> None:
    same = words.rows == found.full_rows
    if same and rows_sha256(weights.read(words.embedding)) == found.full.get("embedding_sha256"):
        return
    named = found.full.get("named") or found.full.get("path")
    raise ModelError(
        tr(
            "this is not the model that was pruned: its embeddings differ",
            "这不是当初被裁剪的模型：词嵌入不同",
        ),
        where=str(whole.path),
        remedy=tr(f"it was {named}", f"当初的模型是 {named}"),
    )


def _restore_adapter(
    trained: ModelSource, whole: ModelSource, found: VocabularyMap, words: WordTensors, folder: Path
) -> None:
    """PEFT's files again, with rows for the full vocabulary where an adapter has rows by word."""
    from safetensors.torch import save_file

    modules = {name.rsplit(".", 2)[-2] for name in words.names}
    base = open_weights(whole.path)
    adapter = read_adapter(trained.path)
    tensors = {
        name: _spread(name, tensor, found, modules, base, words).contiguous()
        for name, tensor in adapter.tensors.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = dict(adapter.config)
    if config.get("trainable_token_indices"):
        config["trainable_token_indices"] = _old_tokens(config["trainable_token_indices"], found.old_of())
    record = {
        "path": str(whole.path.absolute()),
        "named": whole.name,
        "config_sha256": sha256_file(whole.path / "config.json"),
    }
    config["base_model_name_or_path"] = hub_name(record) or record["path"]
    write_json(folder / ADAPTER_CONFIG, config)
    _write_settings(trained, whole, found, folder, {"base": record})


def _old_tokens(value: Any, old_of: Mapping[int, int]) -> Any:
    if isinstance(value, Mapping):
        return {name: _old_tokens(ids, old_of) for name, ids in value.items()}
    return [old_of[index] for index in value]


def _spread(
    name: str,
    tensor: torch.Tensor,
    found: VocabularyMap,
    modules: set[str],
    base: TensorSource,
    words: WordTensors,
) -> torch.Tensor:
    """An adapter's tensor with the full number of words: LoRA parts get zeros (no change), whole copies the base's."""
    module = next((module for module in modules if f".{module}." in f".{name}."), None)
    rows = torch.from_numpy(found.old_ids)
    if module is None or len(rows) not in tensor.shape or name.endswith("trainable_tokens_delta"):
        return tensor
    if "lora_" in name:
        axis = 1 if "lora_embedding_A" in name else 0
        if tensor.shape[axis] != len(rows):
            return tensor
        shape = list(tensor.shape)
        shape[axis] = found.full_rows
        return torch.zeros(shape, dtype=tensor.dtype).index_copy(axis, rows, tensor)
    kind = name.rsplit(".", 1)[-1]
    there = next((other for other in words.names if other.endswith(f"{module}.{kind}")), words.embedding)
    return base.read(there).to(tensor.dtype).index_copy(0, rows, tensor)


def _restore_model(
    trained: ModelSource,
    whole: ModelSource,
    found: VocabularyMap,
    full: TensorSource,
    full_words: WordTensors,
    folder: Path,
    *,
    allow_remote_code: bool,
) -> None:
    small = open_weights(trained.path)
    words = word_tensors(trained, small, allow_remote_code=allow_remote_code)
    if words.rows != len(found):
        raise ModelError(
            tr(
                f"the model has {words.rows} words, its vocabulary map {len(found)}",
                f"模型有 {words.rows} 个词，而对应关系文件中有 {len(found)} 个",
            ),
            where=str(trained.path),
        )
    rows = torch.from_numpy(found.old_ids)

    def spread(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tail = ".".join(name.split(".")[-2:])
        there = next((other for other in full_words.names if other.endswith(tail)), full_words.embedding)
        return full.read(there).to(tensor.dtype).index_copy(0, rows, tensor)

    write_rows(small, folder, words, spread, found.full_rows)
    config = renumber_config(trained.config, found.old_of(), found.full_rows)
    write_json(folder / "config.json", config)
    _write_settings(trained, whole, found, folder, {})
    if allow_remote_code:
        copy_code(whole.path, folder)


def _write_settings(
    trained: ModelSource, whole: ModelSource, found: VocabularyMap, folder: Path, changes: Mapping[str, Any]
) -> None:
    """The trained side's own settings under the full ids; tokenizer and licence of the full model."""
    for place in (trained.path, trained.run_folder):
        generation = place / "generation_config.json"
        if generation.is_file() and not (folder / generation.name).exists():
            changed = renumber_config(read_json(generation), found.old_of(), found.full_rows)
            write_json(folder / generation.name, changed)
        record = place / TEMPLATE_FILE
        if record.is_file() and not (folder / TEMPLATE_FILE).exists():
            write_json(folder / TEMPLATE_FILE, {**read_json(record), **changes})
    if changes and not (folder / TEMPLATE_FILE).exists():
        write_json(folder / TEMPLATE_FILE, dict(changes))
    write_lineage(folder, of_model(trained))
    copy_companions(whole.path, folder)


def _texts(
    trained: ModelSource, whole: ModelSource, held_out: Sequence[str]
) -> tuple[list[list[Segment]], str]:
    """What is measured on, and its name: the user's rows through the model's template, else the parity probes."""
    if not held_out:
        plain = [[Segment("", False, "start"), Segment(text, False)] for text in PROBES]
        return plain, tr(
            "the parity probes (--held-out names rows)", "对照用的固定文本（可用 --held-out 指定数据）"
        )
    tokenizer = load_tokenizer(whole, for_training=False)
    template, _ = choose_template(
        requested=None,
        saved=trained.template,
        tokenizer=tokenizer,
        family_default=whole.family.template,
    )
    rows = short_rows(Rows(resolve_sources(held_out), template), tokenizer)
    if not rows:
        raise DataError(tr("no row can be read", "没有一条数据可以读取"), where=", ".join(held_out))
    return rows, ", ".join(held_out)
