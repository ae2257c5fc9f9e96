"""One line of the doctor's report, and the report as text."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report. `fail` makes the command exit with 1; `remedy` says what to do."""

    state: Literal["ok", "warn", "fail"]
    name: str
    value: str
    remedy: str = ""


def size(name: str, count: float, least: float, remedy: str) -> Finding:
    """A number of bytes, of which there should be `least` GiB."""
    enough = count >= least * GIB
    return Finding("ok" if enough else "warn", name, f"{count / GIB:.1f} GiB", "" if enough else remedy)


def render(findings: list[Finding], as_json: bool = False) -> str:
    """The report as text, one finding a line with its remedy below, or as JSON."""
    if as_json:
        return json.dumps([asdict(finding) for finding in findings], indent=2)
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<5} {finding.name:<{width}}  {finding.value}")
        if finding.remedy:
            lines.append(f"{'':<5} {'':<{width}}  -> {finding.remedy}")
    failed = sum(finding.state == "fail" for finding in findings)
    lines.append(f"{failed} problems" if failed else "ready")
    return "\n".join(lines)
