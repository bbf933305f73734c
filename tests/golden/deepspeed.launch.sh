#!/bin/bash
# Trains first on 2 hosts with 2 workers each.
# `dist-ft train` checks every host and then runs this script, which can also be run by hand.
cd /home/ada || exit 3
export DS_ENV_FILE=/runs/first/workers.env
export PDSH_SSH_ARGS_APPEND='-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=2'
export PDSH_RCMD_TYPE=ssh
export DS_ACCELERATOR=cpu
# DeepSpeed forwards variables with these prefixes unquoted; workers.env has them quoted instead.
for name in ${!PYTHON*} ${!MLFLOW*} ${!MV2*} ${!UCX*} ${!NCCL*}; do unset "$name"; done
exec /opt/env/bin/python -m deepspeed.launcher.runner \
  --hostfile=/runs/first/hostfile \
  --launcher=pdsh \
  --force_multi \
  --num_nodes=2 \
  --num_gpus=2 \
  --master_port=29500 \
  --log_level=warning \
  --no_local_rank \
  --module dist_ft.worker /runs/first/run.yaml
