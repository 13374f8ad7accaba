"""One of two processes that train one config after another, its arguments: starting them costs more than the runs do."""

from __future__ import annotations

import sys

import tuoling
from tuoling import environment


def main() -> None:
    environment.quiet_libraries()
    import torch.distributed as dist

    dist.init_process_group("gloo")  # as Ray Train does it: the runs find the group and leave it standing
    for config in sys.argv[1:]:
        tuoling.train(config, say=lambda _: None)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
