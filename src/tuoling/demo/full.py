"""The demo's second half: its run as a merged model, a quantised one and a GGUF file, each asked the same questions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tuoling import files
from tuoling.demo.quickstart import mean, predict, score
from tuoling.errors import MissingPackage
from tuoling.language import tr

CALIBRATION_ROWS = 64
GROUP_SIZE = 32
"""Of the demo's rows of 128 numbers."""


@dataclass(frozen=True, slots=True)
class Form:
    """One form of the weights. accuracy: on the held-out questions, averaged over kinds; None where none can ask it."""

    name: str
    path: Path
    size_bytes: int
    accuracy: float | None


@dataclass
class Forms:
    """What was made, and in words what was left out."""

    made: list[Form] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def gguf(self) -> Path | None:
        """The GGUF file, where llama.cpp is there to open it."""
        return next(
            (form.path for form in self.made if form.path.suffix == ".gguf" and form.accuracy is not None),
            None,
        )


def make_forms(run: Path, *, say: Callable[[str], None] = lambda _: None) -> Forms:
    """Merge, quantise and write GGUF from the demo's `run`, beside it; what an extra is missing for is left out.

    Every step proves what it wrote and raises where it is wrong.
    """
    forms = Forms()
    for title, make in (
        (tr("6/8 merging the adapter into its base", "6/8 把适配器合并进基座"), _merge),
        (tr("7/8 quantising to 4 bits with GPTQ", "7/8 用 GPTQ 量化为 4 位"), _quantise),
        (tr("8/8 writing GGUF for a CPU", "8/8 写出 CPU 用的 GGUF"), _write_gguf),
    ):
        say(title)
        try:
            forms.made.append(make(run, say))
        except MissingPackage as error:
            forms.left_out.append(f"{error.problem}: {(error.remedy or '').splitlines()[0]}")
            say(tr(f"left out: {forms.left_out[-1]}", f"已跳过：{forms.left_out[-1]}"))
    return forms


def _merge(run: Path, say: Callable[[str], None]) -> Form:
    from tuoling.models.source import find_model
    from tuoling.weights.merge import merge
    from tuoling.weights.merged import Weighted

    out = run.parent / "merged"
    merge([Weighted(find_model(run))], out, say=say)
    return _asked("merged", out)


def _quantise(run: Path, say: Callable[[str], None]) -> Form:
    from tuoling.weights.gptq import QuantizeOptions, quantize

    out = run.parent / "gptq-4bit"
    options = QuantizeOptions(
        bits=4, group_size=GROUP_SIZE, rows=CALIBRATION_ROWS, device="cpu", dtype="fp32"
    )
    quantize(str(run), out, options, say=say)
    return _asked("GPTQ 4 bit", out)


def _write_gguf(run: Path, say: Callable[[str], None]) -> Form:
    """Four bits need llama.cpp, which quantises and chats; eight need only the `gguf` package."""
    from tuoling.weights.convert import ConvertOptions, convert

    chats = importlib.util.find_spec("llama_cpp") is not None
    kind = "q4_0" if chats else "q8_0"
    out = run.parent / f"demo-{kind}.gguf"
    report = convert(run.parent / "merged", out, options=ConvertOptions(outtype=kind))
    for note in report.notes:
        say(note)
    if not chats:
        return Form(f"GGUF {kind}", out, out.stat().st_size, None)
    return _asked(f"GGUF {kind}", out)


def _asked(name: str, path: Path) -> Form:
    """Ask the held-out questions; the answers lie beside the others."""
    rows = path.parent / "rows" / "test.jsonl"
    held_out = [row for _, row in files.read_jsonl(rows)]
    answers = predict(path, rows, path.parent / f"predictions-{path.stem}.json")
    weights: Sequence[Path] = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in weights)
    return Form(name, path, size, mean(score(held_out, answers)))
