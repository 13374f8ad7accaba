#!/bin/sh
# One machine with two cards. Several machines: --nnodes 2 --node-rank I --master-addr 10.0.0.1 for torchrun, on each.
exec torchrun --nproc-per-node 2 -m tuoling train config.yaml
