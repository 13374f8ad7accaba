"""Sixteen workers of Ray Train, a card each: `python recipes/ray_train.py config.yaml`.

Documented only: it was not run under Ray. Ray Train starts the workers, says in their environment which is which, and
connects them; tuoling takes part in the process group it finds. The group must pass numbers of the CPU, too, hence the
two backends. The config must name an output_dir on a disk that all nodes see.
"""

from __future__ import annotations

import sys

from ray.train import ScalingConfig  # pip install "ray[train]"
from ray.train.torch import TorchConfig, TorchTrainer


def train(config: dict[str, str]) -> None:
    import tuoling

    tuoling.train(config["path"])


if __name__ == "__main__":
    trainer = TorchTrainer(
        train,
        train_loop_config={"path": sys.argv[1]},
        scaling_config=ScalingConfig(num_workers=16, use_gpu=True),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl"),
    )
    trainer.fit()
