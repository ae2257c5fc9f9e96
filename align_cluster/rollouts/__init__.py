"""Rollouts: sampler steps, schedules and windows, the denoising loop, and the worker that draws chunks."""
