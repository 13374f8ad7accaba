"""The side panel of the web page: which model, which settings, and which of them matter just now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuoling.infer.engine import Engine, GenerationSettings
from tuoling.infer.memory import prompt_budget
from tuoling.serve.web_answer import WebModels, Wish
from tuoling.serve.web_texts import PageTexts

RANGES: dict[str, tuple[float, float, float]] = {
    "max_new_tokens": (1, 2000, 1),
    "min_new_tokens": (0, 300, 1),
    "temperature": (0, 2, 0.05),
    "top_p": (0, 1, 0.01),
    "top_k": (0, 100, 1),
    "num_beams": (1, 10, 1),
    "repetition_penalty": (0.1, 10, 0.05),
    "no_repeat_ngram_size": (0, 10, 1),
}
"""Setting → lowest, highest, step of its slider: Chinese-Vicuna's, with 0 where it means "off"."""

KNOBS = (
    "model",
    "other",
    "system",
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "num_beams",
    "show_beams",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "memory_tokens",
)
"""The order of the panel, and of the values that events bring along."""

NOBODY = ""
"""The choice "compare with nobody"."""


@dataclass(frozen=True)
class Controls:
    """The panel's components by knob, and its reset button."""

    knobs: Mapping[str, Any]
    reset: Any

    @property
    def inputs(self) -> list[Any]:
        """Components in the order of KNOBS."""
        return [self.knobs[name] for name in KNOBS]


def limit_tokens(engine: Engine, memory_tokens: int | None = None) -> int:
    """Prompt and answer together: what the model can take, or what was asked for."""
    return prompt_budget(memory_tokens, engine.context_tokens, engine.defaults.max_new_tokens)[1]


def defaults(models: WebModels) -> dict[str, Any]:
    """The panel's values for a person who has chosen nothing: the model's own settings."""
    engine = models.first
    settings = engine.defaults
    sampling = settings if settings.samples else GenerationSettings(temperature=0.7, top_p=0.9, top_k=40)
    return {
        "model": models.names[0],
        "other": NOBODY,
        "system": engine.system or "",
        "max_new_tokens": min(
            settings.max_new_tokens, int(RANGES["max_new_tokens"][1]), limit_tokens(engine)
        ),
        "min_new_tokens": settings.min_new_tokens,
        "do_sample": settings.samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": None,
        "num_beams": settings.num_beams,
        "show_beams": False,
        "repetition_penalty": settings.repetition_penalty,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        "memory_tokens": limit_tokens(engine),
    }


def wish_of(values: Sequence[Any], models: WebModels) -> Wish:
    """What the panel asks for. Raises UsageError for a value out of range."""
    given = dict(zip(KNOBS, values, strict=True))
    name = given["model"] if given["model"] in models.engines else models.names[0]
    names = (name, given["other"]) if given["other"] in models.engines and given["other"] != name else (name,)
    samples = bool(given["do_sample"])
    chosen = {knob: given[knob] for knob in (*RANGES, "seed") if given[knob] is not None}
    if not samples:
        for knob in ("temperature", "top_p", "top_k", "seed"):
            chosen.pop(knob, None)
    longest = int(chosen.get("max_new_tokens", 1))
    chosen["min_new_tokens"] = min(int(chosen.get("min_new_tokens", 0)), longest)
    settings = GenerationSettings(stop=models.engines[name].defaults.stop)
    return Wish(
        models=names,
        settings=settings.with_values({**chosen, "do_sample": samples}),
        system=str(given["system"] or "").strip(),
        memory_tokens=int(given["memory_tokens"]) if given["memory_tokens"] else None,
    )


def idle_knobs(values: Mapping[str, Any]) -> set[str]:
    """Knobs that change nothing while the others stand as they do."""
    idle = set()
    if not values["do_sample"]:
        idle |= {"temperature", "top_p", "top_k", "seed"}
    elif not values["temperature"]:
        idle |= {"top_p", "top_k", "seed"}
    if (values["num_beams"] or 1) <= 1:
        idle.add("show_beams")
    return idle


def build_panel(models: WebModels, texts: PageTexts) -> Controls:
    """Make the components, in the order of KNOBS, with the model's own values."""
    import gradio as gr

    values = defaults(models)
    idle = idle_knobs(values)
    several = len(models.engines) > 1
    knobs: dict[str, Any] = {}
    for name in KNOBS:
        label, info = texts.knobs[name]
        same: dict[str, Any] = {
            "value": values[name],
            "label": label,
            "interactive": name not in idle,
            "elem_id": f"knob-{name}",
            "elem_classes": "knob",
        }
        if info and name != "show_beams":
            same["info"] = info
        if name == "model":
            knobs[name] = gr.Dropdown(models.names, visible=several, **same)
        elif name == "other":
            choices = [("—", NOBODY), *((other, other) for other in models.names)]
            knobs[name] = gr.Dropdown(choices, visible=several, **same)
        elif name == "system":
            knobs[name] = gr.Textbox(lines=2, max_lines=8, **same)
        elif name in ("do_sample", "show_beams"):
            knobs[name] = gr.Checkbox(**same)
        elif name == "seed":
            knobs[name] = gr.Number(precision=0, minimum=0, **same)
        else:
            low, high, step = RANGES.get(name, (16, limit_tokens(models.first), 1))
            if name == "max_new_tokens":
                high = min(high, limit_tokens(models.first))
            knobs[name] = gr.Slider(low, high, step=step, buttons=[], **same)
    return Controls(knobs, gr.Button(texts.reset, elem_id="reset", variant="secondary", size="sm"))
