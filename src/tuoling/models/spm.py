"""Sentencepiece models as fast tokenizers, with the merges in the order of the piece scores.

transformers 5.23 orders the merges by piece id, which differs from sentencepiece itself where scores do not
fall with the ids: LLaMA's runs of spaces score -1e9 but have the lowest ids, so "two  spaces" came out wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tuoling.errors import ModelError
from tuoling.language import tr

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.decoders import Decoder

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Piece types of sentencepiece's ModelProto."""

SPACE = "▁"


def bpe_from_pieces(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    add_dummy_prefix: bool = True,
    charsmap: bytes = b"",
) -> Tokenizer:
    """A BPE tokenizer that gives sentencepiece's own ids. `types` are ModelProto's piece types.

    charsmap: sentencepiece's precompiled normalisation table; empty for identity.
    """
    from tokenizers import AddedToken, Tokenizer, normalizers
    from tokenizers.models import BPE

    vocab = {piece: index for index, piece in enumerate(pieces)}
    unknown = next((piece for piece, kind in zip(pieces, types, strict=True) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges(vocab, scores, types),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Prepend(SPACE)] if add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = _byte_decoder(add_dummy_prefix)
    special = [p for p, kind in zip(pieces, types, strict=True) if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    defined = [p for p, kind in zip(pieces, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in defined])
    return tokenizer


def _byte_decoder(dummy: bool) -> Decoder:
    """Pieces to text where single bytes may stand among them."""
    from tokenizers import decoders

    strip = [decoders.Strip(" ", 1, 0)] if dummy else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _merges(vocab: dict[str, int], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Every split of a normal piece into two pieces, best score first (ties: lower id, as sentencepiece)."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, index in vocab.items():
        if types[index] != NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[index], index, cut, (left, right)))
    return [pair for *_, pair in sorted(found)]


def tokenizer_from_spm(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Read `tokenizer.model`. Returns the tokenizer and its own bos/eos/unk/pad tokens by their names.

    Raises ModelError where the file is no sentencepiece model.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise _unreadable(path) from error
    if not proto.pieces:
        raise _unreadable(path)
    spec = proto.trainer_spec
    pieces = [piece.piece for piece in proto.pieces]
    scores = [piece.score for piece in proto.pieces]
    types = [piece.type for piece in proto.pieces]
    charsmap = proto.normalizer_spec.precompiled_charsmap
    dummy = proto.normalizer_spec.add_dummy_prefix
    if spec.model_type == spec.BPE:
        tokenizer = bpe_from_pieces(pieces, scores, types, add_dummy_prefix=dummy, charsmap=charsmap)
    else:
        tokenizer = _unigram(pieces, scores, types, unk_id=spec.unk_id, dummy=dummy, charsmap=charsmap)
    ids = {
        "bos_token": spec.bos_id,
        "eos_token": spec.eos_id,
        "unk_token": spec.unk_id,
        "pad_token": spec.pad_id,
    }
    return tokenizer, {name: pieces[index] for name, index in ids.items() if 0 <= index < len(pieces)}


def _unigram(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    unk_id: int,
    dummy: bool,
    charsmap: bytes,
) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import Unigram

    tokenizer = Tokenizer(Unigram(list(zip(pieces, scores, strict=True)), unk_id, BYTE in types))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(charsmap)] if charsmap else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(" {2,}"), " ")])
    scheme = "always" if dummy else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    plain = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    tokenizer.decoder = _byte_decoder(dummy) if BYTE in types else plain
    special = [p for p, kind in zip(pieces, types, strict=True) if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return tokenizer


def _unreadable(path: Path) -> ModelError:
    return ModelError(
        tr("not a sentencepiece model", "不是 sentencepiece 模型文件"),
        where=str(path),
        remedy=tr("download the file again", "请重新下载该文件"),
    )
