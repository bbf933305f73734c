"""Plans and sites with fixed values, for tests of rendering."""

from collections.abc import Sequence
from pathlib import Path

from dist_ft.checks.batch import settle_batch
from dist_ft.checks.precision import settle_dtype
from dist_ft.config.plan import Plan, make_plan
from dist_ft.launch.composition.compose import compose
from dist_ft.launch.launcher import Launcher
from dist_ft.launch.machine.environ import Site

ROWS = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
SITE = Site(python="/opt/env/bin/python", cwd="/home/ada/my work", cores=16, environment={"HF_HOME": "/data/hf"})
GPU_SITE = Site(python="/opt/env/bin/python", cwd="/home/ada", cores=32, devices=(2, 3))


def plan_of(launcher: Launcher, words: Sequence[str], output_dir: str | Path = "/runs/first") -> Plan:
    composed = compose([*words, "run_name=first", f"output_dir={output_dir}"])
    nodes, workers = launcher.resolve(composed.config)
    config, _ = settle_dtype(composed.config, composed.origins, bfloat16=launcher.has_bfloat16(composed.config))
    config, _ = settle_batch(config, composed.origins, nodes * workers)
    return make_plan(config, nodes=nodes, workers_per_node=workers, origins={})
