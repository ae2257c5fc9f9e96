"""The run file: loads it, checks it against what each kind says of itself, and plans the run."""
