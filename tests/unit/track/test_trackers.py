"""W&B is imported by the rank that tracks with it only."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from pathlib import Path
from types import SimpleNamespace as Some
from dist_ft.track.trackers import build_tracker

worker = Some(place=Some(is_main=True), terminal=sys.stderr)
plan = Some(config=Some(track=Some(wandb="off", report=False)), run_dir=Path(sys.argv[1]))
(plan.run_dir / "logs").mkdir()
tracker, identity = build_tracker(plan, Some(step=0, tracker_id="kept"), 3, worker)
tracker.log({"train/loss": 1.0}, step=1)
tracker.close()
print(identity, "wandb" in sys.modules, (plan.run_dir / "metrics.jsonl").exists())
"""


def test_a_run_without_wandb_does_not_import_it(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["kept", "False", "True"], run.stderr
