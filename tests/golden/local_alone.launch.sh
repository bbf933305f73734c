#!/bin/bash
# Trains first: one worker here, zero2. Run by
# `dist-ft train`, which also ends what is left when a worker fails; can be run by hand.
cd '/home/ada/my work' || exit 3
export OMP_NUM_THREADS=16
export DS_ACCELERATOR=cpu
exec /opt/env/bin/python -u -m dist_ft.worker /runs/first/run.yaml
