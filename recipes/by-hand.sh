#!/bin/sh
# Two machines with eight cards each; the first one is 10.0.0.1. The same command on both, but for the number:
#   machine 0$ sh recipes/by-hand.sh 0
#   machine 1$ sh recipes/by-hand.sh 1
# The network interface towards 10.0.0.1 is found; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name another one.
# After a machine was lost: the same with `resume RUN` in place of `train config.yaml`, on both.
exec tuoling train config.yaml --nproc 8 --nnodes 2 --node-rank "$1" --master 10.0.0.1:29500
