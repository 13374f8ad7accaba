"""The shape of the house, read from the source: who may import whom, what may be heavy, who reads the environment."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tuoling"
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = {
    "text": 1,
    "data": 2,
    "kernels": 2,
    "models": 3,
    "train": 4,
    "infer": 4,
    "weights": 5,
    "evaluate": 6,
    "generate": 6,
    "serve": 6,
    "demo": 7,
    "api": 6,
    "cli": 8,
    "__main__": 9,
}
"""Folder, or file at the top, → floor. Every other file at the top is floor 0."""

HEAVY = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "pyarrow",
    "pandas",
    "matplotlib",
    "tokenizers",
    "bitsandbytes",
    "fastapi",
    "gradio",
    "uvicorn",
    "llama_cpp",
    "deepspeed",
    "sacrebleu",
    "jieba",
    "lm_eval",
}
LIGHT_ROOMS = {"cli", "text", "data", "demo", "api", "__main__", ""}
TORCH_AT_THE_TOP = {"data/pack.py"}
NAMELESS = {"utils", "util", "helpers", "misc", "common", "tools"}


@dataclass(frozen=True)
class Import:
    """One import in one file; `top` when it happens as the file is imported."""

    file: Path
    line: int
    module: str
    top: bool

    @property
    def place(self) -> str:
        return f"{self.file.relative_to(SOURCE)}:{self.line}"


def room(parts: tuple[str, ...]) -> str:
    """Where a module lives: its folder, its name when it has a floor of its own, or "" for floor 0."""
    if len(parts) > 1:
        return parts[0]
    return parts[0] if parts and parts[0] in FLOORS else ""


def floor(name: str) -> int:
    return FLOORS.get(name, 0)


def room_of_file(file: Path) -> str:
    return room(file.relative_to(SOURCE).with_suffix("").parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports(file: Path) -> list[Import]:
    """Every import of a file, those inside functions included; `if TYPE_CHECKING` counts as not at the top."""

    def walk(node: ast.AST, top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(file, child.lineno, alias.name, top)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno}: relative import"
                for alias in child.names:
                    yield Import(file, child.lineno, f"{child.module}.{alias.name}", top)
            inside = isinstance(
                child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
            ) or is_type_checking(child)
            yield from walk(child, top and not inside)

    return list(walk(tree_of(file), True))


def ours(module: str) -> tuple[str, ...] | None:
    """Path of one of our modules below the package, or None for somebody else's."""
    parts = module.split(".")
    if parts[0] != "tuoling":
        return None
    below = tuple(parts[1:])
    while below and not (
        SOURCE.joinpath(*below).with_suffix(".py").is_file() or SOURCE.joinpath(*below).is_dir()
    ):
        below = below[:-1]  # `from tuoling.errors import X`: X is not a module
    return below


def test_the_walk_sees_the_house() -> None:
    assert len(FILES) > 40
    seen = {imported.module.split(".")[0] for file in FILES for imported in imports(file)}
    assert {"torch", "transformers", "typer", "pydantic", "tuoling"} <= seen


def test_folders_have_a_floor() -> None:
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(FLOORS)


def test_imports_go_down() -> None:
    wrong = []
    for file in FILES:
        here = room_of_file(file)
        for imported in imports(file):
            below = ours(imported.module)
            if below is None:
                continue
            there = room(below)
            if there != here and floor(there) >= floor(here) and not (below == () and here):
                wrong.append(
                    f"{imported.place}: floor {floor(here)} imports {imported.module}, floor {floor(there)}"
                )
    # the package's front door hands out the Python interface, lazily
    wrong = [line for line in wrong if not line.startswith("__init__.py:")]
    assert not wrong, "\n".join(wrong)


def test_nothing_heavy_at_the_top_of_what_help_reaches() -> None:
    wrong = [
        f"{imported.place}: {imported.module}"
        for file in FILES
        if room_of_file(file) in LIGHT_ROOMS and str(file.relative_to(SOURCE)) not in TORCH_AT_THE_TOP
        for imported in imports(file)
        if imported.top and imported.module.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_only_one_file_reads_the_environment() -> None:
    wrong = []
    for file in FILES:
        if file.name == "environment.py" and file.parent == SOURCE:
            continue
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
                wrong.append(f"{file.relative_to(SOURCE)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_names_say_something() -> None:
    assert not [str(file) for file in FILES if file.stem in NAMELESS or file.parent.name in NAMELESS]


def test_files_have_a_docstring_and_postponed_annotations() -> None:
    wrong = []
    for file in FILES:
        tree = tree_of(file)
        if tree.body and ast.get_docstring(tree) is None:
            wrong.append(f"{file.relative_to(SOURCE)}: no docstring")
        has_functions = any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.walk(tree))
        if has_functions and "from __future__ import annotations" not in file.read_text(encoding="utf-8"):
            wrong.append(f"{file.relative_to(SOURCE)}: no `from __future__ import annotations`")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_file_can_be_imported(file: Path) -> None:
    import importlib

    parts = file.relative_to(SOURCE).with_suffix("").parts
    if parts[-1] == "__main__":
        pytest.skip("runs the program")
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    importlib.import_module(".".join(("tuoling", *parts)))
