"""Where an adapter's files lie, in every layout since 2023. Nothing heavy is imported, and no pickle is opened."""

from __future__ import annotations

import zipfile
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TRAINER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What a Trainer calls its weights: in checkpoints of 2023 these hold the adapter alone."""

_HEAD = 4 << 20  # names of 100,000 tensors fit; the tensors themselves are not read


def is_adapter_folder(folder: Path) -> bool:
    """True for an adapter of PEFT, and for a Trainer checkpoint that holds only LoRA tensors and no config."""
    if (folder / ADAPTER_CONFIG).is_file():
        return True
    if (folder / "config.json").is_file():
        return False
    if any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        return True
    return any(names_lora(folder / name) for name in TRAINER_WEIGHTS)


def adapter_config_file(folder: Path) -> Path | None:
    """adapter_config.json of the folder, or, for a Trainer checkpoint without one, of the run it lies in."""
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    return next((place / ADAPTER_CONFIG for place in places if (place / ADAPTER_CONFIG).is_file()), None)


def adapter_weights_file(folder: Path) -> Path | None:
    """The file with the adapter's tensors; an empty `adapter_model.bin` gives way to a Trainer's file beside it."""
    names = [*ADAPTER_WEIGHTS, *TRAINER_WEIGHTS]
    present = [folder / name for name in names if (folder / name).is_file()]
    return next((file for file in present if names_lora(file)), present[0] if present else None)


def names_lora(file: Path) -> bool:
    """True where the names inside a safetensors file or a pickle of tensors speak of LoRA.

    A pickle is searched as bytes: names stand in it as plain text, and nothing of it is executed.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(member) as opened:
                    return b"lora_" in opened.read(_HEAD)
        with file.open("rb") as opened:
            return b"lora_" in opened.read(_HEAD)
    except (OSError, zipfile.BadZipFile, StopIteration):
        return False
