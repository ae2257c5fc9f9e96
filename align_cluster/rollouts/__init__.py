"""Rollouts: noise schedules, sampler steps, the denoising loop and the worker that draws chunks."""
