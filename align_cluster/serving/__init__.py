"""Serves rewards over HTTP to jobs on any cluster."""
