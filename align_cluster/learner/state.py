"""A learner's whole state in one record. A checkpoint keeps it, and a lost rank is rebuilt from it.

Random streams are functions of (seed, step), so they are no state. Neither is anything that the engine derives from
weights, moments and counts. Tensors are whole and fp32, so that the number of ranks and the ZeRO stage may differ where
a learner goes on from the state.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from align_cluster.algorithms.base import Algorithm
from align_cluster.backbones.adapters import adapter_parameters
from align_cluster.backbones.base import CRITIC, Backbone
from align_cluster.learner.critic import CriticLearner
from align_cluster.learner.engine import MOMENTS, Engine
from align_cluster.learner.trust_probe import TrustProbe
from align_cluster.types import Manifest
from align_cluster.weights import checksum, publish, view


class HasState(Protocol):
    """Names the parts of a learner that its state is read from and written to."""

    algorithm: Algorithm
    backbone: Backbone
    denoiser: torch.nn.Module
    engine: Engine
    critic: CriticLearner | None
    probe: TrustProbe | None
    ema: dict[str, torch.Tensor] | None
    updates: int
    rank: int

    def make_probe(self) -> TrustProbe:
        """Return the probe, made at first use."""


@dataclass(frozen=True)
class Snapshot:
    """Holds the state after an update: counts by name, and tensors in one buffer.

    Tensors are named adapter/<adapter>/<parameter>, ema/<parameter>, and <moment>/<parameter> for the default adapter.
    With a critic there are critic/<parameter> and critic/<moment>/<parameter>. Where SLAS has estimated a Fisher matrix
    there is probe/vector.
    """

    counts: dict[str, int]
    manifest: Manifest
    buffer: np.ndarray

    @classmethod
    def of(cls, counts: dict[str, int], tensors: dict[str, np.ndarray]) -> "Snapshot":
        """Pack counts and named tensors into a snapshot."""
        return cls(counts, *publish(tensors, counts["updates"]))

    def tensors(self) -> dict[str, np.ndarray]:
        """Return views of the buffer by name."""
        return {tensor.name: view(self.buffer, tensor) for tensor in self.manifest.tensors}

    def shipped(self) -> dict[str, np.ndarray]:
        """Return the weights that are evaluated and shipped, by name: the EMA where there is one, as `publish` does."""
        named = self.tensors()
        return under("ema/", named) or under("adapter/default/", named)

    def critic(self) -> dict[str, np.ndarray]:
        """Return the critic's weights by name."""
        found = under("critic/", self.tensors())
        return {name: value for name, value in found.items() if not name.startswith(MOMENTS)}


def under(prefix: str, named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def capture(learner: HasState) -> Snapshot | None:
    """Return the state on rank 0, and None on the other ranks. All ranks must call it together."""
    steps, moments = learner.engine.moments()
    counts, found = {"updates": learner.updates, "steps": steps}, {}
    names = list(adapter_parameters(learner.denoiser, "default"))
    for key, values in moments.items():
        found |= {f"{key}/{name}": value for name, value in zip(names, values, strict=True)}
    for adapter in learner.algorithm.adapters:
        if adapter != CRITIC:
            parameters = adapter_parameters(learner.denoiser, adapter)
            with learner.engine.gathered(list(parameters.values())):
                found |= {f"adapter/{adapter}/{name}": value.detach().clone() for name, value in parameters.items()}
    if learner.rank:
        return None
    found |= {f"ema/{name}": value for name, value in (learner.ema or {}).items()}
    if learner.critic:
        counts["critic_steps"], critic = learner.critic.state()
        found |= {f"critic/{name}": value for name, value in critic.items()}
    if learner.probe:
        found["probe/vector"] = learner.probe.fisher.vector
    return Snapshot.of(counts, {name: value.detach().float().cpu().numpy() for name, value in found.items()})


def restore(learner: HasState, snapshot: Snapshot) -> None:
    """Bring a learner to the state of a snapshot, whatever it did before. All ranks must call it together.

    Raises ValueError where the snapshot is damaged or belongs to another kind of learner.
    """
    if checksum(snapshot.buffer) != snapshot.manifest.checksum:
        raise ValueError("the learner's state was damaged on its way here")
    # The buffer is read-only shared memory, which torch.from_numpy would warn about.
    state = {name: torch.from_numpy(array.copy()) for name, array in snapshot.tensors().items()}
    counts, names = snapshot.counts, list(adapter_parameters(learner.denoiser, "default"))

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}

    critic = part("critic/")
    vector = state.pop("probe/vector", None)
    average = part("ema/")
    moments = {key: part(f"{key}/") for key in MOMENTS}
    adapters = {name: part(f"adapter/{name}/") for name in learner.algorithm.adapters if name != CRITIC}
    if state or bool(critic) != bool(learner.critic) or any(set(names) != set(a) for a in adapters.values()):
        raise ValueError("the learner's state is of another algorithm, backbone or LoRA")
    default = adapters.pop("default")
    learner.engine.restore(
        [default[name] for name in names],
        counts["steps"],
        {key: [values[name] for name in names] for key, values in moments.items()},
    )
    for adapter, values in adapters.items():
        parameters = adapter_parameters(learner.denoiser, adapter)
        with learner.engine.gathered(list(parameters.values()), write=True):
            for name, parameter in parameters.items():
                if parameter.numel():
                    parameter.copy_(values[name])
    device = learner.backbone.device
    learner.updates = counts["updates"]
    if learner.ema is not None:  # a run whose average begins here starts it from the weights
        learner.ema = {name: value.to(device) for name, value in (average or default).items()}
    if learner.critic:
        learner.critic.restore(counts["critic_steps"], critic)
    learner.probe = None
    if vector is not None:
        learner.make_probe().fisher.vector = vector.to(device)
