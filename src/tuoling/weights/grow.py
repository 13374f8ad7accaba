"""A LLaMA-like model with more words: the pieces of a sentencepiece vocabulary merged into its own.

The model's own merges come first, so that text it writes well already is cut as before; new pieces join what is left.
A new row is the mean of the rows of the pieces that the word was written with until now, in the head too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuoling import console
from tuoling.data.sources import resolve_sources
from tuoling.errors import ModelError, OutputError
from tuoling.files import atomic_folder, atomic_write, read_json, sha256_file, write_json
from tuoling.language import tr
from tuoling.models.source import ModelSource, find_model
from tuoling.models.spm import NORMAL, SPACE
from tuoling.models.tokenizers import load_tokenizer
from tuoling.text.render import Segment
from tuoling.text.templates import choose_template
from tuoling.text.tokenizer import TextTokenizer
from tuoling.weights import parity
from tuoling.weights.companions import copy_code
from tuoling.weights.prune_bpe import BytePairs
from tuoling.weights.prune_corpus import Rows
from tuoling.weights.prune_files import tokenizer_home, write_renumbered
from tuoling.weights.prune_spm import SPM_NAMES, read_proto
from tuoling.weights.prune_tokenizer import TokenizerState
from tuoling.weights.prune_weights import WordTensors, word_tensors, write_rows
from tuoling.weights.tensors import TensorSource, open_weights
from tuoling.weights.vocabulary_map import renumber_config

if TYPE_CHECKING:
    from collections.abc import Iterable

REPORT_FILE = "grow.json"

RUNS_OF_SPACES = -1e8
"""LLaMA's runs of spaces score -1e9, where float32 cannot tell neighbours apart; new pieces stand above them."""


@dataclass(frozen=True)
class GrowReport:
    """added: new words. unreachable: pieces that merges never make, left out. present: pieces the model has already.

    tokens_before, tokens_after: of the measured texts, `characters` long.
    """

    out: Path
    rows_before: int
    rows_after: int
    added: int
    present: int
    unreachable: int
    characters: int
    tokens_before: int
    tokens_after: int
    parity: Any

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {**self.__dict__, "out": str(self.out)}
        return {**values, "parity": None if self.parity is None else asdict(self.parity)}


def grow_vocab(
    model: str | Path,
    out: Path,
    spm: Path,
    *,
    rows: Sequence[str] = (),
    verify: bool = True,
    allow_nan: bool = False,
    allow_remote_code: bool = False,
    say: Callable[[str], None] = console.note,
) -> GrowReport:
    """Write `out`: the model with the words of the sentencepiece file `spm` besides its own.

    rows: texts to count tokens on; else the parity probes. Raises ModelError where the model's tokenizer is no
    sentencepiece BPE, or the new one adds nothing.
    """
    if out.exists():
        raise OutputError(
            tr("already exists", "已经存在"), where=str(out), remedy=tr("choose another place", "换一个位置")
        )
    source = find_model(model)
    if source.is_adapter:
        raise ModelError(
            tr("this is an adapter; a vocabulary belongs to a whole model", "这是适配器；词表属于完整的模型"),
            where=str(source.path),
            remedy=tr("merge it first: tuoling merge", "请先合并：tuoling merge"),
        )
    weights = open_weights(source.path)
    words = word_tensors(source, weights, allow_remote_code=allow_remote_code)
    full = load_tokenizer(source, for_training=False)
    growth = plan_growth(full, read_proto(spm), source.path, words.rows)
    say(
        tr(
            f"{len(growth.pieces):,} new words; {growth.present:,} pieces are there already"
            + (f", {growth.unreachable:,} can never come out" if growth.unreachable else ""),
            f"新增 {len(growth.pieces):,} 个词；{growth.present:,} 个词片已有"
            + (f"，{growth.unreachable:,} 个永远不会被切出" if growth.unreachable else ""),
        )
    )
    with atomic_folder(out) as folder:
        grown = _write_settings(source, full, growth, spm, folder)
        if allow_remote_code:
            copy_code(source.path, folder)
        rows_after = len(growth.old_ids)
        _write_weights(weights, words, growth, folder, allow_nan)
        verdict = None
        if verify:
            verdict = parity.gate(
                source.path,
                folder,
                lossless=True,
                vocabulary=growth.old_ids,
                allow_remote_code=allow_remote_code,
                say=say,
            )
        else:
            parity.skipped(folder)
        characters, before, after = _measure(source, full, grown, rows)
        report = GrowReport(
            out,
            words.rows,
            rows_after,
            len(growth.pieces),
            growth.present,
            growth.unreachable,
            characters,
            before,
            after,
            verdict,
        )
        write_json(folder / REPORT_FILE, report.to_json())
    return report


@dataclass(frozen=True)
class Growth:
    """pieces: new words, best first. merges: that make them. made_of: old ids each was written with until now.

    old_ids: of every row after, the row before, -1 for a new one. text: the grown tokenizer.json.
    """

    pieces: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    made_of: tuple[tuple[int, ...], ...]
    old_ids: tuple[int, ...]
    present: int
    unreachable: int
    text: str

    @property
    def new_of(self) -> dict[int, int]:
        """Old id → new id."""
        return {old: new for new, old in enumerate(self.old_ids) if old >= 0}


def plan_growth(full: TextTokenizer, proto: Any, where: Path, model_rows: int) -> Growth:
    """Which pieces become words, under which ids. Raises ModelError where they cannot."""
    backend = full.hf.backend_tokenizer
    state = TokenizerState(backend.to_str())
    own = {index: token for index, token in state.tokens.items() if state.token_id(token) == index}
    if state.kind != "BPE" or state.byte_level or not any(SPACE in token for token in own.values()):
        raise ModelError(
            tr(
                "only a sentencepiece BPE tokenizer (LLaMA's kind) can grow",
                "只有 sentencepiece BPE（LLaMA 一类）的分词器可以扩充",
            ),
            where=str(where),
        )
    if sorted(own) != list(range(len(own))) or max(state.tokens) >= model_rows:
        raise ModelError(
            tr(
                "the tokenizer's ids have gaps, or more ids than the model has rows",
                "分词器编号不连续，或多于模型的行数",
            ),
            where=str(where),
        )
    normal = [piece for piece in proto.pieces if piece.type == NORMAL and SPACE * 2 not in piece.piece]
    known = set(state.tokens.values())
    ordered = sorted(normal, key=lambda piece: -piece.score)  # stable: ties keep their order
    wanted = [piece.piece for piece in ordered if piece.piece not in known]
    pieces, merges = reachable(state, wanted)
    if not pieces:
        raise ModelError(tr("it has no new word", "其中没有新词"), where=str(where))
    made_of = tuple(tuple(token.id for token in backend.model.tokenize(piece)) for piece in pieces)
    beyond = sorted(index for index in state.tokens if index >= len(own))
    old_ids = (*range(len(own)), *[-1] * len(pieces), *beyond)
    return Growth(
        tuple(pieces),
        tuple(merges),
        made_of,
        old_ids,
        present=len(normal) - len(wanted),
        unreachable=len(wanted) - len(pieces),
        text=state.extended(pieces, merges),
    )


def reachable(state: TokenizerState, wanted: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The pieces that really come out when merged after the tokenizer's own merges, and the merges that make them."""
    pieces = list(wanted)
    while True:
        vocab = {token: index for index, token in state.tokens.items()}
        vocab.update({piece: len(vocab) + place for place, piece in enumerate(pieces)})
        merges = [
            (piece[:cut], piece[cut:])
            for piece in pieces
            for cut in range(1, len(piece))
            if piece[:cut] in vocab and piece[cut:] in vocab
        ]
        pairs = BytePairs(vocab, [*state.merges, *merges])
        made = [piece for piece in pieces if pairs.needs(piece) is not None]
        if len(made) == len(pieces):
            return pieces, merges
        pieces = made


def _write_weights(
    weights: TensorSource, words: WordTensors, growth: Growth, folder: Path, allow_nan: bool
) -> None:
    old = torch.tensor(growth.old_ids)
    places = (old < 0).nonzero()[:, 0].tolist()

    def grow(_: str, tensor: torch.Tensor) -> torch.Tensor:
        grown = tensor[old.clamp(min=0)]
        for place, ids in zip(places, growth.made_of, strict=True):
            grown[place] = tensor[list(ids)].float().mean(0).to(tensor.dtype)
        return grown

    write_rows(weights, folder, words, grow, len(growth.old_ids), allow_nan=allow_nan)


def _write_settings(
    source: ModelSource, full: TextTokenizer, growth: Growth, spm: Path, folder: Path
) -> TextTokenizer:
    """Config and tokenizer files; returns the tokenizer as it is read from them."""
    new_of, rows = growth.new_of, len(growth.old_ids)
    write_json(folder / "config.json", renumber_config(source.config, new_of, rows))
    generation = source.path / "generation_config.json"
    if generation.is_file():
        write_json(folder / generation.name, renumber_config(read_json(generation), new_of, rows))
    home = tokenizer_home(source)
    for name in SPM_NAMES:
        content = _grown_proto(home / name, growth) if (home / name).is_file() else None
        if content is not None:
            with atomic_write(folder / name, binary=True) as file:
                file.write(content)
    write_renumbered(source, full, growth.text, new_of, folder)
    write_json(
        folder / "grown_from.json",
        {
            "full": {"path": str(source.path.absolute()), "named": source.name},
            "tokenizer": {"path": str(spm.absolute()), "sha256": sha256_file(spm)},
            "added": len(growth.pieces),
        },
    )
    return load_tokenizer(folder, for_training=False)


def _grown_proto(path: Path, growth: Growth) -> bytes | None:
    """The model's sentencepiece file with the new pieces at its end, scored below its own; None where it differs."""
    proto = read_proto(path)
    if len(proto.pieces) != growth.old_ids.index(-1):
        return None
    lowest = min(
        piece.score for piece in proto.pieces if piece.type == NORMAL and piece.score > RUNS_OF_SPACES
    )
    for number, text in enumerate(growth.pieces, 1):
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = text, lowest - number, NORMAL
    proto.trainer_spec.vocab_size = len(proto.pieces)
    written: bytes = proto.SerializeToString()
    return written


def _measure(
    source: ModelSource, full: TextTokenizer, grown: TextTokenizer, specs: Sequence[str]
) -> tuple[int, int, int]:
    """(characters, tokens before, tokens after) of the user's rows, else of the parity probes."""
    batches: Iterable[list[list[Segment]]]
    if specs:
        template, _ = choose_template(
            requested=None, saved=source.template, tokenizer=full, family_default=source.family.template
        )
        batches = Rows(resolve_sources(specs), template)
    else:
        batches = [[[Segment(text, False)] for text in parity.PROBES]]
    characters = before = after = 0
    for batch in batches:
        characters += sum(len(segment.text) for segments in batch for segment in segments)
        before += sum(len(ids) for ids, _ in full.encode_batch(batch))
        after += sum(len(ids) for ids, _ in grown.encode_batch(batch))
    return characters, before, after
