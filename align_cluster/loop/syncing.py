"""Weights from the learner to the samplers: who holds which, and which weights draw which step."""

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from ray.exceptions import ObjectLostError

from align_cluster.cluster.learners import LearnerGroup
from align_cluster.cluster.pool import Pool, fetch, stream
from align_cluster.files import atomic
from align_cluster.types import Manifest, Receipt
from align_cluster.weights import check, publish, view


@dataclass(frozen=True)
class Sync:
    """Describes published weights: the manifest, a reference to the buffer, and the seconds that the last sync of all
    samplers took, from the buffer to the last receipt."""

    manifest: Manifest
    buffer: Any
    seconds: float = 0.0


class WeightSync:
    """Publishes the learner's weights, has the samplers adopt them, and proves that they arrived.

    `version` numbers what was published last and `held` what the samplers hold; 0 is the base model. `behaviours` are
    the weights that steps are drawn with, the newest last: those after each of the last 1 + `ahead` steps. Before so
    many steps are done, and after `forget`, the first one stands for those that are missing.
    """

    def __init__(self, timeout_s: float, samplers: Pool, ranks: LearnerGroup, ahead: int) -> None:
        self.timeout_s, self.samplers, self.ranks = timeout_s, samplers, ranks
        self.version = self.held = 0
        self.behaviours: deque[Sync] = deque(maxlen=1 + ahead)
        self.evaluated: Sync | None = None
        self.seconds = 0.0
        samplers.verify = self._verify

    def publish(self, source: Literal["behaviour", "evaluation"]) -> Sync:
        """Take the adapter that samplers draw with ("behaviour"), or the one that is evaluated and shipped, from the
        learner.

        Samplers that have nothing to draw adopt it at once, others before they draw with it.
        """
        self.version += 1
        while True:
            manifest, buffer = self.ranks.publish(source, self.version)
            try:
                # The driver's own copy: samplers that start later then do not depend on the learner's node.
                sync = Sync(manifest, ray.put(fetch(buffer, self.timeout_s)))
                break
            except ObjectLostError:  # it went down with the learner's node, and the learner starts anew
                continue
        if source == "evaluation":
            self.evaluated = sync
        else:
            self.behaviours.extend([sync] * (1 if self.behaviours else self.behaviours.maxlen))
        if not self.samplers.busy:
            self.hold(self.version)
        return Sync(manifest, sync.buffer, self.seconds)

    def hold(self, version: int) -> None:
        """Have the samplers, which must have nothing to draw, adopt a version, unless they hold it."""
        if version == self.held:
            return
        sync, started = self._known(version), time.perf_counter()
        receipts = self.samplers.broadcast("adopt", sync.manifest, sync.buffer)
        check(sync.manifest, receipts, len(self.samplers.ready_workers))
        self.held, self.seconds = version, time.perf_counter() - started

    def _known(self, version: int) -> Sync:
        kept = [*self.behaviours, *([self.evaluated] if self.evaluated else [])]
        return next(sync for sync in reversed(kept) if sync.manifest.version == version)

    def staleness(self, version: int) -> int:
        """Return by how many steps of training a version that steps are drawn with differs from the learner's: 0 where
        they are equal bit by bit, else 1."""
        return int(self._known(version).manifest.checksum != self.behaviours[-1].manifest.checksum)

    def behind(self) -> dict[str, np.ndarray]:
        """Return by name, for a checkpoint, the weights that the next step is drawn with, where they are not the
        learner's: those of one step before."""
        if len(self.behaviours) < 2:
            return {}
        sync = self.behaviours[0]
        buffer = fetch(sync.buffer, self.timeout_s)
        return {tensor.name: view(buffer, tensor) for tensor in sync.manifest.tensors}

    def restore(self, version: int, behind: dict[str, np.ndarray]) -> None:
        """Go on after `version` was published, with what `behind` returned then. The learner's weights are published
        anew, under the same number."""
        self.version = version - 1
        self.behaviours.clear()
        if behind:
            manifest, buffer = publish(behind, self.version)
            self.behaviours.append(Sync(manifest, ray.put(buffer)))

    def forget(self) -> None:
        """Draw all coming steps with what is published next, or with later weights."""
        self.behaviours.clear()

    def _verify(self, receipt: Receipt) -> None:
        """Check one receipt. A sampler that starts later must prove the weights that all hold, too."""
        manifest, _ = self.samplers.broadcast_state[1]
        check(manifest, [receipt], 1)

    def save(self, sync: Sync, folder: Path) -> Path:
        """Write published weights as a LoRA file, which a sampler makes, and return its path."""
        self.samplers.submit("lora", "lora_file", sync.manifest, sync.buffer)
        (done,) = stream(self.samplers)
        name, content = done.value
        with atomic(folder / name) as file:
            file.write_bytes(content)
        return folder / name
