"""Attention of a step in which many answers grow: one new token each, and pieces of the prompts that join them.

The tokens of a step lie in one row without padding. Keys and values stay where they were written: every answer has
a slot in one buffer a layer, so that nothing is concatenated, gathered or padded anew from step to step.

Shapes: T tokens of the step, R answers that grow by one token, N query heads, K key heads, D head size, S keys.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuoling.kernels.attention import Bias, Unpackable, attend_last
from tuoling.language import tr

ROOM = 64
"""Slots grow by multiples of this many tokens; the mask of a step is as wide, so that GPU kernels find it aligned."""
START = 256
"""Tokens a slot has at first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of one prompt that go on behind the `start` tokens its slot has."""

    slot: int
    start: int
    count: int


class SlotCache:
    """Keys and values of the answers that grow. Per layer two tensors [slots, K, room, D].

    On a CPU they are float32 whatever the model's precision: torch's bf16 kernels there read them three times slower
    (16 answers of 320 tokens with 16 heads of 64: 10.0 against 3.5 ms a layer), and a bf16 number is a float32 number.
    There its pages are resident only where something was written.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.room = START
        self._used = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.windows: dict[int, int | None] = {}
        """Sliding window that each layer asked for."""

    def reserve(self, tokens: int, slots: int) -> None:
        """Room for `tokens` in every slot, half as much again as it was where it must grow. slots: how many of the
        first ones are in use now."""
        self._used = max(self._used, slots)
        if tokens > self.room:
            wanted = max(tokens, self.room * 3 // 2)
            self.room = -(-wanted // ROOM) * ROOM

    def layer(self, index: int, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of one layer, made or grown to `room` when the layer comes to them."""
        have = self._layers.get(index)
        if have is None or have[0].shape[2] < self.room:
            have = self._grown(have, k_TKD), self._grown(have, v_TKD, 1)
            self._layers[index] = have
        return have

    def _grown(self, have: tuple[Tensor, Tensor] | None, like_TKD: Tensor, part: int = 0) -> Tensor:
        shape = (self.slots, like_TKD.shape[1], self.room, like_TKD.shape[2])
        if like_TKD.device.type == "cpu":
            new = _untouched_zeros(shape)
        else:
            new = torch.zeros(shape, dtype=like_TKD.dtype, device=like_TKD.device)
        if have is not None:
            new[: self._used, :, : have[part].shape[2]] = have[part][: self._used]
        return new

    @torch.no_grad()
    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first `tokens` of one slot into another."""
        self._used = max(self._used, target + 1)
        for buffers in self._layers.values():
            for buffer in buffers:
                buffer[target, :, :tokens] = buffer[source, :, :tokens]

    @torch.no_grad()
    def wipe(self, slot: int) -> None:
        """Zeros: a number that is not finite would spoil later answers through the masked places too."""
        for buffers in self._layers.values():
            for buffer in buffers:
                buffer[slot] = 0

    def free(self) -> None:
        """Give the memory back; the next step makes it anew."""
        self._layers.clear()
        self.room, self._used = START, 0

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, as far as they have been seen."""
        return sum(
            buffer.shape[1] * buffer.shape[3] * buffer.element_size()
            for buffers in self._layers.values()
            for buffer in buffers
        )


def _untouched_zeros(shape: Sequence[int]) -> Tensor:
    """Zeros in float32, in pages that the system makes when they are written to.

    `torch.zeros` writes them all: 16 slots of 24 layers with 16 heads of 64 (805 MB) took 105 ms of one core, and
    the first token after every rest had to wait for that.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, math.prod(shape) * 4, **private)
    return torch.frombuffer(pages, dtype=torch.float32).view(*shape)


@dataclass(eq=False)
class DecodeStep:
    """Which answers the tokens of a step belong to.

    lengths: tokens that slots 0, 1, ... have already; each gets one more, the step's first tokens. Then come the
    chunks' tokens, in order.
    """

    cache: SlotCache
    lengths: Sequence[int]
    chunks: Sequence[Chunk]
    device: torch.device
    _masks: dict[Any, Tensor] = field(default_factory=dict)
    _windows: dict[int, Bias] = field(default_factory=dict)

    @property
    def positions(self) -> list[int]:
        """Position of every token in its own answer."""
        own = [
            position for chunk in self.chunks for position in range(chunk.start, chunk.start + chunk.count)
        ]
        return [*self.lengths, *own]

    def attend(
        self,
        layer: nn.Module,
        q_TND: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        *,
        scale: float,
        dropout: float = 0.0,
        bias: Bias | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Keep the new keys and values, and attend over what each answer has: [T, N, D of v].

        bias: ALiBi slopes. window: the layer's own sliding window.
        """
        index: Any = getattr(layer, "layer_idx", None)
        if index is None or dropout:
            raise Unpackable(tr("its layers have no number", "它的层没有编号"))
        self.cache.windows[index] = window
        bias = self._bias(bias, window)
        keys, values = self.cache.layer(index, k_TKD, v_TKD)
        rows = len(self.lengths)
        outputs = []
        if rows:
            every = torch.arange(rows, device=self.device)
            keys[every, :, self._at_R] = k_TKD[:rows].to(keys.dtype)
            values[every, :, self._at_R] = v_TKD[:rows].to(values.dtype)
            outputs.append(self._grow(q_TND[:rows], keys, values, scale, bias))
        begin = rows
        for chunk in self.chunks:
            here, end = slice(begin, begin + chunk.count), chunk.start + chunk.count
            keys[chunk.slot, :, chunk.start : end] = k_TKD[here].transpose(0, 1)
            values[chunk.slot, :, chunk.start : end] = v_TKD[here].transpose(0, 1)
            k, v = (buffer[chunk.slot : chunk.slot + 1, :, :end] for buffer in (keys, values))
            q = q_TND[here].transpose(0, 1).unsqueeze(0).to(keys.dtype)
            out = attend_last(q, k, v, scale=scale, bias=bias)
            outputs.append(out[0].transpose(0, 1))
            begin += chunk.count
        return torch.cat(outputs).to(q_TND.dtype)

    def _bias(self, bias: Bias | None, window: int | None) -> Bias | None:
        """ALiBi as the layer has it, or its window; one object a step for all layers."""
        if window is None:
            return bias
        if bias is not None:
            raise Unpackable(tr("its attention uses another mask", "它的注意力使用了其他掩码"))
        return self._windows.setdefault(window, Bias(window=window))

    @functools.cached_property
    def _at_R(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.device)

    def _grow(self, q_RND: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Bias | None) -> Tensor:
        """One token for each of the first R slots: [R, N, D]. Heads that share keys are queries of one head."""
        rows, heads = q_RND.shape[:2]
        seen = min(-(-(max(self.lengths) + 1) // ROOM) * ROOM, keys.shape[2])
        k_RKSD, v_RKSD = keys[:rows, :, :seen], values[:rows, :, :seen]
        q = q_RND.to(keys.dtype).unflatten(1, (keys.shape[1], heads // keys.shape[1]))
        mask = self._mask(seen, bias, q)
        out = F.scaled_dot_product_attention(q, k_RKSD, v_RKSD, attn_mask=mask, scale=scale)
        return out.flatten(1, 2)

    def _mask(self, seen: int, bias: Bias | None, q_RKGD: Tensor) -> Tensor:
        """[R, 1 or K, G, seen]: what is behind an answer's newest token is hidden; made once a step."""
        name = (seen, id(bias))
        if name not in self._masks:
            ahead_RS = torch.arange(seen, device=self.device)[None, :] - self._at_R[:, None]
            hidden = ahead_RS > 0
            if bias is not None and bias.window is not None:
                hidden |= ahead_RS <= -bias.window
            groups = q_RKGD.shape[1:3]
            if bias is not None and bias.slopes_N is not None:
                slopes = bias.slopes_N.to(self.device).view(1, *groups, 1)
                numbers = slopes * ahead_RS[:, None, None, :]
            else:
                numbers = torch.zeros(len(self.lengths), 1, 1, seen, device=self.device)
            mask = numbers.masked_fill(hidden[:, None, None, :], float("-inf")).to(q_RKGD.dtype)
            self._masks[name] = mask.expand(-1, -1, groups[1], -1)
        return self._masks[name]
