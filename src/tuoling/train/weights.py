"""Which parameters a run trains, and how they are saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuoling import files
from tuoling.models.adapters import lora_target_names
from tuoling.models.gptq_packages import hidden_from_peft
from tuoling.models.licence import write_lineage
from tuoling.models.save import save_adapter, save_model
from tuoling.train.memory import quantization_of

if TYPE_CHECKING:
    from tuoling.train.prepare import Setup


def make_trainable(model: Any, setup: Setup, *, new: bool) -> Any:
    """All parameters (`full`), or LoRA in float32 on a frozen base: a new one, or the adapter it came with."""
    config = setup.config
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if config.finetuning_type == "full":
        return model.requires_grad_(True)
    if new:
        from peft import LoraConfig, get_peft_model

        asked = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=lora_target_names(model, config.lora_target),
            task_type="CAUSAL_LM",
        )
        with hidden_from_peft():
            model = get_peft_model(model, asked)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return model


class WeightSaver:
    """Writes everything `tuoling chat FOLDER` needs into a folder."""

    def __init__(self, model: Any, setup: Setup) -> None:
        self._model, self._setup = model, setup
        self._template = template_record(setup)
        self._jinja = setup.template.to_jinja(setup.tokenizer)

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """weights: trained ones by name, where the model itself holds only a part of them."""
        save: Callable[..., int] = (
            save_adapter if self._setup.config.finetuning_type == "lora" else save_model
        )
        save(
            self._model,
            folder,
            tokenizer=self._setup.tokenizer,
            template=self._template,
            state_dict=weights,
        )
        write_lineage(folder, self._setup.plan.lineage)
        if self._jinja is not None:  # what other tools (transformers, vLLM) read: the same prompt as ours
            (folder / "chat_template.jinja").write_text(self._jinja, encoding="utf-8")


def template_record(setup: Setup) -> dict[str, Any]:
    """What `template.json` says, so that nobody is asked for it again."""
    weights = setup.source.weights_path
    quantization = quantization_of(setup.config)
    return {
        "template": setup.template.id,
        "stops": list(setup.template.stops),
        "base": {
            "path": str(weights.resolve()),
            "named": setup.source.base.name if setup.source.base else setup.config.model_name_or_path,
            "config_sha256": files.sha256_file(weights / "config.json"),
        },
        "max_seq_len": setup.config.max_seq_len,
        **({"quantization": quantization.to_record()} if quantization else {}),
    }
