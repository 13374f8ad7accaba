"""The tokenizer files of a pruned model: all of them renumbered, none left that would contradict another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import console
from tuoling.errors import ModelError
from tuoling.files import atomic_write, read_json, write_json
from tuoling.language import tr
from tuoling.weights.companions import copy_companions
from tuoling.weights.prune_spm import SPM_NAMES, pruned_proto
from tuoling.weights.prune_tokenizer import SPECIAL_NAMES, TokenizerState

if TYPE_CHECKING:
    from tuoling.models.source import ModelSource
    from tuoling.text.tokenizer import TextTokenizer
    from tuoling.weights.vocabulary_map import VocabularyMap

RENUMBERED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    *SPM_NAMES,
)
"""Files that hold ids, or the order of words: written anew, never copied."""


def write_tokenizer_files(
    source: ModelSource, full: TextTokenizer, state: TokenizerState, found: VocabularyMap, folder: Path
) -> None:
    """The files of a pruned tokenizer, sentencepiece's own among them."""
    home = tokenizer_home(source)
    for name in SPM_NAMES:
        if (home / name).is_file():
            _write_spm(home / name, state, found, folder / name)
    write_renumbered(source, full, state.restricted(found.old_ids.tolist()), found.new_of(), folder)


def write_renumbered(
    source: ModelSource, full: TextTokenizer, text: str, new_of: Mapping[int, int], folder: Path
) -> None:
    """`text` as tokenizer.json; the other layouts that the model's own folder has; companions that hold no ids.

    A sentencepiece file must have been written before: one that lies in the model's folder only is not copied.
    """
    home = tokenizer_home(source)
    _write_text(folder / "tokenizer.json", text)
    _write_tokenizer_config(home, full, new_of, folder)
    if (home / "added_tokens.json").is_file():
        added = read_json(home / "added_tokens.json")
        write_json(
            folder / "added_tokens.json",
            {token: new_of[index] for token, index in added.items() if index in new_of},
        )
    if (home / "vocab.json").is_file() and (home / "merges.txt").is_file():
        model = json.loads(text)["model"]
        write_json(folder / "vocab.json", model["vocab"])
        lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
        _write_text(folder / "merges.txt", "\n".join(lines))
    for place in dict.fromkeys((home, source.path)):
        for name in copy_companions(place, folder):
            if name in RENUMBERED:
                (folder / name).unlink()


def tokenizer_home(source: ModelSource) -> Path:
    """The folder whose tokenizer files are used: the checkpoint's own, else its run's."""
    names = ("tokenizer.json", "vocab.json", *SPM_NAMES)
    for place in (source.path, source.run_folder):
        if any((place / name).is_file() for name in names) or any(place.glob("*_tokenizer.json")):
            return place
    return source.path


def _write_tokenizer_config(home: Path, full: TextTokenizer, new_of: Mapping[int, int], folder: Path) -> None:
    path = home / "tokenizer_config.json"
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] = {
            str(new_of[int(index)]): entry
            for index, entry in settings["added_tokens_decoder"].items()
            if int(index) in new_of
        }
    for name in SPECIAL_NAMES:
        token = getattr(full.hf, name, None)
        if token is not None:
            settings.setdefault(name, token)
    # a sentencepiece file has no rule for the begin token of its own, and a tokenizer.json made from one has
    if not (home / "tokenizer.json").is_file():
        settings.setdefault("add_bos_token", full.adds_bos)
    write_json(folder / "tokenizer_config.json", settings)


def _write_spm(path: Path, state: TokenizerState, found: VocabularyMap, out: Path) -> None:
    content = pruned_proto(path, found.old_ids.tolist(), state.tokens)
    if content is None:
        console.warn(
            tr(
                f"{path.name} holds other words than the tokenizer in use: it is left out",
                f"{path.name} 与实际使用的分词器不一致：不写出该文件",
            )
        )
        return
    with atomic_write(out, binary=True) as file:
        file.write(content)


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text + "\n")


def require_same_special(full: TextTokenizer, smaller: TextTokenizer, where: Path) -> None:
    """Raise ModelError where the written files name other special tokens, or begin a text otherwise."""
    for name in SPECIAL_NAMES:
        before, after = getattr(full.hf, name, None), getattr(smaller.hf, name, None)
        if before != after:
            raise ModelError(
                tr(
                    f"{name} was {before!r} and would be {after!r}",
                    f"{name} 原为 {before!r}，写出后成了 {after!r}",
                ),
                where=str(where),
            )
    if full.adds_bos != smaller.adds_bos:
        raise ModelError(
            tr("texts would begin otherwise (bos_token)", "文本开头会不同（bos_token）"), where=str(where)
        )
