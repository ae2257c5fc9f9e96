"""One small valid run file for the tests of loading, checking and planning."""

import pytest

from align_cluster.config.load import loads

TEXT = """\
name: test
steps: 3
prompts_per_step: 4
backbone:
  kind: sd3
  path: embedded
prompts:
  kind: embedded
  tasks: [colors]
rollout:
  group_size: 6
  steps: 4
rewards:
  judge:
    kind: geneval
algorithm:
  kind: nft
optimizer:
  lr: 1e-4
evaluate:
  prompts:
    kind: embedded
    tasks: [colors]
    split: held_out
  count: 10
"""


@pytest.fixture
def text():
    return TEXT


@pytest.fixture
def run_config():
    """A function from overrides to the config of the run file above."""
    return lambda *overrides: loads(TEXT, "run.yaml", overrides)
