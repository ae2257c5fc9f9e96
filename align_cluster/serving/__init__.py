"""Rewards as a service over HTTP."""
