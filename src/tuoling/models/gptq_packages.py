"""gptqmodel, the package that makes GPTQ and AWQ weights and runs them: whether it is here, and how it is kept quiet."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from tuoling import environment
from tuoling.errors import MissingPackage, ModelError
from tuoling.language import tr
from tuoling.models.weight_files import read_header

METHODS = ("gptq", "awq")
"""`quant_method`s in config.json that it runs."""

INSTALL = (
    'pip install wheel setuptools ninja\npip install --no-build-isolation "gptqmodel==7.6.0" "optimum==2.3.0"'
)
"""gptqmodel looks for torch while it is built, so it must see the one that is installed."""

ATEN_OUTPUTS = 16
_NEEDED = ("gptqmodel", "optimum", "tokenicer", "logbar", "pcre", "device_smi", "defuser", "torchao")


def require_gptqmodel(purpose: str, otherwise: str | None = None) -> None:
    """Raise MissingPackage, with the lines to type, where gptqmodel, something it imports, or optimum is missing.

    otherwise: how to go on without it.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        error = MissingPackage(", ".join(missing), extra="gptq", purpose=purpose)
        error.remedy = INSTALL + (f"\n{otherwise}" if otherwise else "")
        raise error


def saved_method(config: Any) -> str | None:
    """How a model's weights were saved quantised by config.json (`gptq`, `awq`, others' names); None: they were not."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return str(getattr(method, "value", method))


def require_for(config: Any, *, for_training: bool, where: str) -> bool:
    """Whether gptqmodel has to run the weights of this config; it is imported only after this.

    Raises MissingPackage where it is not here, ModelError where training was asked for.
    """
    method = saved_method(config)
    if method not in METHODS:
        return False
    if for_training:
        raise ModelError(
            tr(f"{method} weights are not trained on here", f"这里不在 {method} 权重上训练"),
            where=where,
            remedy=tr(
                "take the model they were made from, in 4 bits if need be: quantization_bit=4\n"
                "or multiply them out: tuoling convert FOLDER OUT",
                "请用量化之前的模型，需要时用 4 位基座：quantization_bit=4\n或先还原：tuoling convert 目录 OUT",
            ),
        )
    require_gptqmodel(tr(f"{method.upper()} weights", f"{method.upper()} 权重"))
    environment.prepare_gptqmodel()
    return True


def choose_kernel(config: Any, folder: Path, device: str) -> None:
    """Write into `config` which of gptqmodel's kernels is to run, where its own choice would stop.

    On a CPU it takes ATen's int4 matmul for 4 bits, which wants multiples of 16 outputs and stops at others.
    """
    said = config.quantization_config
    if device != "cpu" or not isinstance(said, dict) or said.get("quant_method") != "gptq":
        return
    for file in folder.glob("*.safetensors"):
        for name, entry in read_header(file).entries.items():
            if name.endswith(".qweight") and entry["shape"][1] % ATEN_OUTPUTS:
                said["backend"] = "gptq_torch"
                return


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is printed on stdout, which belongs to results: gptqmodel has a banner and a line for each step.

    Afterwards it says errors only.
    """
    with redirect_stdout(io.StringIO()):
        from logbar import LogBar

        LogBar.shared().setLevel("ERROR")
        yield


@contextmanager
def hidden_from_peft() -> Iterator[None]:
    """Inside, PEFT does not find gptqmodel.

    Where it is installed, PEFT imports it to ask of every layer whether it is one of its: 4 s of CPU and a banner on
    stdout for every adapter. A model that has such layers has imported it already, and then it stays.
    """
    if "gptqmodel" in sys.modules:
        yield
        return
    from peft.import_utils import is_gptqmodel_available

    is_gptqmodel_available.cache_clear()
    sys.modules["gptqmodel"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["gptqmodel"]
        is_gptqmodel_available.cache_clear()
