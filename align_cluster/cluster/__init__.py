"""Ray: starting or joining a cluster, supervised worker pools, the learner's ranks, job submission."""

import os
import sys

# Ray 2.60 authenticates by token, but `ray start` and `ray.init` pick the mode differently when it is not set, so it is
# set here. Ray reads it while it is imported: set later, its servers would want a token that nobody has created.
if "ray" not in sys.modules:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Under `uv run`, Ray would zip the working directory and let every worker install its packages anew.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
