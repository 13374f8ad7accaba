"""How much memory a run will take, from shapes alone, and what would fit where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tuoling import environment
from tuoling.errors import TrainingError
from tuoling.kernels.loss import BLOCK_BYTES, CHUNK_BYTES, cached_chunk_bytes
from tuoling.language import tr
from tuoling.models.quantization import Quantization

if TYPE_CHECKING:
    from tuoling.config import RunConfig

LIBRARIES_BYTES = 540 * 2**20
"""Python, torch, transformers and peft once imported, the tokenizer, and oneDNN's compiled kernels. Measured on a
CPU: 260 MiB after the imports, 370 to 450 MiB without the weights when the first step begins, 45 MiB of kernels."""
HEAP = 1.1
"""Of what is saved for the backward: its temporaries and the heap's holes (LLaMA 8 x 512, 4 rows: peak 1.48 GiB
where the plain sum says 1.31; BLOOM 6 x 512: 1.27 and 1.24)."""
ACTIVATIONS_PER_TOKEN = 22
"""Hidden-sized activations a block keeps a token: norms, qkv, attention, the four-fold feed-forward twice."""
REFUSE_ABOVE = 1.5
"""Of the free memory: an estimate that is 20 % wrong is still far from fitting."""
WARN_ABOVE = 0.8


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Numbers of a model's shape. Tied weights count once.

    trainable: what is asked for gradients, adapters included. matrices: those of it that Muon steps. linear: what can be quantised.
    head: elements of the output head. tied: the head is the input embedding.
    """

    parameters: int
    trainable: int
    layers: int
    hidden: int
    vocab: int = 0
    head: int = 0
    matrices: int = 0
    linear: int = 0
    tied: bool = False


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes at the peak of a step, part by part."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    libraries: int = LIBRARIES_BYTES

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def parts(self) -> str:
        """For people: every part of 50 MiB or more."""
        names = {
            "weights": tr("weights", "权重"),
            "gradients": tr("gradients", "梯度"),
            "optimizer": tr("optimizer", "优化器"),
            "activations": tr("activations", "激活值"),
            "logits": tr("loss", "损失"),
            "libraries": tr("libraries", "程序库"),
        }
        shown = [f"{names[k]} {v / 2**30:.2f}" for k, v in asdict(self).items() if v >= 50 * 2**20]
        return " + ".join(shown)


def estimate_memory(
    config: RunConfig, *, model_config: Any, lengths: np.ndarray, size: ModelSize, dtype: str
) -> MemoryEstimate:
    """Memory of the largest step. lengths: tokens of each training row, [rows]. Nothing is allocated."""
    longest = largest_micro_batch_lengths(config, lengths)
    return MemoryEstimate(
        weights=weight_bytes(config, size, dtype),
        gradients=gradient_bytes(config, size),
        optimizer=optimizer_bytes(config, size),
        activations=int(HEAP * _activation_bytes(model_config, config, longest, size, dtype)),
        logits=loss_bytes(config, size, sum(longest), dtype),
    )


def optimizer_bytes(config: RunConfig, size: ModelSize) -> int:
    """Two moments a trained weight in float32; one where Muon moves it; two bytes and their scales in 8 bits."""
    if config.optim == "adamw_8bit":
        return int(2 * (1 + 4 / 256) * size.trainable)  # a float32 scale for each block of 256
    return 8 * size.trainable - 4 * (size.matrices if config.optim == "muon" else 0)


def _activation_bytes(
    model_config: Any, config: RunConfig, longest: Sequence[int], size: ModelSize, dtype: str
) -> int:
    """Counted on the model's own code; by a rule of thumb where that code cannot run without numbers."""
    from tuoling.train.activations import saved_bytes

    try:
        return saved_bytes(model_config, config, longest, dtype)
    except Exception:  # whatever a family's own code runs into on tensors that hold nothing
        layers = 1 if config.gradient_checkpointing else size.layers
        return ACTIVATIONS_PER_TOKEN * size.hidden * layers * sum(longest) * (4 if dtype == "fp32" else 2)


def largest_micro_batch_lengths(config: RunConfig, lengths: np.ndarray) -> list[int]:
    """Lengths of the longest rows that can meet in one forward pass: so many rows, within the budget of tokens."""
    ordered: list[int] = np.sort(lengths)[::-1][: config.per_device_train_batch_size].tolist()
    if config.max_tokens_per_batch is None:
        return ordered
    chosen = ordered[:1]  # alone where it is longer than the budget
    room = config.max_tokens_per_batch - sum(chosen)
    for length in ordered[1:]:
        if length <= room:
            chosen.append(length)
            room -= length
    return chosen


def quantization_of(config: RunConfig) -> Quantization:
    """How a run keeps its base in memory."""
    return Quantization(config.quantization_bit or 0, config.quantization_type, config.double_quantization)


def weight_bytes(config: RunConfig, size: ModelSize, dtype: str) -> int:
    """Trained weights in float32; frozen ones in the run's dtype, linear layers in 8 or 4 bits where that is asked."""
    plain = 4 if dtype == "fp32" else 2
    frozen = size.parameters - size.trainable
    quantization = quantization_of(config)
    linear = size.linear if quantization else 0
    return int(size.trainable * 4 + (frozen - linear) * plain + linear * quantization.bytes_per_weight)


def gradient_bytes(config: RunConfig, size: ModelSize) -> int:
    """Float32. A tied embedding's gradient comes from both ends of the model before it is added up."""
    twice = size.head if size.tied and config.finetuning_type == "full" else 0
    return 4 * (size.trainable + twice)


def loss_bytes(config: RunConfig, size: ModelSize, tokens: int, dtype: str) -> int:
    """One chunk of logits, two float32 blocks (on a GPU of the whole chunk), the hidden states and their gradient;
    the head where it is cast."""
    width = 4 if dtype == "fp32" else 2
    on_cpu = environment.pick_device(config.device) == "cpu"
    cached = config.finetuning_type == "lora" and on_cpu
    budget = cached_chunk_bytes(size.vocab * width) if cached else CHUNK_BYTES
    chunk = min(budget, tokens * size.vocab * width)
    blocks = 2 * (min(BLOCK_BYTES, tokens * size.vocab * 4) if on_cpu else chunk * 4 // width)
    cast = size.head * 2 if config.finetuning_type == "full" and dtype != "fp32" else 0
    return chunk + blocks + 2 * tokens * size.hidden * width + cast


def what_fits(
    config: RunConfig,
    free_bytes: int,
    *,
    model_config: Any,
    lengths: np.ndarray,
    size: ModelSize,
    lora_size: ModelSize,
    dtype: str,
) -> list[str]:
    """Settings, cheapest first, that the same estimate finds to fit into `free_bytes`: at most three."""
    found: list[str] = []
    for changes in _candidates(config, dtype):
        changed = config.model_copy(update=changes)
        lora = changed.finetuning_type == "lora"
        memory = estimate_memory(
            changed,
            model_config=model_config,
            lengths=np.minimum(lengths, changed.max_seq_len),
            size=lora_size if lora else size,
            dtype=str(changes.get("dtype", dtype)),
        )
        if memory.total <= free_bytes:
            found.append(" ".join(f"{key}={_shown(value)}" for key, value in changes.items()))
            if len(found) == 3:
                break
    return found


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _candidates(config: RunConfig, dtype: str) -> Iterator[dict[str, Any]]:
    """Changes from the one that costs least (no result changes) to the ones that change what is learned."""
    rows = config.per_device_train_batch_size
    smaller: list[dict[str, Any]]
    if rows is not None:
        step = rows * config.accumulation()
        smaller = [{"per_device_train_batch_size": n, "batch_size": step} for n in _halves(rows)]
    else:
        budget = config.max_tokens_per_batch or 0
        smaller = [{"max_tokens_per_batch": n} for n in (budget // 2, budget // 4, budget // 8) if n]
    one = smaller[-1] if smaller else {}
    saving = {} if config.gradient_checkpointing else {"gradient_checkpointing": True}
    lighter: dict[str, Any] = {}
    if config.finetuning_type == "full":
        lighter = {"finetuning_type": "lora"}
    elif dtype == "fp32":
        lighter = {"dtype": "bf16"}
    elif not config.quantization_bit:
        lighter = {"quantization_bit": 4}
    yield from smaller
    if saving:
        yield saving
        if one:
            yield {**one, **saving}
    if lighter:
        yield lighter
        yield {**one, **saving, **lighter}
    length = config.max_seq_len // 2
    while length >= 128:
        yield {**one, **saving, **lighter, "max_seq_len": length, "overlong": "drop"}
        length //= 2


def _halves(rows: int) -> list[int]:
    """Divisors of `rows` below it, each at most half of the last, 1 at the end."""
    found: list[int] = []
    for n in range(rows // 2, 0, -1):
        if rows % n == 0 and (not found or n <= found[-1] // 2):
            found.append(n)
    return found


def require_memory(needed: int, free: int, fitting: Sequence[str]) -> None:
    """Raise TrainingError where the run is far from fitting, with what would fit."""
    if needed <= REFUSE_ABOVE * free:
        return
    lines = list(fitting) or [tr("a smaller model", "换更小的模型")]
    raise TrainingError(
        tr(
            f"not enough memory: about {gib(needed)} are needed and {gib(free)} are free",
            f"内存不足：大约需要 {gib(needed)}，现有 {gib(free)}",
        ),
        where="ignore_memory_plan=false",
        remedy="\n".join(
            [
                *lines,
                tr("or try all the same: ignore_memory_plan=true", "或仍要尝试：ignore_memory_plan=true"),
            ]
        ),
    )


def gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
