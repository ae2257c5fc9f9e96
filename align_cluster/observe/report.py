"""report.html: one self-contained page about a run, built from the files of its directory and nothing else."""

from html import escape
from pathlib import Path

from align_cluster.files import write_text
from align_cluster.observe import curves, sections
from align_cluster.observe.rundata import load
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.style import CSS

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
<footer>Made by align-cluster from the files of the run directory. Point at a line to read its values.</footer>
</main>
</body>
</html>
"""


def write_report(run_dir: Path | str) -> Path:
    """Write report.html into `run_dir` and return its path.

    Whatever the directory lacks is left out, so a run that is still going, or stopped half-way, has a report too.
    The page has no script and its security policy forbids the network.
    """
    files = RunDir(run_dir)
    run = load(files)
    parts = [
        section(run)
        for section in (
            sections.head,
            sections.scores,
            sections.grids,
            curves.rewards,
            curves.training,
            curves.timing,
            sections.provenance,
        )
    ]
    if not run.rows and not run.evaluations:
        parts.insert(1, '<p class="note">No step and no evaluation is finished yet.</p>')
    body = "\n".join(part for part in parts if part)
    write_text(files.report, PAGE.format(title=escape(f"{run.name} · align-cluster"), css=CSS, body=body))
    return files.report
