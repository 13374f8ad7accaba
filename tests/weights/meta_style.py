"""LLaMA as Meta's own code computes it, on Meta's tensors, and folders of Meta's files: written for tests, naively."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import silu

ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
COLUMNS = ("wo", "w2", "tok_embeddings")


def random_tensors(
    *, dim: int, layers: int, heads: int, kv_heads: int, wide: int, words: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Whole tensors with Meta's names, in float32."""
    torch.manual_seed(seed)
    kv = dim // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (words, dim),
        "norm.weight": (dim,),
        "output.weight": (words, dim),
    }
    for n in range(layers):
        for name, shape in {
            "attention.wq": (dim, dim),
            "attention.wk": (kv, dim),
            "attention.wv": (kv, dim),
            "attention.wo": (dim, dim),
            "feed_forward.w1": (wide, dim),
            "feed_forward.w2": (dim, wide),
            "feed_forward.w3": (wide, dim),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }.items():
            shapes[f"layers.{n}.{name}.weight"] = shape
    return {
        name: torch.randn(shape) * 0.3 if len(shape) == 2 else 1 + torch.randn(shape) * 0.1
        for name, shape in shapes.items()
    }


def axis_of(name: str, by_word: bool = False) -> int | None:
    part = name.removesuffix(".weight").split(".")[-1]
    if part in ROWS or (part == "tok_embeddings" and by_word):
        return 0
    return 1 if part in COLUMNS else None


def save_shards(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    params: dict[str, Any],
    count: int,
    *,
    by_word: bool = False,
) -> Path:
    """Cut and save as the tensors of `count` model-parallel processes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        mine = {}
        for name, tensor in tensors.items():
            axis = axis_of(name, by_word)
            mine[name] = tensor if axis is None else tensor.chunk(count, axis)[number].clone()
        torch.save(mine, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def load_shards(folder: Path, *, by_word: bool = False) -> dict[str, torch.Tensor]:
    """Whole tensors from the files, by torch alone."""
    shards = [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]
    whole = {}
    for name in shards[0]:
        axis = axis_of(name, by_word)
        whole[name] = shards[0][name] if axis is None else torch.cat([shard[name] for shard in shards], axis)
    return whole


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _rotate(x_THD: torch.Tensor, theta: float) -> torch.Tensor:
    """Neighbours as one complex number, turned by position x frequency."""
    count, _, size = x_THD.shape
    frequencies = torch.tensor([theta ** (-2.0 * k / size) for k in range(size // 2)], dtype=torch.float64)
    angles_TP = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
    turns_TP = torch.polar(torch.ones_like(angles_TP), angles_TP)
    pairs = torch.view_as_complex(x_THD.reshape(*x_THD.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turns_TP[:, None]).flatten(-2)


def logits(tensors: dict[str, torch.Tensor], params: dict[str, Any], ids: list[int]) -> torch.Tensor:
    """[T, V] in float64: Meta's forward of one sequence."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    heads, eps = params["n_heads"], params["norm_eps"]
    kv_heads = params.get("n_kv_heads") or heads
    theta = params.get("rope_theta", 10000.0)
    x_TC = weights["tok_embeddings.weight"][ids]
    count, dim = x_TC.shape
    mask = torch.full((count, count), float("-inf"), dtype=torch.float64).triu(1)
    for n in range(params["n_layers"]):

        def w(name: str, n: int = n) -> torch.Tensor:
            return weights[f"layers.{n}.{name}.weight"]

        h = _norm(x_TC, w("attention_norm"), eps)
        q = _rotate((h @ w("attention.wq").T).view(count, heads, -1), theta)
        k = _rotate((h @ w("attention.wk").T).view(count, kv_heads, -1), theta)
        v = (h @ w("attention.wv").T).view(count, kv_heads, -1)
        out = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, group].T / (dim // heads) ** 0.5 + mask
            out.append(torch.softmax(scores, -1) @ v[:, group])
        x_TC = x_TC + torch.cat(out, -1) @ w("attention.wo").T
        h = _norm(x_TC, w("ffn_norm"), eps)
        x_TC = (
            x_TC + (silu(h @ w("feed_forward.w1").T) * (h @ w("feed_forward.w3").T)) @ w("feed_forward.w2").T
        )
    return _norm(x_TC, weights["norm.weight"], eps) @ weights["output.weight"].T
