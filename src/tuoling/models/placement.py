"""Where a model's layers lie when one device does not hold them all: the cards, then memory, then the disk."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tuoling import console, environment
from tuoling.errors import UsageError
from tuoling.language import tr

CARD_SHARE = 0.9
"""Of a card's free memory, weights may take this much: keys, values and workspace need the rest."""

_SIZE = re.compile(r"\d+(\.\d+)?\s*([KMGT]i?B)", re.IGNORECASE)


def parse_limits(text: str | None) -> dict[int | str, str] | None:
    """`0=10GiB,cpu=20GiB` → {0: "10GiB", "cpu": "20GiB"}; None for None. Raises UsageError."""
    if not text:
        return None
    limits: dict[int | str, str] = {}
    for part in text.split(","):
        place, _, size = (word.strip() for word in part.partition("="))
        if not (place == "cpu" or place.isdigit()) or not _SIZE.fullmatch(size):
            raise UsageError(
                tr(f"{part!r} is no limit", f"{part!r} 不是合法的上限"),
                where="--max-memory",
                remedy="--max-memory 0=10GiB,1=10GiB,cpu=20GiB",
            )
        limits[int(place) if place.isdigit() else place] = size
    return limits


def keywords(device: str, weight_bytes: int, limits: Mapping[int | str, str] | None) -> dict[str, Any]:
    """What `from_pretrained` is told of places: one device, or `auto` where limits are set or the card is too small."""
    if limits is None:
        if device == "cpu":
            return {}
        fits = device != "cuda" or weight_bytes <= CARD_SHARE * environment.memory_available_bytes("cuda")
        if fits:
            return {"device_map": {"": device}}
    placed: dict[str, Any] = {"device_map": "auto"}
    return placed if limits is None else {**placed, "max_memory": dict(limits)}


class OffloadFolder(TemporaryDirectory[str]):
    """Weights that are read from the disk when their layer computes; gone with the model that holds on to it."""

    def __init__(self) -> None:
        parent = environment.cache_dir()
        parent.mkdir(parents=True, exist_ok=True)
        super().__init__(prefix="offload-", dir=parent, ignore_cleanup_errors=True)


def is_spread(model: Any) -> bool:
    """Whether the layers lie in several places, and move when they compute."""
    places = set(getattr(model, "hf_device_map", {}).values())
    return len(places) > 1 or "disk" in places


def say_where(model: Any) -> None:
    """How many parts lie on each card, in memory and on the disk."""
    counts = Counter(str(place) for place in model.hf_device_map.values())
    names = {"cpu": tr("memory", "内存"), "disk": tr("disk", "磁盘")}
    said = ", ".join(
        f"{names.get(place, f'cuda:{place}' if place.isdigit() else place)}: {count}"
        for place, count in counts.items()
    )
    console.note(tr(f"the model's parts lie on {said}", f"模型各部分的位置：{said}"))


def first_device(model: Any) -> torch.device:
    """Where the ids of a prompt go. Weights on meta lie elsewhere and come when they are needed."""
    weight = model.get_input_embeddings().weight
    return (
        weight.device
        if not weight.is_meta
        else torch.device(_execution(model.get_input_embeddings()) or "cpu")
    )


def follow_base(model: Any, name: str) -> None:
    """Put an adapter's weights, still empty, where the layer under them computes: PEFT puts them where it lies."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            place = _execution(layer.get_base_layer()) or "cpu"
            for kind in layer.adapter_layer_names:
                part = getattr(layer, kind, None)
                if not isinstance(part, torch.nn.ModuleDict | torch.nn.ParameterDict) or name not in part:
                    continue
                if isinstance(part, torch.nn.ModuleDict):
                    part[name].to_empty(device=place)
                else:
                    empty = torch.empty_like(part[name], device=place)
                    part[name] = torch.nn.Parameter(empty, requires_grad=False)


def _execution(module: Any) -> Any:
    """Where a module computes; None where nobody says."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        place = getattr(one, "execution_device", None)
        if place is not None:
            return place
    weight = getattr(module, "weight", None)
    return None if weight is None or weight.is_meta else weight.device
