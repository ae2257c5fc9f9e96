"""Keeps and shows what a run leaves behind: metrics, guard, run directory, terminal, report."""
