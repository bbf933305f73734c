#!/bin/bash
# Trains first: 2 workers on this machine, zero2.
# `dist-ft train` runs this script and cleans up after a failure; it can also be run by hand.
cd /home/ada || exit 3
export OMP_NUM_THREADS=16
# --world_info is {"localhost": [2, 3]}
exec /opt/env/bin/python -u -m dist_ft.launch.forward deepspeed.launcher.launch \
  --world_info=eyJsb2NhbGhvc3QiOiBbMiwgM119 \
  --master_addr=127.0.0.1 \
  --master_port=29511 \
  --log_level=critical \
  --no_local_rank \
  --module dist_ft.worker /runs/first/run.yaml
