"""From words to a plan: compose, resolve the workers, settle dtype and batch sizes, and check all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..checks.batch import batch_problems, settle_batch
from ..checks.precision import settle_dtype
from ..checks.request import check
from ..config.plan import Plan, make_plan
from ..config.run import RunConfig
from ..errors import RequestError
from .composition.compose import compose
from .launcher import Launcher, Workers
from .machine.environ import Site


def plan_run(words: Sequence[str], config_dir: str | Path | None, site: Site) -> tuple[Plan, Launcher]:
    """Return the plan of a run, and its launcher.

    Args:
        words: Arguments of the command line.
        config_dir: Folder with the user's own groups.
        site: This machine.

    Raises:
        RequestError: With all problems of the request.
    """
    composed = compose(words, config_dir)
    config, origins = composed.config, composed.origins
    launcher = find_launcher(config, site)
    try:
        workers = settle(launcher.resolve(config, origins))
    except RequestError as error:
        raise RequestError(*check(config, origins), *error.problems) from error
    settled = (workers.config, workers.origins)
    problems = [*check(*settled), *batch_problems(*settled, workers.nodes, workers.per_node)]
    if problems:
        raise RequestError(*problems)
    return planned(workers), launcher


def settle(workers: Workers) -> Workers:
    """Settle the dtype and the batch sizes for the workers of a run."""
    config, origins = settle_dtype(workers.config, workers.origins, bfloat16=workers.have_bfloat16)
    config, origins = settle_batch(config, origins, workers.nodes * workers.per_node)
    return replace(workers, config=config, origins=origins)


def planned(workers: Workers) -> Plan:
    """Return the plan of a run of which everything is settled."""
    return make_plan(workers.config, nodes=workers.nodes, workers_per_node=workers.per_node, origins=workers.origins)


def plan_data(words: Sequence[str], config_dir: str | Path | None) -> Plan:
    """Return a plan of one process with which the data is shown; neither workers nor batch sizes matter.

    Raises:
        RequestError: With all problems of the request.
    """
    composed = compose(words, config_dir)
    if problems := check(composed.config, composed.origins):
        raise RequestError(*problems)
    config, _ = settle_dtype(composed.config, {}, bfloat16=False)
    config, _ = settle_batch(config, {}, 1)
    return make_plan(config, nodes=1, workers_per_node=1, origins=composed.origins)


def find_launcher(config: RunConfig, site: Site) -> Launcher:
    """Return the launcher that the configuration selects."""
    if config.launch.name == "local":
        from .local import LocalLauncher

        return LocalLauncher(site)
    if config.launch.name == "deepspeed":
        from .deepspeed import HostfileLauncher

        return HostfileLauncher(site)
    from .slurm.launcher import SlurmLauncher

    return SlurmLauncher(site)
