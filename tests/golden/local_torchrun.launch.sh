#!/bin/bash
# Trains first: 2 workers on this machine, fsdp.
# `dist-ft train` runs this script and cleans up after a failure; it can also be run by hand.
cd '/home/ada/my work' || exit 3
export OMP_NUM_THREADS=8
export DS_ACCELERATOR=cpu
exec /opt/env/bin/python -m dist_ft.launch.torchrun \
  --nnodes=1 \
  --nproc-per-node=2 \
  --rdzv-backend=c10d \
  --rdzv-endpoint=127.0.0.1:0 \
  --rdzv-id=first \
  --local-addr=127.0.0.1 \
  -m dist_ft.worker /runs/first/run.yaml
