#!/bin/bash
# Trains first: 2 workers here, zero2. Run by
# `dist-ft train`, which also ends what is left when a worker fails; can be run by hand.
cd /home/ada || exit 3
export OMP_NUM_THREADS=16
# --world_info is {"localhost": [2, 3]}
exec /opt/env/bin/python -u -m deepspeed.launcher.launch \
  --world_info=eyJsb2NhbGhvc3QiOiBbMiwgM119 \
  --master_addr=127.0.0.1 \
  --master_port=29511 \
  --log_level=critical \
  --no_local_rank \
  --module dist_ft.worker /runs/first/run.yaml
