"""How long does E2PO's phase 1 take? 32 prompts of the embedded world, default settings, one thread: prints seconds.

python benchmarks/perturb.py
"""

import time

import numpy as np
import torch

from align_cluster.backbones.sd3 import SD3
from align_cluster.conditions.exploration import E2po
from align_cluster.embedded import scene

torch.set_num_threads(1)
backbone, config = SD3(SD3.Config(precision="fp32")), E2po()
texts = [record["prompt"] for record in scene.prompts("two_object", "train")[:32]]
backbone.encode(texts[:1])  # loads the text encoders
wall, processor = time.perf_counter(), time.process_time()
found = backbone.perturb(texts, config, seed=0)
wall, processor = time.perf_counter() - wall, time.process_time() - processor
cosines = np.concatenate([perturbation.cosines for perturbation in found])
print(f"{len(texts)} prompts x {config.conditions - 1} variants x {config.iterations} iterations: {wall:.1f} s", end="")
print(f" ({processor:.1f} s of a core); cosines to the original {cosines.min():.2f} ... {cosines.max():.2f}")
