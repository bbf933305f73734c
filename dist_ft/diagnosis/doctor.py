"""Entry point of `dist-ft doctor`: runs all checks of this machine and prints their findings.

Exits with 3 if a problem prevents every run on this machine, otherwise with 0. Notes affect only some runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import MachineError, RequestError
from .device import check_devices, check_kernels
from .finding import Finding, Level
from .machine import check_disk, check_limits, check_programs
from .network import check_network
from .versions import check_versions

CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "versions": check_versions,
    "devices": check_devices,
    "kernels": check_kernels,
    "programs": check_programs,
    "disk and memory": check_disk,
    "network": check_network,
    "limits": check_limits,
}
STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.PROBLEM: "bold red"}


def examine() -> dict[str, list[Finding]]:
    """Run every check and return its findings by title; a check that raises an error becomes a finding."""
    return {title: list(_guarded(check)) for title, check in CHECKS.items()}


def show(findings: dict[str, list[Finding]], console: Console) -> None:
    """Print a table on a terminal, otherwise one line per finding: level, name, detail, remedy."""
    if not console.is_terminal:
        for title, found in findings.items():
            for finding in found:
                remedy = f" → {finding.remedy}" if finding.remedy else ""
                console.file.write(f"{finding.level.value:<8} {title}: {finding.name}: {finding.detail}{remedy}\n")
        return
    table = Table(box=None, show_header=False, padding=(0, 1))
    for title, found in findings.items():
        table.add_row(Text(title, style="bold"))
        for finding in found:
            detail = Text(finding.detail)
            if finding.remedy:
                detail.append(f"\n→ {finding.remedy}", style=STYLES[finding.level])
            table.add_row(f"  {finding.name}", Text(finding.level.value, style=STYLES[finding.level]), detail)
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    """Run the checks, print the findings, and return the exit code."""
    if arguments:
        error = RequestError.of(arguments[0], "doctor takes no arguments", "run dist-ft doctor without arguments")
        print(f"dist-ft: {error.title}\n{error}", file=sys.stderr)
        return RequestError.exit_code
    findings = examine()
    show(findings, Console(highlight=False))
    everything = [finding for found in findings.values() for finding in found]
    problems = [finding for finding in everything if finding.level is Level.PROBLEM]
    notes = sum(finding.level is Level.NOTE for finding in everything)
    print(f"{len(problems)} problems, {notes} notes")
    return MachineError.exit_code if problems else 0


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:
        yield Finding(check.__name__, Level.NOTE, f"could not be checked: {type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
