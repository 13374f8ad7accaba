"""The key `mix`: sources and their weights, as a mapping or as one text; and what does not go with it.

Beside it what does not go with the other keys that decide which rows are seen when.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tuoling.language import tr


def read_mix(value: Any) -> Any:
    """`general.json=30%,domain.json=70%` or a mapping → {source: weight}. What cannot be read stays as it is."""
    if isinstance(value, str):
        pairs = [part.rpartition("=") for part in value.split(",") if part.strip()]
        if not all(name and equals for name, equals, _ in pairs):
            return value
        value = {name.strip(): weight.strip() for name, _, weight in pairs}
    if not isinstance(value, Mapping):
        return value
    return {str(name): _weight(weight) for name, weight in value.items()}


def _weight(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip().removesuffix("%").strip()
    try:
        return float(text)
    except ValueError:
        return value


def data_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """`data` where only `mix` names the sources."""
    mix = read_mix(values.get("mix"))
    if not isinstance(mix, Mapping) or not mix or values.get("data") or values.get("dataset"):
        return {}
    return {"data": tuple(mix)}


def mix_issues(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """(key, problem, remedy) where `mix` does not go with the other keys."""
    mix = read_mix(values.get("mix"))
    if not isinstance(mix, Mapping) or not all(isinstance(weight, (int, float)) for weight in mix.values()):
        return
    named = [values.get("data") or (), values.get("dataset") or ()]
    sources = [name for names in named if isinstance(names, tuple) for name in names] or list(mix)
    if len(mix) < 2:
        yield (
            "mix",
            tr("mix needs at least two sources", "mix 至少要有两个数据源"),
            "mix={domain.json: 0.7, general.json: 0.3}",
        )
    wrong = {name: weight for name, weight in mix.items() if not weight > 0}
    if wrong:
        yield (
            "mix",
            tr(f"weights must be greater than 0: {wrong}", f"权重必须大于 0：{wrong}"),
            tr("take the source out of mix and data", "把该数据源从 mix 和 data 中去掉"),
        )
    missing = [name for name in sources if name not in mix]
    unknown = [name for name in mix if name not in sources]
    if missing or unknown:
        parts = [tr(f"no share for {name}", f"{name} 没有写比例") for name in missing]
        parts += [tr(f"{name} is not in the data", f"{name} 不在数据中") for name in unknown]
        yield (
            "mix",
            "mix: " + tr("; ", "；").join(parts),
            tr("mix alone names the data too", "只写 mix 即可，不必再写 data"),
        )
    if values.get("share_prefixes"):
        yield (
            "share_prefixes",
            tr(
                "share_prefixes with mix: a row inside another one's would have that one's share",
                "share_prefixes 与 mix 冲突：放进另一条里的数据会按另一条的比例出现",
            ),
            "share_prefixes=false",
        )


def stopping_issues(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """(key, problem, remedy) where an early stop has no held-out rows to go by."""
    if values.get("early_stopping_patience") is None:
        return
    if not (values.get("val_size") or values.get("eval_data") or values.get("eval_dataset")):
        yield (
            "early_stopping_patience",
            tr(
                "early_stopping_patience goes by the loss of held-out rows, and none are held out",
                "early_stopping_patience 依据验证损失，但没有留出验证数据",
            ),
            "val_size=0.05",
        )


def streaming_issues(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """(key, problem, remedy) where training cannot begin before all rows are there."""
    if values.get("streaming_start") is not True:
        return
    later = tr("or streaming_start=false", "或 streaming_start=false")
    max_steps = values.get("max_steps")
    if not isinstance(max_steps, int) or max_steps <= 0:
        yield (
            "max_steps",
            tr(
                "streaming_start needs max_steps: how many rows there are, and where the learning rate ends, is not "
                "known when training begins",
                "streaming_start 需要 max_steps：开始训练时还不知道共有多少条数据、学习率到哪一步结束",
            ),
            f"max_steps=1000, {later}",
        )
    if values.get("save_steps", 500) is None:
        yield (
            "save_steps",
            tr(
                "a save at the end of each epoch: with streaming_start nobody knows yet where that is",
                "要在每轮结束时保存，但 streaming_start 开始时还不知道一轮有多长",
            ),
            f"save_steps=500, {later}",
        )
    if values.get("val_size"):
        yield (
            "val_size",
            tr(
                "held-out rows are drawn from all rows, which streaming_start does not wait for",
                "验证数据要从全部数据中抽取，而 streaming_start 不等全部数据",
            ),
            tr(f"eval_data=FILE, {later}", f"eval_data=文件，{later}"),
        )
    if values.get("per_device_train_batch_size", 4) is None:
        yield (
            "max_tokens_per_batch",
            tr(
                "packs are laid over a whole epoch, which streaming_start does not wait for",
                "按 token 打包要看到整轮数据，而 streaming_start 不等全部数据",
            ),
            f"batch_size=64, {later}",
        )
    for key in ("mix", "share_prefixes"):
        if values.get(key):
            yield (
                key,
                tr(
                    f"{key} goes by all rows, which streaming_start does not wait for",
                    f"{key} 要看到全部数据，而 streaming_start 不等全部数据",
                ),
                "streaming_start=false",
            )
