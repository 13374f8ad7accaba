"""Lower types through llama.cpp's own quantiser, and which tensors could not have them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

from tuoling.errors import ModelError
from tuoling.infer.llamacpp import last_error, llama_library
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.weights.gguf_file import BLOCK, require_gguf

FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q6_k": 18,
    "q5_k_m": 17,
    "q5_k_s": 16,
    "q5_1": 9,
    "q5_0": 8,
    "q4_k_m": 15,
    "q4_k_s": 14,
    "q4_1": 3,
    "q4_0": 2,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "q3_k_l": 13,
    "q3_k_m": 12,
    "q3_k_s": 11,
    "q2_k": 10,
}
"""`--outtype` → llama.cpp's number of the file type. Types that need an importance matrix are left out."""

_LARGE_BLOCK = 256
"""Numbers of a row that a k-type describes together."""

_BUFFER_BYTES = 256 << 20
"""Rows that llama.cpp keeps at once; its own default is 8 GiB."""


def quantize_file(full: Path, out: Path, outtype: str, *, threads: int) -> dict[str, str]:
    """Write `out` from a full-precision GGUF file, whole or not at all; returns the tensors that fell back.

    Raises MissingPackage without llama-cpp-python, ModelError where llama.cpp refuses.
    """
    library = llama_library()
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[outtype], threads
    temporary = full.with_name("quantized.gguf")
    params.max_buf_size = _BUFFER_BYTES
    code = library.llama_model_quantize(
        bytes(full.absolute()), bytes(temporary.absolute()), ctypes.byref(params)
    )
    if code:
        detail = last_error() or f"{code}"
        raise ModelError(
            tr(f"llama.cpp could not quantise: {detail}", f"llama.cpp 量化失败：{detail}"), where=str(out)
        )
    fell_back = fallbacks(temporary, outtype)
    temporary.chmod(0o644)
    temporary.replace(out)
    return fell_back


def fallbacks(file: Path, outtype: str) -> dict[str, str]:
    """Matrices whose rows are no multiple of the block that `outtype` wants → the type they have instead."""
    gguf = require_gguf()
    tensors = gguf.GGUFReader(str(file)).tensors
    names = {tensor.name for tensor in tensors}
    head = "output.weight" if "output.weight" in names else "token_embd.weight"
    found = {}
    for tensor in tensors:
        columns = int(tensor.shape[0])  # llama.cpp's order: the row's length first
        large = (
            outtype.endswith(("_k", "_k_s", "_k_m", "_k_l", "_xs")) or tensor.name == head
        )  # the head is q6_k
        if len(tensor.shape) > 1 and columns % (_LARGE_BLOCK if large else BLOCK):
            found[tensor.name] = tensor.tensor_type.name.lower()
    return found


def fallback_note(fell_back: Mapping[str, str]) -> list[str]:
    """What to tell of tensors that could not have the type asked for."""
    if not fell_back:
        return []
    kinds = ", ".join(sorted(set(fell_back.values())))
    names = some(list(fell_back))
    return [
        tr(
            f"{len(fell_back)} tensors have rows that are no multiple of the block and are {kinds}: {names}",
            f"{len(fell_back)} 个张量的行长不是块大小的整数倍，改用 {kinds}：{names}",
        )
    ]
