"""Changes of one tensor, in their own terms, and the changed tensor: computed a block of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK_NUMBERS = 1 << 23
"""Numbers of a tensor in float32 at once while it is changed: 32 MiB."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """W += scale · left @ right, in the orientation of the file. magnitude (DoRA): the norm that every row (axis 0)
    or column (axis 1) of the sum is brought to."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    axis: int = 0


@dataclass(frozen=True, eq=False)
class Whole:
    """W += weight · (tensor - base): a tensor that was saved whole; at weight 1 it takes the base's place.

    of_base: the base's own (resized embeddings), not a trained copy: what is tied to it in the base stays tied.
    """

    tensor: torch.Tensor
    weight: float
    of_base: bool = False


@dataclass(frozen=True, eq=False)
class Rows:
    """The same for some rows: tokens that were trained one by one."""

    indices: torch.Tensor
    tensor: torch.Tensor
    weight: float


@dataclass(frozen=True, eq=False)
class Added:
    """b += scale · vector: the bias of lora_B."""

    vector: torch.Tensor
    scale: float


Change = LowRank | Whole | Rows | Added


def apply_changes(base: torch.Tensor, changes: Sequence[Change], dtype: torch.dtype) -> torch.Tensor:
    """The changed tensor in `dtype`: computed in float32, rounded once. In blocks of rows, so that the result is all
    of its size that is held."""
    wholes = [change for change in changes if isinstance(change, Whole)]
    shape = wholes[0].tensor.shape if wholes else base.shape
    out = torch.empty(shape, dtype=dtype)
    column_factors = [_column_factor(base, wholes, c) for c in changes if _by_column(c)]
    step = max(1, BLOCK_NUMBERS // max(1, out[:1].numel()))
    for start in range(0, len(out), step):
        rows = slice(start, min(start + step, len(out)))
        block = _start_of(base, wholes, rows)
        for change in changes:
            if isinstance(change, LowRank):
                _add_low_rank(block, change, rows)
                if change.magnitude is not None and change.axis == 0:
                    norm = torch.linalg.vector_norm(block, dim=1)
                    block *= (change.magnitude[rows].float() / norm)[:, None]
            elif isinstance(change, Rows):
                _put_rows(block, change, rows)
            elif isinstance(change, Added):
                block += change.scale * change.vector[rows].float()
        for factor in column_factors:
            block *= factor
        out[rows] = block
    return out


def _start_of(base: torch.Tensor, wholes: Sequence[Whole], rows: slice) -> torch.Tensor:
    """The base, or what was saved in its place, as float32 of its own."""
    if len(wholes) == 1 and wholes[0].weight == 1.0:
        return wholes[0].tensor[rows].to(torch.float32, copy=True)
    block = base[rows].to(torch.float32, copy=True)
    for whole in wholes:
        block += whole.weight * (whole.tensor[rows].float() - base[rows].float())
    return block


def _add_low_rank(block: torch.Tensor, change: LowRank, rows: slice) -> None:
    block.addmm_(change.left[rows].float(), change.right.float(), alpha=change.scale)


def _put_rows(block: torch.Tensor, change: Rows, rows: slice) -> None:
    inside = (change.indices >= rows.start) & (change.indices < rows.stop)
    places = change.indices[inside] - rows.start
    values = change.tensor[inside].float()
    block[places] += change.weight * (values - block[places])
    if change.weight == 1.0:  # to the last bit
        block[places] = values


def _by_column(change: Change) -> bool:
    return isinstance(change, LowRank) and change.magnitude is not None and change.axis == 1


def _column_factor(base: torch.Tensor, wholes: Sequence[Whole], change: Change) -> torch.Tensor:
    """DoRA where a column, not a row, of the file belongs to one output: a first pass for the norms."""
    assert isinstance(change, LowRank) and change.magnitude is not None
    squares = torch.zeros(base.shape[1], dtype=torch.float64)
    step = max(1, BLOCK_NUMBERS // base.shape[1])
    for start in range(0, len(base), step):
        rows = slice(start, min(start + step, len(base)))
        block = _start_of(base, wholes, rows)
        _add_low_rank(block, change, rows)
        squares += block.square().sum(dim=0, dtype=torch.float64)
    return change.magnitude.float() / squares.sqrt().float()
