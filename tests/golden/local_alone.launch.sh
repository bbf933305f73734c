#!/bin/bash
# Trains first: one worker on this machine, zero2.
# `dist-ft train` runs this script and cleans up after a failure; it can also be run by hand.
cd '/home/ada/my work' || exit 3
export OMP_NUM_THREADS=16
export DS_ACCELERATOR=cpu
exec /opt/env/bin/python -u -m dist_ft.worker /runs/first/run.yaml
