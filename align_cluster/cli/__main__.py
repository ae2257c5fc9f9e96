"""Runs the command line as `python -m align_cluster.cli`, which jobs on a cluster do."""

import sys

from align_cluster.cli import main

sys.exit(main())
