"""A model with a smaller vocabulary: the tokens that its rows need, and proof that it computes the same on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tuoling import console
from tuoling.data.sources import resolve_sources
from tuoling.errors import ModelError, OutputError, UsageError
from tuoling.files import atomic_folder, read_json, sha256_file, write_json
from tuoling.language import tr
from tuoling.models.source import ModelSource, find_model, weight_files
from tuoling.models.tokenizers import load_tokenizer
from tuoling.text.templates import choose_template
from tuoling.text.tokenizer import TextTokenizer
from tuoling.weights import parity
from tuoling.weights.companions import copy_code
from tuoling.weights.parity import Weights
from tuoling.weights.prune_choice import Choice, choose
from tuoling.weights.prune_corpus import (
    Agreement,
    Counts,
    Rows,
    base_texts,
    compare,
    count_tokens,
    is_held,
)
from tuoling.weights.prune_files import require_same_special, write_tokenizer_files
from tuoling.weights.prune_report import (
    REPORT_FILE,
    PruneOptions,
    PruneReport,
    corpus_line,
    held_out_line,
    score_line,
)
from tuoling.weights.prune_score import TextScore, score, short_rows
from tuoling.weights.prune_tokenizer import SPECIAL_NAMES, TokenizerState
from tuoling.weights.prune_weights import WordTensors, rows_sha256, word_tensors, write_rows
from tuoling.weights.tensors import TensorSource, open_weights
from tuoling.weights.vocabulary_map import VocabularyMap, renumber_config, token_ids_of

if TYPE_CHECKING:
    from tuoling.text.templates import Template

Say = Callable[[str], None]

PROBE_ROWS = 8
PROBE_CHARACTERS = 400


def prune_vocab(
    model: str | Path, out: Path, options: PruneOptions, *, say: Say = console.note
) -> PruneReport:
    """Write `out`, a model of the same family with fewer words. Nothing is left there when anything fails.

    Raises ModelError for an adapter, a tokenizer of another kind, or where the result is not the same; UsageError for
    options that contradict each other; DataError for rows that cannot be read.
    """
    _require_room(out, options)
    source = _whole_model(model)
    weights = open_weights(source.path)
    words = word_tensors(source, weights, allow_remote_code=options.allow_remote_code)
    full = load_tokenizer(source, for_training=False)
    template, why = choose_template(
        requested=options.template,
        saved=source.template,
        tokenizer=full,
        family_default=source.family.template,
    )
    say(why)
    pruning = _Pruning(source, weights, words, full, template, options, say)
    return pruning.run(out)


def _require_room(out: Path, options: PruneOptions) -> None:
    if not options.keep:
        raise UsageError(
            tr("no rows to keep the words of", "没有给出要保留其词元的数据"),
            where="--keep",
            remedy="--keep rows.json",
        )
    if out.exists():
        raise OutputError(
            tr("already exists", "已经存在"), where=str(out), remedy=tr("choose another place", "换一个位置")
        )


def _whole_model(model: str | Path) -> ModelSource:
    source = find_model(model)
    if source.is_adapter:
        raise ModelError(
            tr("this is an adapter; a vocabulary belongs to a whole model", "这是适配器；词表属于完整的模型"),
            where=str(source.path),
            remedy=tr(
                "prune its base, or merge it first: tuoling merge", "请裁剪它的基座，或先合并：tuoling merge"
            ),
        )
    return source


class _Pruning:
    """One pruning: what was found, and the steps in their order."""

    def __init__(
        self,
        source: ModelSource,
        weights: TensorSource,
        words: WordTensors,
        full: TextTokenizer,
        template: Template,
        options: PruneOptions,
        say: Say,
    ) -> None:
        self.source, self.weights, self.words = source, weights, words
        self.full, self.template, self.options, self.say = full, template, options, say
        self.state = TokenizerState(full.hf.backend_tokenizer.to_str())

    def run(self, out: Path) -> PruneReport:
        """Choose, write, prove; everything inside one folder that is renamed into place at the end."""
        counts = self._count()
        choice = self._choose(counts.every)
        found = VocabularyMap(choice.old_ids, self.words.rows, self._full_record())
        with atomic_folder(out) as folder:
            self._write_settings(folder, found)
            smaller = load_tokenizer(folder, for_training=False)
            require_same_special(self.full, smaller, self.source.path)
            with self._watched(self.options.keep, tr("comparing rows", "逐条比较")) as rows:
                corpus = compare(rows, self.full, smaller, found.new_ids)
            self.say(corpus_line(corpus, choice, self.words.rows))
            held_out, estimated = self._held_out(counts, smaller, found)
            self.say(held_out_line(held_out, estimated))
            size = self._write_weights(folder, found)
            verdict = self._prove(folder, found)
            before, after = self._scores(folder, found, smaller)
            report = PruneReport(
                out=out,
                rows_before=self.words.rows,
                rows_after=len(found),
                size_bytes_before=sum(file.stat().st_size for file in weight_files(self.source.path)),
                size_bytes_after=size,
                choice=self._choice_record(choice),
                corpus=corpus,
                held_out=held_out,
                estimated=estimated,
                parity=verdict,
                before=before,
                after=after,
            )
            write_json(folder / REPORT_FILE, report.to_json())
        return report

    def _rows(self, specs: Sequence[str]) -> Rows:
        sources = resolve_sources(specs, format=self.options.data_format, columns=self.options.columns)
        return Rows(sources, self.template)

    @contextmanager
    def _watched(self, specs: Sequence[str], label: str) -> Iterator[Rows]:
        """Rows whose reading is shown as it goes on."""
        rows = self._rows(specs)
        with console.progress() as bar:
            task = bar.add_task(label, total=None, detail="")
            rows.progress = lambda count: bar.update(task, completed=count)
            yield rows

    def _count(self) -> Counts:
        with self._watched(self.options.keep, tr("reading rows", "读取数据")) as rows:
            counts = count_tokens(rows, self.full, self.words.rows)
        formats = ", ".join(f"{name} {count:,}" for name, count in rows.formats.items())
        self.say(
            tr(
                f"rows: {counts.rows:,} ({formats}); {int(counts.every.sum()):,} tokens, "
                f"{int((counts.every > 0).sum()):,} different ones of {self.words.rows:,}",
                f"数据：{counts.rows:,} 条（{formats}）；{int(counts.every.sum()):,} 个词元，"
                f"词表 {self.words.rows:,} 中出现了 {int((counts.every > 0).sum()):,} 种",
            )
        )
        if rows.skipped:
            self.say(
                tr(
                    f"{rows.skipped:,} bad rows left out: tuoling data check shows them",
                    f"去掉 {rows.skipped:,} 条坏数据：用 tuoling data check 查看",
                )
            )
        return counts

    def _choose(self, counts: np.ndarray) -> Choice:
        options = self.options
        return choose(self.state, counts, self._base_ids(), min_count=options.min_count, size=options.size)

    def _base_ids(self) -> set[int]:
        """Ids of the base texts, and every special id that a config names and the tokenizer has."""
        encoded = self.full.encode_batch(base_texts(self.options.base, self.template))
        found = {index for ids, _ in encoded for index in ids}
        generation = self.source.path / "generation_config.json"
        configs = [self.source.config, read_json(generation) if generation.is_file() else {}]
        found |= {index for config in configs for index in token_ids_of(config)}
        found |= {
            index for index in (self.full.bos_id, self.full.eos_id, self.full.pad_id) if index is not None
        }
        return {index for index in found if index in self.state.tokens and index < self.words.rows}

    def _full_record(self) -> dict[str, Any]:
        return {
            "path": str(self.source.path.absolute()),
            "named": self.source.name,
            "config_sha256": sha256_file(self.source.path / "config.json"),
            "tokenizer": self.full.fingerprint(),
            "embedding_sha256": rows_sha256(self.weights.read(self.words.embedding)),
        }

    def _write_settings(self, folder: Path, found: VocabularyMap) -> None:
        """Everything but the weights."""
        new_of = found.new_of()
        write_json(folder / "config.json", renumber_config(self.source.config, new_of, len(found)))
        generation = self.source.path / "generation_config.json"
        if generation.is_file():
            changed = renumber_config(read_json(generation), new_of, len(found))
            write_json(folder / "generation_config.json", changed)
        write_tokenizer_files(self.source, self.full, self.state, found, folder)
        if self.options.allow_remote_code:
            copy_code(self.source.path, folder)
        found.write(folder)

    def _held_out(
        self, counts: Counts, smaller: TextTokenizer, found: VocabularyMap
    ) -> tuple[Agreement, bool]:
        """Agreement on rows that chose nothing: the user's, else those of an estimate."""
        if self.options.held_out:
            return compare(self._rows(self.options.held_out), self.full, smaller, found.new_ids), False
        choice = self._choose(counts.chosen)
        guess = VocabularyMap(choice.old_ids, self.words.rows, {})
        tokenizer = self._in_memory(choice.old_ids)
        rows = self._rows(self.options.keep)
        return compare(rows, self.full, tokenizer, guess.new_ids, only=is_held), True

    def _in_memory(self, old_ids: np.ndarray) -> TextTokenizer:
        """A smaller tokenizer that is not written."""
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        names = {name: getattr(self.full.hf, name) for name in SPECIAL_NAMES}
        backend = Tokenizer.from_str(self.state.restricted(old_ids.tolist()))
        named = {name: token for name, token in names.items() if token is not None}
        return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **named))

    def _write_weights(self, folder: Path, found: VocabularyMap) -> int:
        rows = torch.from_numpy(found.old_ids)
        with console.progress() as bar:
            total = sum(info.size_bytes for info in self.weights.infos.values())
            task = bar.add_task(tr("writing weights", "写入权重"), total=total, detail="")
            write_rows(
                self.weights,
                folder,
                self.words,
                lambda _, tensor_VD: tensor_VD[rows],
                len(rows),
                allow_nan=self.options.allow_nan,
                progress=lambda done: bar.update(task, completed=done),
            )
        return sum(file.stat().st_size for file in weight_files(folder))

    def _prove(self, folder: Path, found: VocabularyMap) -> Any:
        """Logits on kept ids and perplexity of both models, on rows of the corpus whose words are all kept."""
        if not self.options.verify:
            parity.skipped(folder)
            return None
        return parity.gate(
            self.source.path,
            folder,
            lossless=True,
            probes=self._probes(found) or None,
            vocabulary=found.old_ids.tolist(),
            allow_remote_code=self.options.allow_remote_code,
            say=self.say,
        )

    def _scores(
        self, folder: Path, found: VocabularyMap, smaller: TextTokenizer
    ) -> tuple[TextScore | None, TextScore | None]:
        """Both models on the same short rows: those held out, else the first of the corpus."""
        if not self.options.verify:
            return None, None
        rows = self._rows(self.options.held_out or self.options.keep)
        texts = short_rows(rows, self.full)
        full, small = (
            Weights(place, allow_remote_code=self.options.allow_remote_code)
            for place in (self.source.path, folder)
        )
        before = score(full, self.full, texts, kept=found.old_ids)
        after = score(small, smaller, texts)
        self.say(score_line(before, after))
        return before, after

    def _probes(self, found: VocabularyMap) -> list[str]:
        """The first texts of the corpus that both tokenizers write with the same tokens."""
        probes: list[str] = []
        for batch in self._rows(self.options.keep):
            for ids, _ in self.full.encode_batch(batch):
                text = self.full.decode(ids)[:PROBE_CHARACTERS]
                plain = np.asarray(self.full.hf(text)["input_ids"], dtype=np.int64)
                if len(plain) > 1 and (found.new_ids[plain] >= 0).all() and text not in probes:
                    probes.append(text)
                if len(probes) == PROBE_ROWS:
                    return probes
        return probes

    def _choice_record(self, choice: Choice) -> dict[str, Any]:
        options = self.options
        return {
            "base": options.base,
            "base_rows": choice.base,
            "corpus_tokens": choice.corpus,
            "dropped": choice.dropped,
            "min_count": options.min_count,
            "size": options.size,
            "template": self.template.id,
            "keep": list(options.keep),
            "held_out": list(options.held_out),
        }
