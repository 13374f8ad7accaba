"""From a path or hub id to an engine that is ready to answer: everything is read from what lies there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuoling import console
from tuoling.files import read_json, sha256_text
from tuoling.infer.engine import Engine, GenerationSettings, settings_from_config
from tuoling.language import tr
from tuoling.models.quantization import chosen as chosen_quantization
from tuoling.models.source import ModelSource, find_model
from tuoling.text.templates import choose_template

if TYPE_CHECKING:
    from collections.abc import Iterable


def open_engine(
    path_or_id: str,
    *,
    template: str | None = None,
    base: str | None = None,
    lora_alpha: float | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    allow_remote_code: bool = False,
    quantization_bit: int | None = None,
) -> Engine:
    """Find, load and wrap a run, adapter, model folder or hub id.

    template: overrides the one the weights were tuned with (a warning says so where they differ).
    base:     overrides where an adapter's base lies. lora_alpha: of an adapter whose files do not say it.
    quantization_bit: 8 or 4 bits for the base, 0 for none; None: as it was trained.
    """
    source = find_model(path_or_id, revision=revision, base=base, lora_alpha=lora_alpha)
    from tuoling.infer.torch_engine import TorchEngine
    from tuoling.models.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(source, for_training=False)
    chosen, reason = choose_template(
        requested=template,
        saved=source.template,
        tokenizer=tokenizer,
        family_default=source.family.template,
    )
    changed = bool(template and source.template and template != source.template)
    (console.warn if changed else console.note)(reason)
    quantization = chosen_quantization(quantization_bit, source.quantization)
    if quantization:
        console.note(tr(f"base weights in {quantization}", f"基座权重为 {quantization}"))
    model = load_model(
        source,
        dtype=dtype,
        device=device,
        for_training=False,
        allow_remote_code=allow_remote_code,
        quantization=quantization,
    )
    defaults, end_ids = _generation_config(source)
    return TorchEngine(
        model,
        tokenizer,
        chosen,
        defaults=defaults,
        stops=() if changed else source.stops,
        end_ids=end_ids,
        system=source.system,
        fingerprint=sha256_text(f"{source.fingerprint()}\n{chosen.fingerprint()}\n{dtype}{quantization}"),
    )


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
