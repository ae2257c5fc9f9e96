"""The workers of one run and what the driver asks of them. Tensors stay in the object store; the driver holds
references."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from align_cluster.algorithms import ALGORITHMS
from align_cluster.cluster.errors import reason
from align_cluster.cluster.learners import LearnerGroup
from align_cluster.cluster.placement import reward_role
from align_cluster.cluster.pool import Pool, stream
from align_cluster.cluster.slots import InputLost, Patience
from align_cluster.cluster.workers import make_reward_worker, make_sampler
from align_cluster.config.plan import Plan, RewardPool
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import cut, share, total_weight
from align_cluster.learner.reduction import merge
from align_cluster.loop.scoring import Scoring
from align_cluster.rewards.mix import beside
from align_cluster.rollouts.sampler import DrawRequest, fingerprint
from align_cluster.rollouts.steps import Euler
from align_cluster.types import Chunk, Credit, DrawInfo, Manifest, Prompt, Receipt, Scores
from align_cluster.weights import check, view

log = logging.getLogger(__name__)
OBJECT_LOSSES = 3  # in one step, until the run ends
Report = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass(frozen=True)
class Sync:
    """A weight sync that was proven: manifest, reference to the buffer, seconds from the buffer to the last receipt."""

    manifest: Manifest
    buffer: Any
    seconds: float


@dataclass(frozen=True)
class Drawn:
    """One chunk that was drawn, as `request` wants, and scored: images and record are references."""

    info: DrawInfo
    images: Any
    record: Any
    scores: Scores
    request: DrawRequest


@dataclass(frozen=True)
class Explored:
    """One prompt's perturbed conditions: their key, a reference to them, and how far they are from the original and
    from each other."""

    key: str
    reference: Any
    cosine: float
    pairwise: float


class Crew:
    """Samplers, reward workers and learner ranks of one run. Leaving the context stops them all."""

    def __init__(self, config: RunConfig, plan: Plan, places: dict[str, list[Any]], report: Report) -> None:
        self.config, self.plan, self.show = config, plan, report
        self.progress: dict[str, tuple[int, int]] = {}
        self.algorithm = ALGORITHMS[config.algorithm.kind](config.algorithm)
        wait = config.cluster.timeout_s

        def sampler(name: str, index: int) -> Any:
            place = places["sampler"][index] if index < plan.samplers else None
            return make_sampler(config, plan, place, name)

        def reward_pool(pool: RewardPool) -> Pool:
            def worker(name: str, index: int) -> Any:
                place = places[reward_role(pool.name)][index] if index < pool.workers else None
                return make_reward_worker(config, plan, pool, place)

            policies = [config.rewards[name].on_failure for name in pool.rewards]
            patience = Patience(sum(p.timeout_s for p in policies), 1 + max(p.retries for p in policies))
            return Pool(f"reward {pool.name}", worker, pool.workers, wait, pool.most, patience)

        self.samplers = Pool("sampler", sampler, plan.samplers, wait, plan.most_samplers, prove=self._prove)
        self.rewards = [reward_pool(pool) for pool in plan.reward_pools]
        self.scoring = [Scoring(*pair) for pair in zip(self.rewards, plan.reward_pools, strict=True)]
        self.learners = LearnerGroup(config, plan, places["learner"])
        self.conditions: dict[str, Any] = {}
        self.perturbations: dict[str, Explored] = {}
        self.keys: dict[str, str] = {}
        self.version = 0
        self.images_drawn = self.lost_before = 0
        self.scored: dict[str, float] = {}

    def __enter__(self) -> "Crew":
        return self

    @property
    def groups(self) -> list[Pool | LearnerGroup]:
        """All that have workers."""
        return [self.samplers, *self.rewards, self.learners]

    def report(self, stage: str, done: int, total: int) -> None:
        self.progress[stage] = (done, total)
        self.show(stage, done, total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for group in self.groups:
            group.shutdown()

    @property
    def workers_lost(self) -> int:
        """Of all kinds, since the run began."""
        return self.lost_before + self.samplers.lost + sum(pool.lost for pool in self.rewards) + self.learners.lost

    def encode(self, prompts: list[Prompt]) -> None:
        """Encode every text that is new, and the empty prompt where guidance needs it; conditions go to the object
        store."""
        guided = max(self.config.rollout.guidance, self.config.evaluate.guidance) > 1
        texts = dict.fromkeys([prompt.text for prompt in prompts] + ([""] if guided else []))
        new = [text for text in texts if text not in self.conditions]
        for start in range(0, len(new), 32):
            self.samplers.submit(start, "encode", new[start : start + 32])
        for done in stream(self.samplers):
            for text, condition in zip(new[done.key : done.key + 32], done.value, strict=True):
                self.conditions[text], self.keys[text] = ray.put(condition), condition.key

    def explore(self, prompts: list[Prompt]) -> dict[str, float]:
        """Learn the perturbed conditions of every text that is new (E2PO phase 1); what to log of all `prompts`."""
        settings = self.config.exploration
        if settings.conditions == 1:
            return {}
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        new = [text for text in texts if text not in self.perturbations]
        size = min(32, -(-len(new) // self.plan.samplers))
        for start in range(0, len(new), size or 1):
            self.samplers.submit(start, "perturb", new[start : start + size], settings, self.config.seed)
        for done in stream(self.samplers):
            for text, found in zip(new[done.key : done.key + size], done.value, strict=True):
                facts = (float(found.cosines.mean()), float(found.pairwise))
                self.perturbations[text] = Explored(found.key, ray.put(found), *facts)
        known = [self.perturbations[text] for text in texts]
        values = {"explore/anchor_cosine": float(np.mean([item.cosine for item in known]))}
        if settings.conditions > 2:
            values["explore/pairwise_cosine"] = float(np.mean([item.pairwise for item in known]))
        return values

    def request(self, step: int | None) -> DrawRequest:
        """How to draw with the current weights: as training step `step` wants, or by ODE for evaluation (None)."""
        rollout, held_out = self.config.rollout, self.config.evaluate
        if step is None:
            return DrawRequest(self.version, held_out.steps or rollout.steps, Euler.Config(), held_out.guidance)
        window = self.config.window
        return DrawRequest(
            self.version,
            rollout.steps,
            self.config.step_kind,
            rollout.guidance,
            window.plan(rollout.steps, step, step_seed(self.config, step))
            if window
            else self.algorithm.states(rollout.steps),
            self.algorithm.needs_means,
            rollout.schedule,
            self.config.exploration.rho if self.config.conditions > 1 else 1.0,
            self.algorithm.needs_path,
            rollout.distilled_guidance,
            rollout.offline,
        )

    def draw(self, chunks: list[Chunk], request: DrawRequest) -> tuple[list[Drawn], dict[str, float]]:
        """Draw and score chunks, each scored as soon as it is drawn; results in the order of `chunks`, and stage times.

        "rollout" lasts until the last chunk is drawn, "reward" from there until the last score. `scored` says how
        scoring kept up.
        """
        self.encode([chunk.prompt for chunk in chunks])
        started = last_drawn = time.perf_counter()
        for chunk in chunks:
            self._submit(chunk, request)
        if self.samplers.waiting:
            self.samplers.grow()
        by_id = {chunk.id: chunk for chunk in chunks}
        drawn: dict[tuple, tuple] = {}
        parts: dict[tuple, list[Scores]] = {chunk.id: [] for chunk in chunks}
        scored = 0
        self.report("rollout", 0, len(chunks))
        self.report("reward", 0, len(chunks))
        by_pool = {scoring.pool: scoring for scoring in self.scoring}
        for scoring in self.scoring:
            scoring.begin(chunks)
        for done in stream(self.samplers, *self.rewards):
            if isinstance(done.value, InputLost):
                self._draw_again(by_pool[done.pool].withdraw(done), drawn, request)
            elif done.pool is self.samplers:
                chunk = by_id[done.key]
                self._verify(done.value, chunk, request)
                drawn[done.key] = (done.value, *done.refs)
                for scoring in self.scoring:
                    scoring.add(chunk, done.refs[0])
                last_drawn = time.perf_counter()
                self.report("rollout", len(drawn), len(chunks))
            else:
                for key, scores in by_pool[done.pool].collect(done).items():
                    parts[key].append(scores)
                    scored += len(parts[key]) == len(self.rewards)
                self.report("reward", scored, len(chunks))
            if self.samplers.waiting:
                self.samplers.grow()
        self.scored = {name: value for scoring in self.scoring for name, value in scoring.end().items()}
        if len(chunks) >= len(self.samplers.workers):  # fewer do not tell how many samplers are needed
            self.samplers.trim()
        self.images_drawn += sum(len(chunk.seeds) for chunk in chunks)
        times = {"rollout": last_drawn - started, "reward": time.perf_counter() - last_drawn}
        order = list(self.config.rewards)
        return [Drawn(*drawn[chunk.id], beside(parts[chunk.id], order), request) for chunk in chunks], times

    def _submit(self, chunk: Chunk, request: DrawRequest) -> None:
        null = self.conditions.get("") if request.guidance > 1 else None
        explored = self.perturbations[chunk.prompt.text].reference if any(chunk.variants) else None
        own = self.conditions[chunk.prompt.text]
        self.samplers.submit(chunk.id, "draw", chunk, own, null, request, explored, returns=3)

    def _draw_again(self, missed: list[tuple[Chunk, Any]], drawn: dict[tuple, tuple], request: DrawRequest) -> None:
        """Images went down with their node before they were scored: the same ones are drawn again."""
        for chunk, images in missed:
            if chunk.id not in drawn:
                continue  # it is being drawn again for other rewards
            if drawn[chunk.id][1] == images:
                del drawn[chunk.id]
                self._submit(chunk, request)
            else:  # it has been
                for scoring in self.scoring:
                    scoring.add(chunk, drawn[chunk.id][1])

    def redraw(self, drawn: list[Drawn]) -> None:
        """Draw chunks again, in place: the same images and records, in new objects. Scores stay."""
        for item in drawn:
            self._submit(item.info.chunk, item.request)
        places = {item.info.chunk.id: index for index, item in enumerate(drawn)}
        for done in stream(self.samplers):
            index, (images, record) = places[done.key], done.refs
            self._verify(done.value, drawn[index].info.chunk, drawn[index].request)
            drawn[index] = replace(drawn[index], info=done.value, images=images, record=record)

    def _verify(self, info: DrawInfo, chunk: Chunk, request: DrawRequest) -> None:
        """A chunk must have been drawn with exactly the levels, seeds, weights and condition that were asked for."""
        explored = self.perturbations[chunk.prompt.text].key if any(chunk.variants) else None
        if info.fingerprint != fingerprint(chunk, request, self.keys[chunk.prompt.text], explored):
            raise RuntimeError(f"chunk {chunk.id} was not drawn as requested; sampler and driver versions differ")

    def images(self, drawn: list[Drawn]) -> np.ndarray:
        """Images of drawn chunks, uint8 [N, H, W, 3]."""
        return np.concatenate(self._with_objects(drawn, lambda: self._fetch([item.images for item in drawn])))

    def _fetch(self, references: Any) -> Any:
        """What references refer to. TimeoutError where it does not come."""
        wait = self.config.cluster.timeout_s
        try:
            return ray.get(references, timeout=wait)
        except GetTimeoutError as error:
            raise TimeoutError(f"the object store did not bring what is there within {wait:g} s") from error

    def values(self, drawn: list[Drawn]) -> tuple[np.ndarray, np.ndarray]:
        """The critic's values [S, N, R] of all states of all samples of a step, and the noise levels [N + 1]."""

        def ask() -> list[tuple]:
            shares = [
                [ref for item in drawn[rank :: self.plan.learners] for ref in (item.record, self._condition(item))]
                for rank in range(self.plan.learners)
            ]
            return self.learners.values(shares)

        answers = self._with_records(drawn, ask)
        found: list[np.ndarray] = [None] * len(drawn)
        for rank, (values, _) in enumerate(answers):
            found[rank :: self.plan.learners] = values
        return np.concatenate(found), answers[0][1]

    def _with_objects(
        self, drawn: list[Drawn], ask: Callable[[], Any], prepare: Callable[[], None] | None = None
    ) -> Any:
        """What `ask` makes of drawn chunks. Where an object of theirs went down with its node, all are drawn again:
        which ones are lost, Ray does not tell reliably."""
        for _ in range(OBJECT_LOSSES):
            try:
                return ask()
            except ObjectLostError as error:
                failure = error
                log.warning("objects went down with their node, and are drawn again: %s", reason(error))
                if prepare:
                    prepare()
                self.redraw(drawn)
        raise failure

    def _with_records(self, drawn: list[Drawn], ask: Callable[[], Any]) -> Any:
        """The learner's answer. Its ranks that have their records wait for the others, so all start anew."""
        return self._with_objects(drawn, ask, self.learners.shutdown)

    def _condition(self, item: Drawn) -> Any:
        return self.conditions[item.info.chunk.prompt.text]

    def update(self, step: int, drawn: list[Drawn], credit: Credit) -> dict[str, tuple[float, float]]:
        """One step of the learner: (mean, largest magnitude) of each of its metrics over all ranks."""
        sizes = np.cumsum([len(item.info.chunk.seeds) for item in drawn])[:-1]

        def by_chunk(table: np.ndarray) -> list[np.ndarray]:
            return np.split(table.reshape(-1, *table.shape[2:]), sizes)

        pieces = cut(
            [item.info.chunk for item in drawn],
            by_chunk(credit.advantages),
            by_chunk(credit.valid),
            self.config.learner.updates_per_step,
            self.plan.micro_batch,
            step_seed(self.config, step),
            {"returns": by_chunk(credit.returns), "values": by_chunk(credit.values)} if self.algorithm.critic else None,
        )
        null = self.conditions.get("") if self.config.rollout.guidance > 1 else None

        def ask() -> list[dict]:
            shares = []
            for rank in range(self.plan.learners):
                mine, sources = share(pieces, rank, self.plan.learners)
                data = [ref for source in sources for ref in (drawn[source].record, self._condition(drawn[source]))]
                shares.append((mine, data))
            return self.learners.update(step, shares, total_weight(pieces), null, credit.actor)

        return merge(self._with_records(drawn, ask))

    def publish(self, source: str) -> Sync:
        """Send the learner's "behaviour" or "evaluation" adapter to all samplers and prove that it arrived."""
        self.version += 1
        while True:
            manifest, buffer = self.learners.publish(source, self.version)
            started = time.perf_counter()
            try:
                buffer = ray.put(self._fetch(buffer))  # so that samplers that come later do not depend on its node
                break
            except ObjectLostError:  # went down with the learner's node, which starts anew
                continue
        receipts = self.samplers.broadcast("adopt", manifest, buffer)
        check(manifest, receipts, len(self.samplers.staff))
        return Sync(manifest, buffer, time.perf_counter() - started)

    def _prove(self, receipt: Receipt) -> None:
        """A sampler that comes later must hold the published weights, too."""
        manifest, _ = self.samplers.news[1]
        check(manifest, [receipt], 1)

    def adapter(self, sync: Sync) -> dict[str, np.ndarray]:
        """Published weights by name."""
        buffer = self._fetch(sync.buffer)
        return {tensor.name: view(buffer, tensor) for tensor in sync.manifest.tensors}


def step_seed(config: RunConfig, step: int) -> int:
    """Seed of one step's choices (which noise levels, which groups share an update)."""
    return config.seed * 1_000_003 + step
