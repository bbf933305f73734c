"""record.json: what a start of a run found, for its report and its card.

Versions, devices, the estimated memory of a rank, the accounts of the data and the shares of a mixture.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.fingerprints import versions
from ..config.plan import RECORD_FILE, Plan
from ..data.order.proportions import proportions
from ..data.store.opened import Split
from ..prepare import Prepared
from ..process import comm
from ..process.place import Worker
from ..state import BuiltModel
from .model import estimate_parts

ACCOUNT = (  # of a ledger: counts, without the places of rows
    "rows_of_source", "rows_read", "rows_kept", "repeated", "augmented", "tokens", "samples", "supervised_tokens",
    "tokens_left_over", "longest", "layout", "formats",
)  # fmt: skip


def record_start(plan: Plan, prepared: Prepared, built: BuiltModel, worker: Worker) -> None:
    """Write record.json into the run's folder. Collective.

    Args:
        plan: plan of the run.
        prepared: prepared data of the run.
        built: model with the method applied, before the engine distributes it; only that of rank 0 is measured.
        worker: this worker.
    """
    devices = comm.gather(name_of(worker.device))
    if not worker.place.is_main:
        return
    content = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {**versions(), **({"CUDA of torch": torch.version.cuda} if torch.version.cuda else {})},
        "platform": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "devices": dict(Counter(devices)),
        "memory": [asdict(part) for part in estimate_parts(plan, built)],
        "data": {
            name: account(split)
            for name in ("train", "validation", "test")
            if (split := getattr(prepared, name)) is not None
        },
        "mixture": [{**asdict(found), "times": found.times} for found in proportions(plan.config, prepared.train)],
    }
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    staging = plan.run_dir / f".{RECORD_FILE}.new"
    staging.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(staging, plan.run_dir / RECORD_FILE)


def name_of(device: torch.device) -> str:
    """Return the model of a GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def account(split: Split) -> dict[str, Any]:
    """Return the counts of a split, or of each set of a mixture by name: rows, tokens, and rows dropped by cause."""
    if split.parts:
        return {"sets": {name: account(part) for name, part in split.parts.items()}}
    ledger = split.ledger
    files = ledger.get("files", {})
    return {
        **{key: ledger[key] for key in ACCOUNT if key in ledger},
        "files": {Path(name).name: rows for name, rows in list(files.items())[:10]},
        "file_count": len(files),
        "dropped": rows_by_cause(ledger["dropped"]),
        "copies_left_out": rows_by_cause(ledger.get("copies_left_out", {})),
        "truncated_rows": ledger["truncated"]["rows"],
        "truncated_tokens": ledger["truncated"]["tokens"],
    }


def rows_by_cause(tallies: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return the number of rows of each cause."""
    return {cause: tally["rows"] for cause, tally in tallies.items()}
