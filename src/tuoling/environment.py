"""What this machine is and what its user asked for: the only reader of `os.environ`."""

from __future__ import annotations

import functools
import locale
import logging
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

Language = Literal["zh", "en"]


@functools.cache
def language() -> Language:
    """`TUOLING_LANG` (zh or en), else the locale."""
    asked = os.environ.get("TUOLING_LANG", "").lower()
    if asked:
        return "zh" if asked.startswith("zh") else "en"
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if os.environ.get(name):
            return "zh" if os.environ[name].lower().startswith("zh") else "en"
    default = locale.getlocale()[0] or ""
    return "zh" if default.lower().startswith(("zh", "chinese")) else "en"


def cache_dir() -> Path:
    """Where token stores and other things that can be made again are kept: `TUOLING_CACHE`, else XDG's."""
    if os.environ.get("TUOLING_CACHE"):
        return Path(os.environ["TUOLING_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tuoling"


def config_dir() -> Path:
    """Where settings that cannot be made again are kept: `XDG_CONFIG_HOME`, else ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "tuoling"


def hub_endpoint() -> str | None:
    """The Hugging Face mirror the user set (`HF_ENDPOINT`), without a trailing slash."""
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def modelscope_endpoint() -> str | None:
    """ModelScope's address when the user prefers it: `TUOLING_HUB=modelscope` or `USE_MODELSCOPE_HUB=1`."""
    wanted = os.environ.get("TUOLING_HUB", "").lower() == "modelscope"
    if not wanted and os.environ.get("USE_MODELSCOPE_HUB", "").lower() not in ("1", "true", "yes"):
        return None
    return modelscope_address()


def modelscope_address() -> str:
    """`MODELSCOPE_ENDPOINT`, else ModelScope's own address."""
    return (os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn").rstrip("/")


def secret(name: str) -> str | None:
    """A token or key. Never log it, never write it to a run folder."""
    return os.environ.get(name) or None


def quiet_libraries() -> None:
    """Before the libraries are imported: prints below errors and telemetry off, and bounded kernel caches.

    oneDNN and the layer above it in torch each keep 1,024 compiled matmuls, of 0.7 MiB each. Every batch has another
    number of tokens and so needs about 28 new ones: a run grew by 40 MiB a step (BLOOM 6 x 512, bf16, batches of
    2,700 to 5,500 tokens, free heap given back after every step to see it: 802 MiB at first, 1,239 after 12). With
    64, twice what one step uses, it stays at 774 over 8 steps (42 s of CPU against 40 to 43, a busy machine; with
    none kept 74 s). The heap's own holes remain.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b")
    # at every import a note on a package it could fetch kernels with, at every int8 matmul one on the cast it makes
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers imports it whenever a model is saved, and it says on stdout that it found no GPU
    logging.getLogger("DeepSpeed").addFilter(_errors_to_stderr)
    # every model that is spread over memory and disk, which is told in our own words
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    # gptqmodel brings torchao, which registers enums in the old way and says which of its CUDA parts it lacks
    for noisy in ("torch.utils._pytree", "torchao"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "true",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "LRU_CACHE_CAPACITY": "64",
    }.items():
        os.environ.setdefault(name, value)


def _errors_to_stderr(record: logging.LogRecord) -> bool:
    """For a logger whose handler writes on stdout, which belongs to results: errors go to stderr, nothing else."""
    if record.levelno >= logging.ERROR and logging.lastResort is not None:
        logging.lastResort.handle(record)
    return False


def prepare_gradio() -> None:
    """Before it is imported: it sends no usage statistics."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


GPTQMODEL = {"GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_DISABLE_PACK_EXT": "1"}
"""Before gptqmodel is imported. On 2 cores its pool of one thread refuses its own loader, which wants two. Its packing
in C++ is compiled at first use, a minute or more, and saves less than that on models that fit a small machine."""


def for_gptqmodel(path: Sequence[str]) -> dict[str, str]:
    """The environment of a child process that quantises: as ours, modules found where ours are, no network."""
    places = os.pathsep.join(
        str(Path(place).absolute()) for place in path
    )  # it works in another folder than we
    own = {"PYTHONPATH": places, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **GPTQMODEL, **own}


def prepare_gptqmodel() -> None:
    """Before it is imported into this process."""
    for name, value in GPTQMODEL.items():
        os.environ.setdefault(name, value)


def cpu_count() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def compute_threads() -> int:
    """Threads for what computes outside of torch: as many as OMP_NUM_THREADS allows torch, else one a processor."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else cpu_count()


@functools.cache
def cpu_has_bf16() -> bool:
    """True where bfloat16 matmuls are native (avx512_bf16 or amx): elsewhere they are slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return platform.machine() == "arm64" and sys.platform == "darwin"
    return "avx512_bf16" in flags or "amx_bf16" in flags


def pick_device(asked: str = "auto") -> str:
    """`auto` → cuda, then mps, then cpu; anything else as it is. Raises UsageError where there is no such device.

    Of several processes on a machine each has the card of its number.
    """
    here = place()
    if asked in ("auto", "cuda") and here.local_world_size > 1:
        asked = f"cuda:{here.local_rank}" if asked == "cuda" or _has_cuda() else "auto"
    if asked != "auto":
        _require_device(asked)
        return asked
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def cuda_count() -> int:
    """Cards of this machine that may be used."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def use_card(device: str) -> None:
    """Make `cuda:N` the card that is meant where none is named: by accelerate, random states and memory peaks.

    `cuda` alone is the current one already (torch refuses to be told so), and other devices have no such state.
    """
    import torch

    card = torch.device(device)
    if card.type == "cuda" and card.index is not None:
        torch.cuda.set_device(card)


def _require_device(asked: str) -> None:
    if asked == "cpu":
        return
    import torch

    from tuoling.errors import UsageError
    from tuoling.language import tr

    if asked.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        there = int(asked.partition(":")[2] or 0) < count
    else:
        there = asked != "mps" or torch.backends.mps.is_available()
    if not there:
        raise UsageError(
            tr(f"this machine has no device {asked}", f"这台机器上没有设备 {asked}"),
            where=f"device={asked}",
            remedy=tr(
                "device=auto; `tuoling doctor` shows what there is",
                "device=auto；`tuoling doctor` 会列出可用设备",
            ),
        )


def only_deterministic_kernels() -> None:
    """Sums in one order only. cuBLAS reads its workspace when it is first used; torch refuses kernels that cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def pick_dtype(asked: str, device: str) -> str:
    """Resolve `auto` to bf16, fp16 or fp32 by what the chip does well (fp16 is never chosen on a CPU)."""
    if asked != "auto":
        return asked
    if device.startswith("cuda"):
        import torch

        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    if device == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    return "fp16"


def compute_capability(device: str) -> tuple[int, int] | None:
    """Of an NVIDIA card, such as (7, 5) for Turing; None for everything else."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.get_device_capability(torch.device(device)) if torch.version.cuda else None


def memory_total_bytes() -> int:
    """Memory of the machine, or of the container where that is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(name).read_text()))
        except (OSError, ValueError):
            continue
    return total


def memory_available_bytes(device: str = "cpu") -> int:
    """Memory that could be had now on `device`, for the CPU without swapping."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    import psutil

    return int(psutil.virtual_memory().available)


def peak_rss_gib() -> float:
    """Peak resident memory of this process so far, in GiB."""
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def private_memory_bytes() -> int | None:
    """Memory that only this process holds (anonymous and shared pages, no mapped files); None where unknown."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    sizes = {name: value for name, _, value in (line.partition(":") for line in status.splitlines())}
    return sum(int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def disk_free_bytes(path: Path) -> int:
    """Free space on the file system that holds `path` or its nearest existing parent.

    One that counts no space at all (/proc, some network mounts) has as much as is asked of it.
    """
    probe = path.absolute()
    while not probe.exists():
        probe = probe.parent
    usage = shutil.disk_usage(probe)
    return usage.free if usage.total else sys.maxsize


def versions() -> dict[str, str]:
    """Versions of what computes, read from package metadata (nothing is imported)."""
    found = {"python": platform.python_version()}
    for package in (
        "tuoling",
        "torch",
        "transformers",
        "tokenizers",
        "peft",
        "accelerate",
        "safetensors",
        "bitsandbytes",
        "gguf",
        "llama-cpp-python",
        "gptqmodel",
        "numpy",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the run manifest says of the machine: no host name, no user name."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": cpu_count(),
        "memory_gib": round(memory_total_bytes() / 2**30, 1),
        "cpu_bf16": cpu_has_bf16(),
    }


@dataclass(frozen=True, slots=True)
class Place:
    """Which of a run's processes this one is, from 0; local: among those of this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def place() -> Place:
    """As the launcher says that started this process (torchrun, accelerate, `tuoling train --nproc`, Ray), else
    SLURM's `srun`; alone without one. Within `sbatch` but outside of `srun` a process is alone, whatever was reserved.
    """
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ):
        rank, world, local, beside = (os.environ.get(name, "") for name in names)
        if rank.isdigit() and world.isdigit() and int(world) > 1:
            here = re.match(r"\d+", beside)  # SLURM writes 4(x2),3
            return Place(int(rank), int(world), int(local or rank), int(here.group()) if here else int(world))
    return Place()


def world_size() -> int:
    """How many processes train together; 1 without a launcher."""
    return place().world_size


def adopt(place: Place) -> None:
    """Give the libraries that read torchrun's variables what SLURM said in its own."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    job = int(os.environ.get("SLURM_JOB_ID") or 0)
    for name, value in {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(20000 + job % 20000),
    }.items():
        os.environ.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first name in a SLURM list of nodes: `gpu[07-09,12],big1` is gpu07."""
    head = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return (head.group(1) + (head.group(2) or "")) if head else nodes


def meeting_point() -> str:
    """Where the processes of a run find each other."""
    return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"


_CARRIED = ("TUOLING_LANG", "TUOLING_CACHE", "PYTHONPATH", "OMP_NUM_THREADS", "HF_ENDPOINT", "HF_HUB_OFFLINE")
_CARRIED_PREFIXES = ("NCCL_", "GLOO_")


def for_other_machines() -> dict[str, str]:
    """What the processes of a run on other machines are to find in their environment too. No secrets."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _CARRIED or name.startswith(_CARRIED_PREFIXES)
    }


def interface_towards(host: str, port: int) -> str | None:
    """The network interface whose address other machines see when they and this one meet at `host`; None if unknown.

    gloo looks this machine's own name up otherwise, which on many machines is 127.0.1.1.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return None
    import socket

    import psutil

    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return name
    return None


def variables(**more: str) -> dict[str, str]:
    """What a process started from here finds in its environment; a number of threads the user chose stays."""
    if "OMP_NUM_THREADS" in os.environ:
        more.pop("OMP_NUM_THREADS", None)
    return {**os.environ, **more}
