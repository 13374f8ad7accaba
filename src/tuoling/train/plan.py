"""What a run will do, said before it does it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tuoling import environment
from tuoling.errors import OutputError
from tuoling.language import tr
from tuoling.models.licence import to_json as lineage_json
from tuoling.models.licence_answer import answer, short, warning
from tuoling.train.memory import WARN_ABOVE, MemoryEstimate, gib, require_memory

if TYPE_CHECKING:
    from pathlib import Path

    from tuoling.config import RunConfig
    from tuoling.models.licence import Part


@dataclass(frozen=True, slots=True)
class MixPart:
    """rows: of a source; taken: of them in an epoch; passes: through the source in the whole run."""

    name: str
    share: float
    rows: int
    taken: int
    passes: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows, steps and what they will cost. Memory and disk are estimates from shapes.

    rows_per_step: None where a step is packs of up to max_tokens_per_batch tokens. tokens_per_step,
    micro_batches_per_step: means. fill: of the budget, rows_over_budget (each alone) apart; None without a budget.
    """

    rows: int
    eval_rows: int
    tokens: int
    learned_tokens: int
    longest_row: int
    rows_per_step: int | None
    max_tokens_per_batch: int | None
    rows_over_budget: int
    tokens_per_step: float
    micro_batches_per_step: float
    most_micro_batches: int
    largest_micro_batch: int
    fill: float | None
    total_rows: int
    total_steps: int
    epochs: float | None
    """None where the rows are still being made."""
    warmup_steps: int
    save_steps: int
    eval_steps: int
    parameters: int
    trainable: int
    device: str
    memory: MemoryEstimate
    disk_bytes: int
    shared_rows: int = 0
    """Rows that begin another one and are computed inside it; not among `rows`."""
    shared_tokens: int = 0
    """Tokens these rows would have cost; not among `tokens`."""
    fitting: tuple[str, ...] = ()
    lineage: tuple[Part, ...] = ()
    """What goes in, with licences."""
    world_size: int = 1
    """Processes that train together. micro_batches_per_step and memory are those of one of them."""
    first_step: int = 0
    """Above 0 where the run goes on along another run's schedule: the steps before it are not this run's."""
    schedule_steps: int = 0
    """Where the learning rate's line ends; `total_steps` where the run goes to its end."""
    checkpoint_bytes: int = 0
    """Of one checkpoint."""
    rows_known: bool = True
    """False where training begins on the first rows (`streaming_start`): rows and tokens are those so far."""
    mix: tuple[MixPart, ...] = ()
    """What an epoch takes of each source. `rows` and `tokens` are then those of an epoch."""

    def learning_rate(self, step: int, config: RunConfig) -> float:
        """The rate of optimizer step `step` (from 0), as transformers' schedules give it.

        Linear warm-up from 0 at step 0 to the config's rate after `warmup_steps`; then constant, linear to 0 at
        `schedule_steps`, or half a cosine to 0.
        """
        base = config.learning_rate
        if step < self.warmup_steps:
            return base * step / self.warmup_steps
        if config.lr_scheduler_type == "constant":
            return base
        done = (step - self.warmup_steps) / max(1, self.schedule_steps - self.warmup_steps)
        if config.lr_scheduler_type == "linear":
            return base * max(0.0, 1.0 - done)
        return base * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))

    def to_json(self) -> dict[str, Any]:
        """For run.json and `tuoling plan --json`."""
        return {**asdict(self), "memory_bytes": self.memory.total, "lineage": lineage_json(self.lineage)}

    def lines(self) -> list[tuple[str, str]]:
        """(label, value) pairs for people."""
        share = 100 * self.trainable / max(1, self.parameters)
        shared = [(tr("shared prefixes", "共享前缀"), self._sharing())] if self.shared_rows else []
        so_far = "" if self.rows_known else tr(" so far", "（目前）")
        return [
            (
                tr("rows", "训练数据"),
                tr(
                    f"{self.rows:,}{so_far} (+ {self.eval_rows:,} held out)",
                    f"{self.rows:,} 条{so_far}（另留 {self.eval_rows:,} 条验证）",
                ),
            ),
            (
                tr("tokens", "token 数"),
                tr(
                    f"{self.tokens:,}{so_far}, of which {self.learned_tokens:,} are learned",
                    f"{self.tokens:,}{so_far}，其中学习 {self.learned_tokens:,}",
                ),
            ),
            *shared,
            *((tr("of", "来自") + f" {part.name}", self._part(part)) for part in self.mix),
            (tr("each step", "每步"), self._each_step()),
            (
                tr("steps", "总步数"),
                tr(
                    f"{self._steps_taken()}{self._epochs()}, {self.warmup_steps:,} of warm-up",
                    f"{self._steps_taken()}{self._epochs()}，预热 {self.warmup_steps:,} 步",
                ),
            ),
            (
                tr("parameters", "参数量"),
                tr(
                    f"{self.parameters:,}, trained {self.trainable:,} ({share:.2f} %)",
                    f"{self.parameters:,}，训练 {self.trainable:,}（{share:.2f} %）",
                ),
            ),
            (
                tr("memory", "内存估计"),
                tr(
                    f"about {gib(self.memory.total)} = {self.memory.parts()}",
                    f"约 {gib(self.memory.total)} = {self.memory.parts()}",
                ),
            ),
            (
                tr("disk", "磁盘估计"),
                tr(f"about {self.disk_bytes / 2**20:,.0f} MiB", f"约 {self.disk_bytes / 2**20:,.0f} MiB"),
            ),
            (tr("licences", "许可"), short(answer(self.lineage))),
        ]

    def _steps_taken(self) -> str:
        taken = f"{self.total_steps - self.first_step:,}"
        if not self.first_step:
            return taken
        return f"{taken} ({self.first_step:,} → {self.total_steps:,} / {self.schedule_steps:,})"

    def _epochs(self) -> str:
        if self.epochs is None:
            return tr(" (max_steps; how many epochs is not known yet)", "（max_steps；还不知道是多少轮）")
        return tr(f" = {self.epochs:g} epochs", f"（{self.epochs:g} 轮）")

    def _each_step(self) -> str:
        tokens = f"{self.tokens_per_step:,.0f}"
        if self.rows_per_step is None:
            rows = f"{self.total_rows / (self.total_steps - self.first_step):,.1f}"
            parts = [tr(f"about {tokens} tokens, {rows} rows", f"约 {tokens} 个 token，{rows} 条")]
        else:
            rows = f"{self.rows_per_step:,}"
            parts = [tr(f"{rows} rows, about {tokens} tokens", f"{rows} 条，约 {tokens} 个 token")]
        if self.most_micro_batches > 1 or self.fill is not None:
            mean, most = f"{self.micro_batches_per_step:.3g}", self.most_micro_batches
            at_most = tr(f" (at most {most})", f"（最多 {most} 个）") if mean != str(most) else ""
            parts.append(tr(f"micro-batches: {mean}{at_most}", f"微批次 {mean} 个{at_most}"))
        if self.fill is not None:
            parts.append(
                tr(
                    f"each up to {self.max_tokens_per_batch:,} tokens, {self.fill:.1%} full",
                    f"每个至多 {self.max_tokens_per_batch:,} 个 token，填满 {self.fill:.1%}",
                )
            )
        if self.world_size > 1:
            parts.append(tr(f"over {self.world_size} processes", f"由 {self.world_size} 个进程分担"))
        return tr(", ", "，").join(parts)

    def _part(self, part: MixPart) -> str:
        return tr(
            f"{part.share:.1%}: {part.taken:,} of its {part.rows:,} rows each epoch, {part.passes:.3g} times all of it "
            "in the run",
            f"{part.share:.1%}：每轮用其 {part.rows:,} 条中的 {part.taken:,} 条，整个训练共 {part.passes:.3g} 遍",
        )

    def _sharing(self) -> str:
        rows = self.rows + self.shared_rows
        saved = self.shared_tokens / (self.tokens + self.shared_tokens)
        return tr(
            f"{self.shared_rows:,} of {rows:,} rows begin another row and are learned inside it: "
            f"{saved:.1%} of tokens saved",
            f"{rows:,} 条中有 {self.shared_rows:,} 条是另一条的开头，在那一条里一起学：省下 {saved:.1%} 的 token",
        )

    def warnings(self) -> list[str]:
        """What the user may not have meant."""
        licences = warning(answer(self.lineage))
        found = [licences] if licences else []
        if self.rows_over_budget:
            found.append(
                tr(
                    f"rows longer than max_tokens_per_batch={self.max_tokens_per_batch}: {self.rows_over_budget:,} of "
                    f"{self.rows:,}, the longest {self.longest_row:,} tokens. None is dropped: each runs alone, and "
                    "memory is planned for the longest",
                    f"有 {self.rows_over_budget:,} 条（共 {self.rows:,} 条）超过 "
                    f"max_tokens_per_batch={self.max_tokens_per_batch}，最长 {self.longest_row:,} 个 token。"
                    "不会丢弃：每条单独计算，内存按最长的一条估计",
                )
            )
        if self.total_steps - self.first_step <= self.save_steps:
            found.append(
                tr(
                    f"{self.total_steps} steps and save_steps={self.save_steps}: "
                    "no checkpoint on the way, the run is saved at its end",
                    f"共 {self.total_steps} 步，而 save_steps={self.save_steps}：中途没有检查点，只在结束时保存",
                )
            )
        if self.warmup_steps >= self.total_steps:
            found.append(
                tr(
                    f"the warm-up of {self.warmup_steps} steps is not over within the run of {self.total_steps}",
                    f"预热 {self.warmup_steps} 步，到 {self.total_steps} 步结束时还没有完成",
                )
            )
        free = environment.memory_available_bytes(self.device)
        if self.memory.total > WARN_ABOVE * free:
            found.append(
                "\n".join(
                    [
                        tr(
                            f"about {gib(self.memory.total)} of memory are needed and {gib(free)} are free",
                            f"大约需要 {gib(self.memory.total)} 内存，现有 {gib(free)}",
                        ),
                        *(tr(f"this fits: {line}", f"这样放得下：{line}") for line in self.fitting),
                    ]
                )
            )
        return found

    def require_memory(self, processes: int = 1) -> None:
        """Raise TrainingError before the first step where the run is far from fitting into memory.

        processes: that will share it, each with what the plan says.
        """
        free = environment.memory_available_bytes(self.device)
        require_memory(processes * self.memory.total, free, self.fitting)

    def require_disk(self, folder: Path, reserve_mib: int) -> None:
        """Raise OutputError now if the checkpoints will not fit beside the reserve."""
        require_disk(
            folder,
            self.disk_bytes,
            reserve_mib,
            remedy=tr("free the disk, or lower save_total_limit", "清理磁盘，或调小 save_total_limit"),
        )


def require_disk(folder: Path, needed_bytes: int, reserve_mib: int, *, remedy: str) -> None:
    """Raise OutputError, with what is missing, unless so much fits on the disk of `folder` and the reserve stays free."""
    free = environment.disk_free_bytes(folder)
    missing = needed_bytes + reserve_mib * 2**20 - free
    if missing > 0:
        raise OutputError(
            tr(
                f"about {_mib(needed_bytes)} are to be written, {reserve_mib:,} MiB are to stay free, and "
                f"{_mib(free)} are free: {_mib(missing)} are missing",
                f"约需写入 {_mib(needed_bytes)}，另需留出 {reserve_mib:,} MiB，磁盘只剩 {_mib(free)}：还差 {_mib(missing)}",
            ),
            where=str(folder),
            remedy=remedy,
        )


def _mib(size_bytes: int) -> str:
    size = size_bytes / 2**20
    return f"{size:,.0f} MiB" if size >= 10 else f"{size:,.2f} MiB"
