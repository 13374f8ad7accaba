"""Brings any key to ours: its other names, its other ways to say a value, and what is answered or refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tuoling import foreign_keys
from tuoling.config_keys import RunConfig
from tuoling.foreign_keys import ALIASES, REFUSED
from tuoling.language import tr

PARALLEL = frozenset(("zero2", "zero3", "zero2_offload", "zero3_offload"))
FIELDS = frozenset(RunConfig.model_fields)


@dataclass(frozen=True)
class Issue:
    """One thing wrong in a configuration."""

    problem: str
    where: str
    remedy: str | None = None


@dataclass
class Settled:
    """Values in our keys, the place each was written, what was said, what is wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)

    def put(self, key: str, value: Any, where: str) -> None:
        """Set a value; the same key written in two ways with two values is an issue."""
        if key in self.values and self.values[key] != value and self.where[key] != where:
            problem = tr(
                f"{key} is given twice: {self.values[key]} ({self.where[key]}) and {value}",
                f"{key} 给出了两个值：{self.values[key]}（{self.where[key]}）和 {value}",
            )
            self.issues.append(Issue(problem, where))
        self.values[key], self.where[key] = value, where

    def default(self, values: Mapping[str, Any], where: str, *, unless: Iterable[str] = ()) -> None:
        """Take over another tool's defaults for what its file does not say."""
        skip = {*self.values, *unless}
        taken = {key: value for key, value in values.items() if key not in skip}
        for key, value in taken.items():
            self.put(key, value, where)
        if taken:
            self.notes.append(foreign_keys.default_notice(taken))


def nearest(word: str, names: Iterable[str]) -> str | None:
    """ "did you mean …?", or None when nothing is near."""
    near = difflib.get_close_matches(word, sorted(names), n=3, cutoff=0.6)
    return tr(f"did you mean {', '.join(near)}?", f"是不是想写 {'、'.join(near)}？") if near else None


def settle(values: Mapping[str, Any], places: Mapping[str, str]) -> Settled:
    """Bring every key to ours: renamed, converted, answered, refused, or unknown with the nearest name."""
    done = Settled()
    renamed: list[str] = []
    answered: dict[str, list[str]] = {}
    if values.get("mix_strategy") == "interleave_under":
        values = _interleaved(values, places, done)
    for key in sorted(values, key=lambda key: key.endswith("_strategy")):  # a strategy decides over its steps
        value, where = values[key], places[key]
        if _convert(key, value, where, done):
            continue
        if key in FIELDS:
            done.put(key, value, where)
        elif key in ALIASES:
            renamed.append(f"{key} → {ALIASES[key]}")
            done.put(ALIASES[key], value, where)
        elif key in REFUSED:
            if value not in (None, False, 0, "", "none", [], {}):
                problem = f"{key}={value}: {foreign_keys.refusal(key)}"
                remedy = tr(f"{key}=null trains without it", f"加上 {key}=null 则不使用它继续训练")
                done.issues.append(Issue(problem, where, remedy))
        elif (answer := foreign_keys.answers(key)) is not None:
            answered.setdefault(answer, []).append(key)
        else:
            near = nearest(key, {*FIELDS, *ALIASES})
            done.issues.append(Issue(tr(f"unknown key: {key}", f"未知的键：{key}"), where, near))
    if renamed:
        done.notes.append(
            tr(f"read as our keys: {', '.join(renamed)}", f"按我们的键名读取：{'、'.join(renamed)}")
        )
    done.notes += [f"{', '.join(keys)}: {answer}" for answer, keys in answered.items()]
    return done


def _interleaved(values: Mapping[str, Any], places: Mapping[str, str], done: Settled) -> dict[str, Any]:
    """LLaMA-Factory's interleave_under and its interleave_probs (equal ones without them) as our `mix`."""
    values, where = dict(values), places["mix_strategy"]
    names = words(values.get("dataset") or values.get("data") or ())
    probabilities = words(values.pop("interleave_probs", None) or ("1",) * len(names))
    if len(names) != len(probabilities):
        problem = tr(
            f"interleave_probs: {len(probabilities)} numbers for {len(names)} datasets",
            f"interleave_probs：{len(names)} 个数据集，却有 {len(probabilities)} 个数",
        )
        done.issues.append(Issue(problem, places.get("interleave_probs", where)))
        return values
    done.put("mix", dict(zip(names, probabilities, strict=True)), where)
    done.notes.append(
        tr(
            "interleave_under: mix, by exact shares instead of drawn ones; as there, an epoch ends with the first source "
            "that is through",
            "interleave_under：按 mix 处理，比例精确而不是随机抽取；与原来一样，任一数据源用完即为一轮",
        )
    )
    return values


def words(value: Any) -> list[str]:
    """A list, or one text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    return [str(part).strip() for part in parts if str(part).strip()]


def _convert(key: str, value: Any, where: str, done: Settled) -> bool:
    """Keys whose value must be turned into another, too. True when the key has been dealt with."""
    if key in ("bf16", "fp16", "pure_bf16"):
        if not isinstance(value, bool):
            done.issues.append(_no_bool(key, value, where))
        elif value:
            done.put("dtype", "fp16" if key == "fp16" else "bf16", where)
    elif key in ("load_in_8bit", "load_in_4bit"):
        if value is True:
            _load_in_bits(8 if key == "load_in_8bit" else 4, key, where, done)
        elif value is not False:
            done.issues.append(_no_bool(key, value, where))
    elif key in ("quantization_method", "quant_method", "llm_int8_threshold"):
        if str(value).lower() not in ("bnb", "bitsandbytes", "6", "6.0"):
            name = "quantization_method" if key == "quant_method" else key
            remedy = tr(f"{key}=null uses what is here", f"加上 {key}=null 则使用这里的方式")
            done.issues.append(Issue(f"{key}={value}: {foreign_keys.refusal(name)}", where, remedy))
    elif key in ("eval_strategy", "evaluation_strategy", "save_strategy"):
        _strategy(key, value, where, done)
    elif key == "mask_history":
        done.put("learn", "last" if value else "all", where)
    elif key == "disable_gradient_checkpointing":
        done.put("gradient_checkpointing", not value, where)
    elif key == "use_swanlab":
        if value:
            done.put("report_to", ["swanlab"], where)
    elif key == "mix_strategy":
        if value not in ("concat", "interleave_under"):
            done.issues.append(Issue(f"{key}={value}: {foreign_keys.refusal(key)}", where, f"{key}=null"))
    elif key == "lr_scheduler_type" and value == "constant_with_warmup":
        done.put(key, "constant", where)
        done.notes.append(
            tr(
                "constant_with_warmup is constant here: warm-up is a key of its own",
                "constant_with_warmup 在这里就是 constant：预热由单独的键决定",
            )
        )
    elif key == "deepspeed":
        if value not in (None, False, ""):
            done.put("parallel" if value in PARALLEL else key, value, where)
    elif key == "fsdp":
        if value not in (None, False, "", [], {}):
            done.put("parallel", "fsdp", where)
    elif key == "use_muon":
        if value:
            done.put("optim", "muon", where)
    elif key == "trust_remote_code":
        if value:
            done.notes.append(
                tr(
                    "trust_remote_code is noted and not obeyed: code from a model folder runs only with allow_remote_code=true",
                    "trust_remote_code 已读到但不执行：只有加上 allow_remote_code=true 才会运行模型自带的代码",
                )
            )
    else:
        return False
    return True


def _load_in_bits(bits: int, key: str, where: str, done: Settled) -> None:
    """transformers' word for it. What 4 bits are by default differs from tool to tool, so it is said."""
    done.put("quantization_bit", bits, where)
    ours = RunConfig.model_fields
    kind, double = ours["quantization_type"].default, ours["double_quantization"].default
    note = f"{key}: quantization_bit={bits}"
    if bits == 4:
        note += tr(", unless told otherwise ", "，如无另外指定则 ")
        note += f"quantization_type={kind}, double_quantization={str(double).lower()}"
    done.notes.append(note)


def _no_bool(key: str, value: Any, where: str) -> Issue:
    return Issue(tr(f"{key}={value}: must be true or false", f"{key}={value}：只能是 true 或 false"), where)


def _strategy(key: str, value: Any, where: str, done: Settled) -> None:
    """`no` (which YAML reads as false), `steps` or `epoch` → how many steps. Evaluation cannot be switched off."""
    name = "save_steps" if key == "save_strategy" else "eval_steps"
    if value == "epoch":
        done.values[name], done.where[name] = None, where
    elif value in ("no", False):
        done.values[name], done.where[name] = 0, where
    elif value != "steps":
        problem = tr(
            f"{key}={value}: must be one of no, steps, epoch", f"{key}={value}：只能是 no、steps、epoch 之一"
        )
        done.issues.append(Issue(problem, where))
