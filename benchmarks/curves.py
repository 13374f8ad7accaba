"""Loss of every step beside transformers' Trainer with PEFT: same model, rows, order, schedule and adapter.

    python benchmarks/curves.py MODEL ROWS [--steps 200] [--batch 4] [--dtype fp32|bf16] [--template alpaca] [--write]

Runs `tuoling.train` and then Trainer over the same token ids, padded, in the same order, from the same adapter
weights, without dropout. Prints the largest and the mean difference in nats; `--write` leaves curves.json and
curves.png beside this script.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tuoling
from tuoling.config import load_config
from tuoling.data.sampler import SampleOrder
from tuoling.models.load import load_model
from tuoling.train.prepare import Setup, prepare
from tuoling.train.weights import make_trainable

HERE = Path(__file__).resolve().parent


def examples(setup: Setup, count: int) -> list[dict[str, list[int]]]:
    """The first `count` rows of the run's order, as Trainer takes them."""
    order, made = SampleOrder(len(setup.train), setup.config.seed), []
    for row in order.rows(0, count):
        example = setup.train.store[int(setup.train.index[int(row)])]
        ids = example.input_ids.astype(int).tolist()
        labels = [-100] * len(ids)
        for begin, end in example.spans.tolist():
            labels[begin:end] = ids[begin:end]
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return made


def trainer_losses(setup: Setup, steps: int, folder: Path) -> list[float]:
    """Loss of every step of transformers' Trainer."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    config = setup.config
    torch.manual_seed(config.seed)
    model: Any = load_model(setup.source, dtype=setup.dtype, device="cpu", for_training=True)
    model = make_trainable(model, setup)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.per_device_train_batch_size,
        max_steps=steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=setup.plan.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=setup.dtype == "bf16",
        seed=config.seed,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    rows = examples(setup, steps * config.per_device_train_batch_size)
    collator = DataCollatorForSeq2Seq(setup.tokenizer.hf, padding=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    keys = {
        "model_name_or_path": asked.model,
        "data": asked.rows,
        "output_dir": str(folder / "run"),
        "template": asked.template,
        "overlong": "drop",
        "max_seq_len": 1024,
        "max_steps": asked.steps,
        "per_device_train_batch_size": asked.batch,
        "lora_dropout": 0.0,
        "learning_rate": 1e-3,
        "dtype": asked.dtype,
        "save_steps": 0,
        "seed": 7,
    }
    words = [f"{key}={value}" for key, value in keys.items()]
    config = load_config([], words).config
    tuoling.train(**keys, say=lambda _: None)
    metrics = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ours = np.array([json.loads(line)["loss"] for line in metrics])
    theirs = np.array(trainer_losses(prepare(config, say=lambda _: None), asked.steps, folder / "trainer"))
    apart = ours - theirs
    found = {
        "steps": asked.steps,
        "rows_per_step": asked.batch,
        "dtype": asked.dtype,
        "largest_difference_nats": float(np.abs(apart).max()),
        "mean_difference_nats": float(apart.mean()),
        "tuoling": [round(float(loss), 5) for loss in ours],
        "trainer": [round(float(loss), 5) for loss in theirs],
    }
    print({key: value for key, value in found.items() if not isinstance(value, list)})
    print(
        f"first {ours[0]:.4f} / {theirs[0]:.4f}, last {ours[-1]:.4f} / {theirs[-1]:.4f} (Tuoling / Trainer)"
    )
    if asked.write:
        (HERE / f"curves-{asked.dtype}.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        draw(ours, theirs, HERE / f"curves-{asked.dtype}.png")


def draw(ours: np.ndarray, theirs: np.ndarray, path: Path) -> None:
    """Both curves, and what lies between them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
    above.plot(theirs, color="tab:orange", linewidth=3, label="Trainer + PEFT")
    above.plot(ours, color="tab:blue", linewidth=1, label="Tuoling")
    above.set_ylabel("loss, nats a token")
    above.legend()
    below.plot(ours - theirs, color="tab:gray")
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
