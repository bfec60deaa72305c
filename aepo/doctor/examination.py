"""All that is looked at, and how it is printed."""

from __future__ import annotations

import json
from dataclasses import asdict

from aepo.doctor.agents import tasks_and_models, tools
from aepo.doctor.finding import Finding, short
from aepo.doctor.kernels import kernels
from aepo.doctor.machine import machine, products
from aepo.doctor.packages import packages


def examine() -> list[Finding]:
    """Look at everything; a part that raises is itself a finding and hides nothing else."""
    findings: list[Finding] = []
    for part in (machine, products, packages, kernels, tools, tasks_and_models):
        try:
            findings += part()
        except Exception as error:  # whatever is wrong with an installation, the rest is still worth knowing
            findings.append(Finding(part.__name__.replace("_", " "), "examination", "broken", short(error)))
    return findings


def main(as_json: bool = False) -> int:
    """Print the findings; 0 unless something that everything needs is broken."""
    findings = examine()
    broken = any(finding.state == "broken" for finding in findings)
    if as_json:
        print(json.dumps({"healthy": not broken, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print_table(findings)
    return int(broken)


def _print_table(findings: list[Finding]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        for finding in findings:
            print(
                *filter(None, (finding.topic, finding.name, finding.state, finding.detail, finding.remedy)), sep=" | "
            )
        return
    colors = {"ok": "green", "info": "dim", "missing": "yellow", "broken": "bold red"}
    table = Table(box=None, pad_edge=False)
    for column in ("", "", "", "what was found", "how to get it"):
        table.add_column(column, overflow="fold")
    topic = None
    for finding in findings:
        if finding.topic != topic:
            table.add_section()
        first = finding.topic if finding.topic != topic else ""
        state = Text(finding.state, style=colors[finding.state])
        table.add_row(Text(first, style="bold"), finding.name, state, Text(finding.detail), Text(finding.remedy))
        topic = finding.topic
    Console().print(table)
