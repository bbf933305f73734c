"""Goodput by simulation: the share of a run's time that trains steps which are kept, for 8 to 16,384 GPUs.

    python benchmarks/goodput.py --save-s 20 --stall 0.1 --restart-s 180
    python benchmarks/goodput.py --figure docs/goodput.svg     # needs matplotlib

Failures come as a Poisson process. Its rate is that of 419 unexpected interruptions of 16,384 H100 GPUs in 54 days
("The Llama 3 Herd of Models", 2024, section 3.3.4); clusters with twice as many failures are simulated too. After a
failure, the run is detected as failed, restarted, and trains again what it had trained since its last checkpoint. A
checkpoint costs a step the copy of the state, and counts only once it is written.

Without failures that come while a run restarts, the best interval is near sqrt(2 · stall · time between failures)
(Young, "A first order approximation to the optimum checkpoint interval", 1974).
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path

GPU_HOURS_PER_FAILURE = 16_384 * 54 * 24 / 419
SIZES = [8 * 2**n for n in range(12)]  # 8 to 16,384
HANGS = 0.1  # share of failures without a dead process, which only a time-out finds


@dataclass(frozen=True)
class Costs:
    """Seconds that a run loses.

    Attributes:
        save_s: From the copy of the state to the published checkpoint.
        stall: Share of `save_s` that a step waits.
        crash_s: From the death of a process to the end of all others.
        hang_s: From the beginning of a hang to the end of the run.
        restart_s: From the end of the run to its first step.
    """

    save_s: float
    stall: float
    crash_s: float = 10.0
    hang_s: float = 605.0
    restart_s: float = 180.0


def simulate(gpus: int, every_s: float, costs: Costs, *, days: float, failures: float = 1.0, seed: int = 0) -> float:
    """Return the share of `days` in which steps were trained that no failure undid.

    Args:
        gpus: Number of GPUs.
        every_s: Seconds of training between two checkpoints.
        costs: What saves and failures cost.
        days: Length of the simulated run.
        failures: Factor of the rate of failures.
        seed: Of the times of failures.
    """
    dice = random.Random(seed)
    rate = gpus * failures / (GPU_HOURS_PER_FAILURE * 3600)
    end, now, kept = days * 86_400, 0.0, 0.0
    period = every_s + costs.save_s * costs.stall
    while now < end:
        lasts = min(dice.expovariate(rate), end - now)  # until the next failure
        is_last = now + lasts >= end
        periods = math.floor(lasts / period)
        # a checkpoint that is being written when the failure comes does not count
        written = periods if lasts - periods * period >= costs.save_s * (1 - costs.stall) or is_last else periods - 1
        kept += max(0, written) * every_s + (min(every_s, lasts - periods * period) if is_last else 0.0)
        lost = costs.hang_s if dice.random() < HANGS else costs.crash_s
        now += lasts + lost + costs.restart_s
    return kept / end


def best_interval(gpus: int, costs: Costs, failures: float = 1.0) -> float:
    """Return Young's seconds between checkpoints, at least the time that one takes."""
    between = GPU_HOURS_PER_FAILURE * 3600 / (gpus * failures)
    return max(costs.save_s, math.sqrt(2 * costs.save_s * costs.stall * between))


def draw(rows: list[tuple[int, dict[str, float]]], path: Path) -> None:
    """Write the goodput of each kind of run as lines over the number of GPUs, in SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "goodput"
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    for name in rows[0][1]:
        axes.plot([gpus for gpus, _ in rows], [100 * found[name] for _, found in rows], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([gpus for gpus, _ in rows][::2])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter())
    axes.set_ylim(40, 100.5)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("goodput")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print a table, and draw it if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save-s", type=float, default=20.0, help="seconds to write a checkpoint")
    parser.add_argument("--stall", type=float, default=0.1, help="share of it that a step waits")
    parser.add_argument(
        "--restart-s", type=float, default=180.0, help="seconds from the end of a run to its first step"
    )
    parser.add_argument("--days", type=float, default=2000.0, help="length of the simulated run")
    parser.add_argument("--figure", type=Path, help="SVG file to write")
    given = parser.parse_args()
    costs = Costs(given.save_s, given.stall, restart_s=given.restart_s)
    waiting = Costs(given.save_s, 1.0, restart_s=given.restart_s)
    rows = []
    print(
        "| GPUs | hours between failures | best interval, min | best | 15 min | twice the failures | saves wait | 8 h |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for gpus in SIZES:
        found = {
            "best interval": simulate(gpus, best_interval(gpus, costs), costs, days=given.days),
            "every 15 minutes (default)": simulate(gpus, 900, costs, days=given.days),
            "every 15 minutes, twice the failures": simulate(gpus, 900, costs, days=given.days, failures=2),
            "every 15 minutes, saves wait": simulate(gpus, 900, waiting, days=given.days),
            "every 8 hours": simulate(gpus, 8 * 3600, costs, days=given.days),
        }
        rows.append((gpus, found))
        shares = " | ".join(f"{100 * share:.1f} %" for share in found.values())
        between, minutes = GPU_HOURS_PER_FAILURE / gpus, best_interval(gpus, costs) / 60
        print(f"| {gpus:,} | {between:,.1f} | {minutes:.0f} | {shares} |")
    if given.figure:
        draw(rows, given.figure)


if __name__ == "__main__":
    main()
