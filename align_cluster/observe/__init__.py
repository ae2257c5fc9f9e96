"""What a run leaves behind, and what a person sees of it: metrics, guard, run directory, terminal, report."""
