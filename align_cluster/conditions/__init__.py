"""Conditions: each prompt is encoded once; the result is kept in memory and on disk under a hash of its content."""
