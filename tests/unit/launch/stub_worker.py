"""Worker without torch: records its rank and environment, waits for the others, and fails or stops on request."""

import json
import os
import socket
import sys
import time
from pathlib import Path

from dist_ft.process.stop import Stop

Stop().listen()
run_dir = Path(sys.argv[1]).parent
rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
names = ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "STUB_WORD", "HF_HOME", "WANDB_API_KEY")
said = {"rank": rank, "size": size, "host": socket.gethostname(), "env": {name: os.environ.get(name) for name in names}}
(run_dir / f"said-{rank}.json").write_text(json.dumps(said))
while len(list(run_dir.glob("said-*.json"))) < size:
    time.sleep(0.05)
time.sleep(0.2)
if (run_dir / f"fail-{rank}").exists():
    (run_dir / "failure.json").write_text(
        json.dumps({"rank": rank, "host": said["host"], "exit_code": 3, "report": "told"})
    )
    sys.exit(3)
if list(run_dir.glob("fail-*")):
    time.sleep(120)  # like a rank that waits in a collective
