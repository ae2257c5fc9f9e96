"""Held-out scores, samples, steered samples and exports of a run, on one machine without Ray."""
