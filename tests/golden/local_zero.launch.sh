#!/bin/bash
# Trains first: 2 workers on this machine, zero3.
# `dist-ft train` runs this script and cleans up after a failure; it can also be run by hand.
cd '/home/ada/my work' || exit 3
export OMP_NUM_THREADS=8
export DS_ACCELERATOR=cpu
# --world_info is {"localhost": [0, 1]}
port=$(/opt/env/bin/python -c 'import socket; s = socket.socket(); s.bind(('"'"'127.0.0.1'"'"', 0)); print(s.getsockname()[1])') || exit 3
exec /opt/env/bin/python -u -m dist_ft.launch.forward deepspeed.launcher.launch \
  --world_info=eyJsb2NhbGhvc3QiOiBbMCwgMV19 \
  --master_addr=127.0.0.1 \
  --master_port="$port" \
  --log_level=critical \
  --no_local_rank \
  --module dist_ft.worker /runs/first/run.yaml
