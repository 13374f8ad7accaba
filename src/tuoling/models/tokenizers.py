"""The tokenizer of a folder by the files that lie there: class names of 2023 in the configs are not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import console, environment
from tuoling.errors import DataError, ModelError
from tuoling.files import read_json
from tuoling.language import tr
from tuoling.models.adapter_files import is_adapter_folder
from tuoling.models.source import ModelSource, find_model, is_hub_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from tuoling.text.tokenizer import TextTokenizer

_SPM_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_USUAL = {  # only where no file names the token, and only if the vocabulary has it as a special token
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos_token": ("</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<eos>"),
    "unk_token": ("<unk>",),
    "pad_token": ("<pad>", "[PAD]", "<|padding|>"),
}


class NoTokenizer(ModelError):
    """No file of a tokenizer lies there; a damaged one is another error."""


def load_tokenizer(source: ModelSource | str | Path, *, for_training: bool = True) -> TextTokenizer:
    """The tokenizer of a model that was found, of a folder, of a `tokenizer.json` file, or of a hub id.

    An adapter's own files come first, then its run's, then its base's. for_training: print every finding of the
    tokenizer check and refuse its errors (no end token, more ids than embeddings); else only warn of errors.
    Raises NoTokenizer where there is none, ModelError where it cannot be used.
    """
    from tuoling.text.checks import check_tokenizer
    from tuoling.text.tokenizer import TextTokenizer

    environment.quiet_libraries()
    file = _find_file(source)
    tokenizer = TextTokenizer(_build(file))
    config = source.config if isinstance(source, ModelSource) else _object(file.parent / "config.json")
    findings = check_tokenizer(
        tokenizer,
        vocab_rows=config.get("vocab_size"),
        config=config or None,
        generation_config=_object(file.parent / "generation_config.json") or None,
    )
    for finding in findings:
        if finding.level == "error":
            if for_training:
                raise ModelError(finding.message, where=str(file))
            console.warn(f"{file.parent.name}: {finding.message}")
        elif for_training:
            console.note(f"{file.parent.name}: {finding.message}")
    return tokenizer


def _find_file(source: ModelSource | str | Path) -> Path:
    if isinstance(source, ModelSource):
        folders = [source.path, source.run_folder]
        folders += [source.base.path] if source.base else []
        return _first_file(folders)
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "run.json").is_file() or is_adapter_folder(path):
            return _find_file(find_model(str(path)))
        return _first_file([path])
    if is_hub_id(str(source)):
        from tuoling.models.hub import fetch

        return _first_file([fetch(str(source), weights=False)])
    raise ModelError(tr("no such folder", "没有这个目录"), where=str(source))


def _first_file(folders: list[Path]) -> Path:
    for folder in dict.fromkeys(folders):
        candidates = [folder / "tokenizer.json", *sorted(folder.glob("*_tokenizer.json"))]
        candidates += [folder / name for name in _SPM_FILES]
        candidates += [folder / "vocab.json"] if (folder / "merges.txt").is_file() else []
        for candidate in candidates:
            if candidate.is_file():
                return candidate
    raise NoTokenizer(
        tr("the model folder has no tokenizer", "模型目录中没有分词器"),
        where=str(folders[0]),
        remedy=tr(
            "copy tokenizer.json (or tokenizer.model) of the same model into the folder",
            "请把同一模型的 tokenizer.json（或 tokenizer.model）放进该目录",
        ),
    )


def _build(file: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    own: dict[str, str] = {}
    if file.name in _SPM_FILES or file.suffix == ".model":
        from tuoling.models.spm import tokenizer_from_spm

        backend, own = tokenizer_from_spm(file)
        _add_tokens(backend, file.parent)
    elif file.name == "vocab.json":
        backend = _byte_level_bpe(file)
    else:
        backend = _from_json(file)
    backend.no_padding()  # a file may carry the padding and cutting of whoever saved it
    backend.no_truncation()
    settings = _object(file.parent / "tokenizer_config.json")
    special = _special_tokens(backend, file.parent, settings, own)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_chat_template(file.parent, settings),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special,
        **_begin_token(settings, known=bool(own) and "bos_token" in special),
    )


def _begin_token(settings: dict[str, Any], *, known: bool) -> dict[str, bool]:
    """Whether text begins with the begin token: as the config says, else as tokenizer.json does it by itself.

    known: a sentencepiece model, which has no such rule of its own; LLaMA's habit is to begin with it.
    """
    said = settings.get("add_bos_token")
    if isinstance(said, bool) or known:
        return {"add_bos_token": said if isinstance(said, bool) else True, "add_eos_token": False}
    return {}


def _from_json(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception
        raise ModelError(
            tr(f"not a usable tokenizer file: {error}", f"分词器文件不可用：{error}"),
            where=str(file),
            remedy=tr("download the file again", "请重新下载该文件"),
        ) from error


def _byte_level_bpe(vocab: Path) -> Tokenizer:
    """GPT-2's two files."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    try:
        backend = Tokenizer(BPE.from_file(str(vocab), str(vocab.with_name("merges.txt"))))
    except Exception as error:  # the Rust side raises bare Exception
        raise ModelError(
            tr(f"not a usable vocabulary: {error}", f"词表文件不可用：{error}"), where=str(vocab)
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, vocab.parent)
    return backend


def _add_tokens(backend: Tokenizer, folder: Path) -> None:
    """Tokens that were added after the vocabulary was made, at the ids the folder says."""
    from tokenizers import AddedToken

    added = {int(index): token for token, index in _object(folder / "added_tokens.json").items()}
    for index, entry in (_object(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
        added.setdefault(int(index), entry["content"] if isinstance(entry, dict) else str(entry))
    for index in sorted(added):
        if backend.token_to_id(added[index]) == index:
            continue
        if index != backend.get_vocab_size():
            raise ModelError(
                tr(
                    f"added token {added[index]!r} has id {index}, the next free id is {backend.get_vocab_size()}",
                    f"新增词 {added[index]!r} 的编号是 {index}，而下一个空编号是 {backend.get_vocab_size()}",
                ),
                where=str(folder),
            )
        backend.add_special_tokens([AddedToken(added[index], normalized=False, special=True)])


def _special_tokens(
    backend: Tokenizer, folder: Path, settings: dict[str, Any], own: dict[str, str]
) -> dict[str, str]:
    """bos, eos, unk and pad: what tokenizer_config.json says, then the other files, then the usual names.

    A token that the vocabulary does not have is passed over: adding it would make an id without an embedding.
    """
    special_map = _object(folder / "special_tokens_map.json")
    config = _object(folder / "config.json")
    in_file = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    found: dict[str, str] = {}
    for name in _NAMES:
        by_id = config.get(f"{name}_id")
        candidates = [_content(settings.get(name)), _content(special_map.get(name)), own.get(name)]
        if name != "unk_token" and isinstance(by_id, int) and by_id >= 0 and not any(candidates):
            candidates.append(backend.id_to_token(by_id))
        candidates += [token for token in _USUAL[name] if token in in_file]
        for token in candidates:
            if token and backend.token_to_id(token) is not None:
                found[name] = token
                break
    return found


def _content(value: Any) -> str | None:
    """A special token is written as text, or as an AddedToken's dictionary."""
    return value.get("content") if isinstance(value, dict) else value


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template") or _object(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _object(path: Path) -> dict[str, Any]:
    """A JSON object beside the tokenizer; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except (DataError, json.JSONDecodeError) as error:
        raise ModelError(str(error), where=str(path)) from error
    return value if isinstance(value, dict) else {}
