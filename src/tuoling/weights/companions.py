"""What lies beside the weights of a model and belongs to it: tokenizer, settings, licence, code, lineage."""

from __future__ import annotations

import shutil
from pathlib import Path

from tuoling.models.licence import of_folder, write_lineage

_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "template.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


def copy_companions(source: Path, out: Path) -> list[str]:
    """Copy what belongs to a model beside its weights: tokenizer, generation settings, template record, licence.

    What `out` has already is kept; what went into `source`, and its licences, joins `out`'s lineage.json. Returns the
    names that were copied.
    """
    write_lineage(out, of_folder(source))
    copied = []
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (out / file.name).exists():
                shutil.copyfile(file, out / file.name)
                copied.append(file.name)
    return copied


def copy_code(source: Path, out: Path) -> None:
    """Copy a model's own Python code beside its weights, where it was allowed to run: the result needs it too."""
    for file in source.glob("*.py"):
        shutil.copyfile(file, out / file.name)
