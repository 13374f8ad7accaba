"""The processes that train together, and the few numbers they tell each other."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tuoling import console, environment
from tuoling.environment import Place
from tuoling.errors import TrainingError, TuolingError
from tuoling.language import tr

T = TypeVar("T")


class Ranks:
    """This process among those of the run. Alone, every question answers itself.

    All processes must ask the same questions in the same order.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.place = Place() if place is None else place

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.place.rank == 0

    def table(self, numbers: Sequence[float]) -> list[list[float]]:
        """A row of numbers from every rank."""
        if self.world_size == 1:
            return [list(numbers)]
        rows = torch.zeros(self.world_size, len(numbers), dtype=torch.float64)
        rows[self.rank] = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(rows)
        found: list[list[float]] = rows.tolist()
        return found

    def total(self, number: float) -> float:
        """The sum over the ranks, the same one everywhere."""
        return number if self.world_size == 1 else sum(row[0] for row in self.table([number]))

    def any(self, flag: bool) -> bool:
        """Whether one of them says so."""
        return flag if self.world_size == 1 else self.total(float(flag)) > 0

    def gather(self, value: T) -> list[T]:
        """What every rank says, small."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def decide(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first rank, everywhere. Its error is raised there, and the others stop."""
        if self.world_size == 1:
            return make()
        answer: list[Any] = [None, False]
        error: BaseException | None = None
        if self.first:
            try:
                answer = [make(), True]
            except BaseException as raised:
                error = raised
        dist.broadcast_object_list(answer, src=0)
        if error is not None:
            raise error
        if not answer[1]:
            raise Elsewhere()
        made: T = answer[0]
        return made

    def require_same(self, value: str, what: str) -> None:
        """Raise TrainingError unless all ranks have the same `value`."""
        found = self.gather(value)
        other = next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)
        if other is not None:
            raise TrainingError(
                tr(f"rank {other} has another {what} than rank 0", f"进程 {other} 的{what}与进程 0 不同"),
                remedy=tr(
                    "give every machine the same config, rows and model",
                    "请让每台机器使用相同的配置、数据和模型",
                ),
            )


class Elsewhere(TuolingError):
    """Another process of the run has the error that counts."""

    def __init__(self) -> None:
        super().__init__(tr("rank 0 stopped", "进程 0 已停止"))


@contextmanager
def join(device: str, timeout_s: int) -> Iterator[Ranks]:
    """The process group inside, if a launcher started several processes; only the first of them prints.

    A rank that waits longer than `timeout_s` for the others gives up.
    """
    place = environment.place()
    if place.world_size == 1:
        yield Ranks()
        return
    environment.adopt(place)
    cuda = device.startswith("cuda")
    environment.use_card(device)
    if dist.is_initialized():  # Ray Train's; it ends it, too
        with console.silent(place.rank != 0):
            yield Ranks(place)
        dist.barrier()
        return
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            rank=place.rank,
            world_size=place.world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            tr(
                f"rank {place.rank} does not find the others: {_first_line(error)}",
                f"进程 {place.rank} 找不到其他进程：{_first_line(error)}",
            ),
            where=environment.meeting_point(),
            remedy=tr(
                "all machines must be started, and reach that address and port",
                "请确认所有机器都已启动，并能访问该地址和端口",
            ),
        ) from error
    with console.silent(place.rank != 0):
        yield Ranks(place)
    # Not after an error: the others may not be there to agree. The barrier first: a gloo thread that still holds the
    # last message's tensor needs Python's lock to let go of it, which the end of its group would wait for with the
    # lock held.
    dist.barrier()
    dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
