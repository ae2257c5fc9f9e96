"""One rank of the learner: it runs an algorithm's loss over its share of a step and publishes adapters."""

import time
from typing import Literal

import numpy as np
import torch

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.base import Batch, CriticTargets, RecordedSteps
from align_cluster.backbones import BACKBONES
from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.critic import Critic
from align_cluster.conditions.exploration import strength
from align_cluster.learner.batching import Judged, MetricSums, MicroBatch, RankMetric, StepWork, TrainingChunk
from align_cluster.learner.critic import CriticBatch, CriticLearner
from align_cluster.learner.engine import Engine, join
from align_cluster.learner.policy import LearnerPolicy, RewardGradient
from align_cluster.learner.settings import LearnerSetup
from align_cluster.learner.state import Snapshot, capture, restore
from align_cluster.learner.trust_probe import PROBED, TrustProbe
from align_cluster.rollouts.steps import STEPS
from align_cluster.streams import hashed, stream
from align_cluster.types import Condition, Manifest, Record
from align_cluster.weights import publish


class Learner:
    """Trains the policy on one rank. It is a plain class: a test builds it in its own process, the cluster wraps it in
    an actor.

    `equal_adapters` have the default adapter's weights at present.
    """

    equal_adapters: frozenset[str] = frozenset()

    def __init__(
        self, setup: LearnerSetup, rank: int, world: int, address: str, port: int, threads: int = 1, device: str = "cpu"
    ) -> None:
        torch.set_num_threads(threads)
        join(rank, world, address, port, device)
        self.setup, self.rank, self.world = setup, rank, world
        self.algorithm = ALGORITHMS[setup.algorithm.kind](setup.algorithm)
        self.backbone = BACKBONES[setup.backbone.kind](setup.backbone, device)
        self.denoiser = add_adapters(self.backbone, self.backbone.load_denoiser(), self.algorithm.adapters)
        if setup.learner.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.engine = Engine(self.denoiser, setup.optimizer, setup.learner.zero_stage)
        self.critic = self._make_critic()
        self.reward_gradient = self._make_reward_gradient(threads)
        self.probe: TrustProbe | None = None
        self.updates = 0
        self.ema = self._read("default") if setup.learner.ema else None

    def _make_reward_gradient(self, threads: int) -> RewardGradient | None:
        if not self.algorithm.reward_gradient:
            return None
        return RewardGradient(self.backbone, self.setup.rewards, threads, self.setup.learner.gradient_checkpointing)

    def _make_critic(self) -> CriticLearner | None:
        if not self.algorithm.critic:
            return None
        critic = Critic(self.backbone, self.denoiser, len(self.setup.rewards), self.algorithm.critic)
        if self.setup.learner.gradient_checkpointing:  # the critic may read a copy of the denoiser
            critic.network.enable_gradient_checkpointing()
        return CriticLearner(critic, self.algorithm, self.setup.optimizer, self.world)

    def learning_rate(self) -> float:
        """Return the learning rate of the next update."""
        return self.setup.optimizer.rate(self.updates, self.setup.steps * self.setup.learner.updates_per_step)

    def update(self, work: StepWork) -> dict[str, RankMetric]:
        """Train on one step's work and return this rank's metrics.

        A critic learns after the actor, from replayed states or from all samples of the step together; without
        `work.train_actor` it learns alone. An update whose loss or gradient is not finite on any rank changes nothing
        and counts as "skipped"; one whose samples are all masked counts as "empty".
        """
        started = time.perf_counter()
        metrics = MetricSums()
        first = work.chunks[0].record
        passes = self.algorithm.inner_passes(len(first.sigmas) - 1, len(first.slots))
        skipped = empty = 0
        self.equal_adapters = self._equal_adapters()
        for update, total in sorted(work.totals.items()):
            changed = bool(total) and work.train_actor
            empty += not total
            if changed:
                mine = [item for item in work.micro_batches if item.update == update]
                changed = self._update_actor(work, mine, self.world / (total * passes), passes, metrics)
                skipped += not changed
            self.updates += 1
            if changed:
                self.equal_adapters = frozenset()
                self._average()
        if self.critic and work.replay is not None:
            self.critic.replay(work.replay, work.replay_conditions, metrics)
        elif self.critic and (whole := sum(work.totals.values())):
            self.critic.update(self._critic_batches(work), self.world / whole, metrics, not work.train_actor)
        self._lag()
        metrics.add("skipped", skipped)
        metrics.add("empty", empty)
        metrics.add("seconds", time.perf_counter() - started)
        return metrics.sums

    def _update_actor(
        self, work: StepWork, mine: list[MicroBatch], scale: float, passes: int, metrics: MetricSums
    ) -> bool:
        """Make one optimiser update from `mine`; return whether it changed anything."""
        probing, sound = self._probe_update(work, mine[0], passes), True
        fold = self.setup.learner.fold or 1
        visits = [range(first, min(first + fold, passes)) for first in range(0, passes, fold)]
        left = len(visits) * len(mine)
        for numbers in visits:
            for micro_batch in mine:
                left -= 1
                loss = self._loss(work, micro_batch, numbers, metrics)
                sound = sound and bool(torch.isfinite(loss))
                # A loss that is not finite is differentiated too: the other ranks take part in what that exchanges.
                self.engine.backward(loss * scale, last=not left)
        rate = self.learning_rate()
        norm = self.engine.step(rate, sound)
        metrics.add("lr", rate)
        if norm is None:
            return False
        for name, value in self.probe.finish(norm).items() if probing else ():
            metrics.add(name, value)
        metrics.add("grad_norm", norm)
        return True

    def _loss(self, work: StepWork, micro_batch: MicroBatch, passes: range, metrics: MetricSums) -> torch.Tensor:
        """Return the weighted sum of a micro-batch's losses in these inner passes, which one forward pass holds."""
        chunk, device = work.chunk_of(micro_batch), self.backbone.device
        batch = self._batch(work.step, passes, micro_batch, chunk.record, device)
        policy = self._policy(chunk, work.null, micro_batch.rows, len(passes))
        loss, values_of = self.algorithm.loss(policy, batch)
        self.algorithm.check_metrics(values_of)
        weights = torch.from_numpy(micro_batch.weights).to(device).repeat(len(passes))
        if micro_batch.update == 0 and "log_ratio" in values_of:
            # While the weights are still those of the rollout, this must be 0.
            values_of["first_log_ratio" if work.fresh else "stale_log_ratio"] = values_of["log_ratio"]
        for name, values in {"loss": loss.detach(), **values_of}.items():
            weighted = values * weights
            metrics.add(name, float(weighted.sum()), float(weights.sum()), float(weighted.abs().max()))
        return (loss * weights).sum()

    def _batch(self, step: int, passes: range, micro_batch: MicroBatch, record: Record, device: torch.device) -> Batch:
        """Return the micro-batch's samples once for each inner pass, all of the first pass before those of the next."""
        times, rows = len(passes), record.chunk.rows[micro_batch.rows]
        visits = [(row, number) for number in passes for row in rows]

        def tensor(array: np.ndarray | None) -> torch.Tensor | None:
            return None if array is None else torch.tensor(array, device=device).repeat(times, *[1] * (array.ndim - 1))

        def part(array: np.ndarray | None) -> torch.Tensor | None:
            return None if array is None else tensor(array[micro_batch.rows])

        def generators(purpose: str, *, shared: bool = False) -> list[torch.Generator]:
            # A stream is a function of the sample and the moment, never of the rank or the micro-batch.
            found = []
            for row, number in visits:
                name = f"{row.seed} {step} {micro_batch.update} {purpose}" + ("" if shared else f" {number}")
                found.append(stream(hashed(name)))
            return found

        targets = None
        if micro_batch.returns is not None:
            targets = CriticTargets(tensor(micro_batch.returns), tensor(micro_batch.values))
        return Batch(
            passes=tuple(number for _, number in visits),
            update=self.updates,
            advantages=tensor(micro_batch.advantages),
            x0=part(record.x0),
            sigmas=record.sigmas,
            recorded=RecordedSteps(
                indices=part(record.indices),
                before=part(record.before),
                after=part(record.after),
                log_probs=part(record.log_probs),
                means=part(record.means),
                slots=record.slots,
            ),
            generators=generators,
            critic=targets,
            prompts=tuple(row.prompt.text for row, _ in visits),
            noises=tuple(row.noise for row, _ in visits),
        )

    def _critic_batches(self, work: StepWork) -> list[CriticBatch]:
        """Return the critic's micro-batches, which stay on the CPU until a forward pass reads them."""
        cpu = torch.device("cpu")
        return [
            CriticBatch(
                self._batch(work.step, range(1), micro_batch, chunk.record, cpu),
                chunk.text(None, cpu, micro_batch.rows),
                torch.from_numpy(micro_batch.weights),
            )
            for micro_batch in work.micro_batches
            for chunk in (work.chunk_of(micro_batch),)
        ]

    def values(self, chunks: list[TrainingChunk]) -> Judged:
        """Return the critic's values of every recorded state of each chunk, and what replay keeps of it. A forward pass
        never mixes chunks, so results do not depend on the rank."""
        found = [self.critic.values(chunk.record, chunk.text(None, self.backbone.device)) for chunk in chunks]
        kept = [self.critic.kept(chunk.record) for chunk in chunks if self.algorithm.config.replay.images]
        states, places = [list(column) for column in zip(*kept, strict=True)] or [[], []]
        first = chunks[0].record if chunks else None
        return Judged(found, states, places, first and first.sigmas, first.slots if first else ())

    def state(self) -> Snapshot | None:
        """Return all that an update changes, on rank 0. All ranks must call it together."""
        return capture(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a state that any number of ranks and any ZeRO stage have left. All ranks must call it."""
        restore(self, snapshot)

    def make_probe(self) -> TrustProbe:
        """Return the probe of SLAS's worst-case bound, made at first use."""
        self.probe = self.probe or TrustProbe(self.engine.trainable, self.setup.seed, self.world)
        return self.probe

    def _probe_update(self, work: StepWork, micro_batch: MicroBatch, passes: int) -> bool:
        """Begin to measure the coming update if it is one that SLAS's worst-case bound asks for, each time at another
        of the trained steps; returns whether it does."""
        shaping = self.setup.shaping
        if not shaping or not shaping.probes or self.updates % shaping.refresh:
            return False
        chunk = work.chunk_of(micro_batch)
        rows = slice(micro_batch.start, min(micro_batch.stop, micro_batch.start + PROBED))
        policy = self._policy(chunk, work.null, rows, network=self.denoiser)
        checkpointing = self.setup.learner.gradient_checkpointing
        if checkpointing:  # a checkpointed graph cannot be differentiated twice
            self.denoiser.disable_gradient_checkpointing()
        self.make_probe().begin(policy, chunk.record, rows, self.updates // shaping.refresh % passes)
        if checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        return True

    def _policy(
        self,
        chunk: TrainingChunk,
        null: Condition | None,
        rows: slice,
        times: int = 1,
        network: torch.nn.Module | None = None,
    ) -> LearnerPolicy:
        """Return the network, behind its engine unless one is given, under the prompts' own conditions, `times` over,
        whatever conditions the samples were drawn under, unless exploration.update asks for these."""
        kind, device, explored = self.setup.step, self.backbone.device, self.setup.exploration
        text, perturbed = chunk.text(null, device, rows), None
        if explored:
            perturbed = chunk.perturbed_text(self.backbone.insert, null, device, rows)
        repeated = torch.arange(len(text.sequence)).repeat(times)
        return LearnerPolicy(
            backbone=self.backbone,
            network=network or self.engine.deepspeed,
            denoiser=self.denoiser,
            step=STEPS[kind.kind](kind, chunk.record.sigmas, self.backbone.prediction),
            text=text if times == 1 else text[repeated],
            perturbed=perturbed if perturbed is None or times == 1 else perturbed[repeated],
            strength=lambda sigma: strength(sigma, chunk.record.sigmas, explored),
            guidance=self.setup.guidance,
            null_gradient=self.setup.learner.guidance_gradient == "both",
            reward_gradient=self.reward_gradient,
            equal_adapters=self.equal_adapters,
        )

    def _read(self, adapter: str) -> dict[str, torch.Tensor]:
        parameters = adapter_parameters(self.denoiser, adapter)
        with self.engine.gathered(list(parameters.values())):
            return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def _average(self) -> None:
        """Move the EMA of the default adapter with Flow-GRPO's warm-up, min((1 + u) / (10 + u), ema)."""
        if self.ema is None:
            return
        decay = min((1 + self.updates) / (10 + self.updates), self.setup.learner.ema)
        for name, value in self._read("default").items():
            self.ema[name].lerp_(value, 1 - decay)

    def _equal_adapters(self) -> frozenset[str]:
        """Return "old" where it has the default adapter's weights, as after a step without lag; all ranks agree."""
        if self.algorithm.old_decay(self.updates) is None:
            return frozenset()
        default, old = self._read("default"), self._read("old")
        return frozenset({"old"} if all(torch.equal(old[name], value) for name, value in default.items()) else ())

    def _lag(self) -> None:
        """Move the lagged adapter towards the default one, where the algorithm keeps one."""
        decay = self.algorithm.old_decay(self.updates)
        if decay is None:
            return
        default = self._read("default")
        old = adapter_parameters(self.denoiser, "old")
        with self.engine.gathered(list(old.values()), write=True):
            for name, parameter in old.items():
                if parameter.numel():
                    parameter.lerp_(default[name], 1 - decay)

    def publish(
        self, source: Literal["behaviour", "evaluation"], version: int
    ) -> tuple[Manifest, np.ndarray] | tuple[None, None]:
        """Return rank 0's flat buffer of an adapter, with its manifest. All ranks must call it.

        "behaviour" is the adapter that samplers draw with; "evaluation" the one that is evaluated and shipped, which is
        the EMA where there is one.
        """
        if source == "evaluation" and self.ema is not None:
            state = self.ema
        else:
            state = self._read(self.algorithm.behaviour if source == "behaviour" else "default")
        if self.rank:
            return None, None
        return publish({name: value.float().cpu().numpy() for name, value in state.items()}, version)
