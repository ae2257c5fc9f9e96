"""One learner rank: runs an algorithm's loss over its share of a step's micro-batches and publishes adapters."""

import hashlib
import time
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.base import Batch
from align_cluster.backbones import BACKBONES
from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.critic import Critic
from align_cluster.learner.batching import Piece
from align_cluster.learner.critic import CriticLearner
from align_cluster.learner.engine import Engine, join
from align_cluster.learner.policy import LearnerPolicy
from align_cluster.learner.reduction import add
from align_cluster.learner.reward_gradient import Judge
from align_cluster.learner.settings import LearnerSetup
from align_cluster.learner.state import Snapshot, capture, restore
from align_cluster.learner.trust_probe import PROBED, TrustProbe
from align_cluster.rollouts.guidance import TextBatch
from align_cluster.rollouts.steps import STEPS
from align_cluster.types import Condition, Manifest, Record
from align_cluster.weights import publish


class Learner:
    """A rank of the learner. A plain class: a test builds it in its own process, the cluster wraps it in an actor."""

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
        self.critic = self._critic()
        self.judge = self._judge(threads)
        self.updates = 0
        self.ema = self._read("default") if setup.learner.ema else None

    def learning_rate(self) -> float:
        """Learning rate of the next update: flat, then linear in the run's progress."""
        settings = self.setup.optimizer
        progress = self.updates / (self.setup.steps * self.setup.learner.updates_per_step)
        if settings.schedule == "constant" or progress < settings.flat:
            return settings.lr
        left = (1 - progress) / (1 - settings.flat)
        return settings.lr * max(settings.final, left)

    def update(
        self,
        step: int,
        pieces: list[Piece],
        totals: dict[int, float],
        null: Condition | None,
        *data: Record | Condition,
        actor: bool = True,
    ) -> dict[str, tuple[float, float, float]]:
        """Run one step's updates. `data` alternates records and conditions, in the order of the pieces' `source`.
        A critic learns after the actor, from all samples of the step together; without `actor` it learns alone.

        Returns, for each metric, (weighted sum, weight, largest magnitude) of this rank. An update whose loss or
        gradient is not finite on any rank changes nothing and counts as "skipped", one whose samples are all masked as
        "empty".
        """
        started = time.perf_counter()
        sums: dict[str, list[float]] = {}
        inner_passes = self.algorithm.inner_passes(len(data[0].sigmas) - 1, len(data[0].slots))
        skipped = empty = 0
        for update, total in sorted(totals.items()):
            mine = [piece for piece in pieces if piece.update == update]
            changed = bool(total) and actor
            empty += not total
            if changed:
                changed = self._update_actor(
                    step, mine, self.world / (total * inner_passes), inner_passes, null, data, sums
                )
                skipped += not changed
            self.updates += 1
            if changed:
                self._average()
        if self.critic and (whole := sum(totals.values())):
            self.critic.update(self._batches(step, pieces, data), self.world / whole, sums, not actor)
        self._lag()
        add(sums, "skipped", skipped, 1.0)
        add(sums, "empty", empty, 1.0)
        add(sums, "seconds", time.perf_counter() - started, 1.0)
        return {name: tuple(values) for name, values in sums.items()}

    def _update_actor(
        self,
        step: int,
        mine: list[Piece],
        scale: float,
        inner_passes: int,
        null: Condition | None,
        data: tuple[Record | Condition, ...],
        sums: dict[str, list[float]],
    ) -> bool:
        """One update; whether it changed anything."""
        looking, sound = self._look(inner_passes, mine[0], data, null), True
        for inner_pass in range(inner_passes):
            for number, piece in enumerate(mine):
                loss = self._loss(
                    step, inner_pass, piece, data[2 * piece.source], data[2 * piece.source + 1], null, sums
                )
                sound = sound and bool(torch.isfinite(loss))
                # Also where it is not finite: the other ranks take part in what a backward pass exchanges.
                self.engine.backward(loss * scale, last=inner_pass == inner_passes - 1 and number == len(mine) - 1)
        rate = self.learning_rate()
        norm = self.engine.step(rate, sound)
        add(sums, "lr", rate, 1.0)
        if norm is None:
            return False
        for name, value in self.probe.finish(norm).items() if looking else ():
            add(sums, name, value, 1.0)
        add(sums, "grad_norm", norm, 1.0)
        return True

    def _loss(
        self,
        step: int,
        inner_pass: int,
        piece: Piece,
        record: Record,
        condition: Condition,
        null: Condition | None,
        sums: dict[str, list[float]],
    ) -> torch.Tensor:
        batch = self._batch(step, inner_pass, piece, record, self.backbone.device)
        policy = self._policy(record, condition, null, len(piece.weights))
        loss, metrics = self.algorithm.loss(policy, batch)
        self.algorithm.check_metrics(metrics)
        weights = torch.from_numpy(piece.weights).to(self.backbone.device)
        if piece.update == 0 and "log_ratio" in metrics:
            metrics["first_log_ratio"] = metrics["log_ratio"]  # weights are still those of the rollout: must be 0
        for name, values in {"loss": loss.detach(), **metrics}.items():
            add(
                sums, name, float((values * weights).sum()), float(weights.sum()), float((values * weights).abs().max())
            )
        return (loss * weights).sum()

    def _batch(self, step: int, inner_pass: int, piece: Piece, record: Record, device: torch.device) -> Batch:
        rows = slice(piece.start, piece.stop)

        def part(array: np.ndarray | None) -> torch.Tensor | None:
            return None if array is None else torch.tensor(array[rows], device=device)

        def generators(purpose: str) -> list[torch.Generator]:
            # A function of the sample and the moment, never of rank or micro-batch.
            names = (f"{seed} {step} {piece.update} {purpose}" for seed in record.chunk.seeds[rows])
            digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
            return [torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1) for digest in digests]

        return Batch(
            inner_pass,
            torch.tensor(piece.advantages, device=device),
            part(record.x0),
            record.sigmas,
            part(record.indices),
            part(record.before),
            part(record.after),
            part(record.log_probs),
            part(record.means),
            generators,
            record.slots,
            None if piece.returns is None else torch.tensor(piece.returns, device=device),
            None if piece.values is None else torch.tensor(piece.values, device=device),
            record.chunk.prompt.text,
            record.chunk.noises[rows],
            self.updates,
        )

    def _judge(self, threads: int) -> Judge | None:
        if not self.algorithm.reward_gradient:
            return None
        return Judge(self.backbone, self.setup.rewards, threads, self.setup.learner.gradient_checkpointing)

    def _critic(self) -> CriticLearner | None:
        if not self.algorithm.critic:
            return None
        critic = Critic(self.backbone, self.denoiser, len(self.setup.rewards), self.algorithm.critic)
        if self.setup.learner.gradient_checkpointing:  # of a copy, too
            critic.network.enable_gradient_checkpointing()
        return CriticLearner(critic, self.algorithm, self.setup.optimizer, self.world, self.setup.critic_batch)

    def _batches(
        self, step: int, mine: list[Piece], data: tuple[Record | Condition, ...]
    ) -> list[tuple[Batch, TextBatch, torch.Tensor]]:
        """The critic's micro-batches on the CPU: with their one condition and their weights."""
        cpu = torch.device("cpu")
        return [
            (
                self._batch(step, 0, piece, data[2 * piece.source], cpu),
                TextBatch.build([data[2 * piece.source + 1]], None, cpu),
                torch.from_numpy(piece.weights),
            )
            for piece in mine
        ]

    def values(self, *data: Record | Condition) -> tuple[list[np.ndarray], np.ndarray | None]:
        """The critic's values [B, N, R] of every recorded state of each record, and the rollout's noise levels [N + 1].
        `data` alternates records and conditions; a pass never mixes records, so results do not depend on the rank."""
        found = []
        for record, condition in zip(data[::2], data[1::2], strict=True):
            found.append(self.critic.values(record, TextBatch.build([condition], None, self.backbone.device)))
        return found, data[0].sigmas if data else None

    def state(self) -> Snapshot | None:
        """All that an update changes, on rank 0. All ranks must call it."""
        return capture(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a state, of any number of ranks and any ZeRO stage. All ranks must call it."""
        restore(self, snapshot)

    @cached_property
    def probe(self) -> TrustProbe:
        return TrustProbe(self.engine.trainable, self.setup.seed, self.world)

    def _look(
        self, inner_passes: int, piece: Piece, data: tuple[Record | Condition, ...], null: Condition | None
    ) -> bool:
        """Begin to measure the coming update, if it is one of those that SLAS's adaptive exponent asks for; each time
        at another of the trained steps."""
        shaping = self.setup.shaping
        if not shaping or shaping.gamma != "adaptive" or self.updates % shaping.refresh:
            return False
        record, condition = data[2 * piece.source], data[2 * piece.source + 1]
        rows = slice(piece.start, min(piece.stop, piece.start + PROBED))
        policy = self._policy(record, condition, null, rows.stop - rows.start, self.denoiser)
        checkpointing = self.setup.learner.gradient_checkpointing
        if checkpointing:  # whose graph cannot be differentiated twice
            self.denoiser.disable_gradient_checkpointing()
        self.probe.begin(policy, record, rows, self.updates // shaping.refresh % inner_passes)
        if checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        return True

    def _policy(
        self,
        record: Record,
        condition: Condition,
        null: Condition | None,
        count: int,
        network: torch.nn.Module | None = None,
    ) -> LearnerPolicy:
        """The network (behind its engine unless given) under the original condition, whatever the samples were drawn
        under."""
        kind = self.setup.step
        return LearnerPolicy(
            self.backbone,
            network or self.engine.deepspeed,
            self.denoiser,
            STEPS[kind.kind](kind, record.sigmas, self.backbone.prediction),
            TextBatch.build([condition] * count, null, self.backbone.device),
            self.setup.guidance,
            self.setup.learner.guidance_gradient == "both",
            self.judge,
        )

    def _read(self, adapter: str) -> dict[str, torch.Tensor]:
        parameters = adapter_parameters(self.denoiser, adapter)
        with self.engine.gathered(list(parameters.values())):
            return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def _average(self) -> None:
        """EMA of the default adapter with Flow-GRPO's warm-up, min((1 + u) / (10 + u), ema)."""
        if self.ema is None:
            return
        decay = min((1 + self.updates) / (10 + self.updates), self.setup.learner.ema)
        for name, value in self._read("default").items():
            self.ema[name].lerp_(value, 1 - decay)

    def _lag(self) -> None:
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
        """Rank 0's flat buffer of the adapter that samplers draw with, or of the one that is evaluated and shipped
        (the EMA where there is one). All ranks must call it."""
        if source == "evaluation" and self.ema is not None:
            state = self.ema
        else:
            state = self._read(self.algorithm.behaviour if source == "behaviour" else "default")
        if self.rank:
            return None, None
        return publish({name: value.float().cpu().numpy() for name, value in state.items()}, version)
