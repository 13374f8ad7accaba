"""The models of one evaluation: the one that is asked for, and the base it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tuoling.infer.engine import Engine, GenerationSettings
from tuoling.infer.open_engine import gguf_file, open_engine
from tuoling.language import tr
from tuoling.models.source import find_model
from tuoling.text.templates import TEMPLATES


@dataclass(frozen=True, slots=True)
class Contender:
    """A model to be opened when its turn comes. name: "base", "tuned", or what the user calls it."""

    name: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def opened(self) -> Iterator[Engine]:
        """Its engine; the memory is free again afterwards."""
        engine = open_engine(self.path, **self.options)
        try:
            yield engine
        finally:
            engine.close()


def contenders(path: str, *, alone: bool, options: Mapping[str, Any]) -> tuple[list[Contender], str | None]:
    """Base and tuned model, or the one model where `alone` or no base is known; and why there is none.

    The base is asked in the template of the tuning, so that both see the same words.
    """
    one = [Contender("model", path, options)]
    if alone:
        return one, None
    if gguf_file(path) is not None:
        return one, tr("a GGUF file does not say what its base is", "GGUF 文件没有记录自己的基座")
    source = find_model(
        path, revision=options.get("revision"), base=options.get("base"), lora_alpha=options.get("lora_alpha")
    )
    base = str(source.weights_path) if source.is_adapter else _trained_from(source.run)
    if base is None:
        return one, tr("it names no base", "没有记录基座")
    if not Path(base).exists():
        return one, tr(f"its base is not here any more: {base}", f"它的基座已不在：{base}")
    template = options.get("template") or (source.template if source.template in TEMPLATES else None)
    return [
        Contender("base", base, {**_of_all(options), "template": template}),
        Contender("tuned", path, options),
    ], None


def rival(path: str, options: Mapping[str, Any]) -> Contender:
    """Another model, in its own template; called by its folder, or by the one above where many are called so."""
    place = Path(path.rstrip("/"))
    name = place.parent.name if place.name in ("run", "out") and place.parent.name else place.name
    return Contender(name, path, _of_all(options))


def _of_all(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are about the machine, not about one model."""
    shared = ("dtype", "device", "allow_remote_code", "quantization_bit")
    return {name: value for name, value in options.items() if name in shared}


def _trained_from(run: Mapping[str, Any] | None) -> str | None:
    """The weights a full fine-tune began with, as its run.json says."""
    return (
        str(run["base"]["path"])
        if run and isinstance(run.get("base"), Mapping) and "path" in run["base"]
        else None
    )


def greedy(engine: Engine, values: Mapping[str, Any]) -> GenerationSettings:
    """The engine's settings without chance, then what the user changes: two evaluations are to be the same."""
    standard = replace(engine.defaults, do_sample=False, temperature=1.0, top_p=1.0, top_k=0)
    return standard.with_values(values)
