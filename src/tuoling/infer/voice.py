"""How a model is asked and how it answers, read from what lies beside its weights: template, stops, settings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import console
from tuoling.files import read_json, sha256_text
from tuoling.infer.engine import GenerationSettings, settings_from_config
from tuoling.models.source import ModelSource
from tuoling.text.templates import Template, choose_template

if TYPE_CHECKING:
    from tuoling.infer.open_engine import EngineOptions
    from tuoling.text.tokenizer import TextTokenizer


def adapter_name(source: ModelSource) -> str:
    """What an adapter is called where several are loaded: its folder's name."""
    return Path(source.name).expanduser().resolve().name or source.path.name


def template_of(source: ModelSource, tokenizer: TextTokenizer, options: EngineOptions) -> Template:
    requested = options.get("template")
    chosen, reason = choose_template(
        requested=requested,
        saved=source.template,
        tokenizer=tokenizer,
        family_default=source.family.template,
    )
    (console.warn if _changed(source, options) else console.note)(reason)
    return chosen


def _changed(source: ModelSource, options: EngineOptions) -> bool:
    """Whether the user asked for another template than the weights were tuned with."""
    requested = options.get("template")
    return bool(requested and source.template and requested != source.template)


def voice_of(
    source: ModelSource, options: EngineOptions, template: Template, precision: str
) -> dict[str, Any]:
    """How one source answers: TorchEngine's keywords."""
    defaults, end_ids = _generation_config(source)
    return {
        "defaults": defaults,
        "stops": () if _changed(source, options) else source.stops,
        "end_ids": end_ids,
        "system": source.system,
        "fingerprint": sha256_text(f"{source.fingerprint()}\n{template.fingerprint()}\n{precision}"),
    }


def _generation_config(source: ModelSource) -> tuple[GenerationSettings, Iterable[int]]:
    """Settings and end tokens from the nearest generation_config.json: the adapter's, else the base's."""
    for folder in (source.path, source.run_folder, source.weights_path):
        file = folder / "generation_config.json"
        if file.is_file():
            config = read_json(file)
            ends = config.get("eos_token_id")
            ends = ends if isinstance(ends, list) else [ends]
            return settings_from_config(config), [end for end in ends if isinstance(end, int)]
    return GenerationSettings(), []
