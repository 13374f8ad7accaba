"""A sentencepiece file with fewer pieces, for the tools that read `tokenizer.model` and not `tokenizer.json`.

Sentencepiece has no list of merges: two neighbours join where the whole is a piece, the best score first. Pieces and
scores are kept as they are, in their order, so the merges among the kept ones keep theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuoling.errors import ModelError
from tuoling.language import tr

SPM_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def read_proto(path: Path) -> Any:
    """The file as sentencepiece's ModelProto. Raises ModelError where it is none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ModelError(
            tr(f"not a sentencepiece model: {error}", f"不是 sentencepiece 模型文件：{error}"),
            where=str(path),
        ) from error
    if not proto.pieces:
        raise ModelError(tr("it has no pieces", "其中没有词片"), where=str(path))
    return proto


def pruned_proto(path: Path, old_ids: Sequence[int], tokens: Mapping[int, str]) -> bytes | None:
    """The file with the kept pieces only; None where its pieces are not those of the tokenizer in use.

    old_ids: kept ids, ascending; the new id of each is its place. tokens: old id → token of the tokenizer in use.
    """
    proto = read_proto(path)
    inside = [index for index in old_ids if index < len(proto.pieces)]
    if any(proto.pieces[index].piece != tokens.get(index) for index in inside):
        return None
    new_of = {old: new for new, old in enumerate(old_ids)}
    kept = [proto.pieces[index] for index in inside]
    smaller = type(proto)()
    smaller.CopyFrom(proto)
    del smaller.pieces[:]
    smaller.pieces.extend(kept)
    spec = smaller.trainer_spec
    spec.vocab_size = len(kept)
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        setattr(spec, name, new_of.get(getattr(proto.trainer_spec, name), -1))
    written: bytes = smaller.SerializeToString()
    return written
