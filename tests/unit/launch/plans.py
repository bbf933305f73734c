"""Plans and sites with fixed values, for tests of rendering."""

from collections.abc import Sequence
from pathlib import Path

from dist_ft.config.plan import Plan
from dist_ft.launch.composition.compose import compose
from dist_ft.launch.launcher import Launcher
from dist_ft.launch.machine.environ import Site
from dist_ft.launch.planning import planned, settle

ROWS = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
SITE = Site(python="/opt/env/bin/python", cwd="/home/ada/my work", cores=16, environment={"HF_HOME": "/data/hf"})
GPU_SITE = Site(python="/opt/env/bin/python", cwd="/home/ada", cores=32, devices=(2, 3))


def plan_of(launcher: Launcher, words: Sequence[str], output_dir: str | Path = "/runs/first") -> Plan:
    composed = compose([*words, "run_name=first", f"output_dir={output_dir}"])
    return planned(settle(launcher.resolve(composed.config, composed.origins)))
