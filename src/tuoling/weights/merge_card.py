"""README.md of a merged model, in Chinese and English, from its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuoling.models.licence import from_json
from tuoling.models.licence_answer import card_section, of_models, one_licence


def merge_card(name: str, record: Mapping[str, Any]) -> str:
    """A card with the hub's front matter: what was merged into what, what it cost, which licences count."""
    base = record["base"]
    parts = from_json(record["lineage"], "lineage")
    licence = one_licence(parts)
    adapters = ", ".join(f"`{one['named']}` x {one['weight']:g}" for one in record["adapters"])
    facts = [
        ("基座 base", f"`{base['named']}` ({base['family']})"),
        ("基座许可 licence of the base", of_models(parts) or "未知 unknown"),
        ("适配器 adapters", adapters),
        ("改动的张量 tensors changed", f"{record['changed']:,} / {record['tensors']:,}"),
        ("存储精度 stored as", ", ".join(record["dtypes"])),
        *_losses(record.get("low_bit_route")),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in facts)
    front = ["---", "language:", "- zh", "tags:", "- tuoling", "library_name: transformers"]
    front += [f"base_model: {base['named']}", "base_model_relation: finetune"]
    front += [f"license: {licence}"] if licence else []
    return (
        "\n".join([*front, "---"])
        + f"""
# {name} · Tuoling

由适配器合并进基座得到。Adapters merged into their base.

| | |
|---|---|
{table}

```
tuoling chat MODEL
```

把 MODEL 换成本目录。来源与散列值见 `tuoling.json`。
MODEL is this folder. Where the weights come from, with hashes, is in `tuoling.json`.

{card_section(parts)}"""
    )


def _losses(route: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not route or "loss_merged" not in route:
        return []
    return [
        (
            "探针文本损失 loss on probe texts",
            f"{route['trained_on']}: {route['loss_as_trained']:.4f} → 合并后 merged: {route['loss_merged']:.4f}",
        )
    ]
