"""States of images that a run has drawn, from which its critic learns again and again.

The driver keeps them, bounded and in fp16, so that a learner's rank that is lost, or a run that goes on from a
checkpoint, finds them. Which states an update reads follows from (seed, step) and from what is kept alone.
"""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from align_cluster.config.run import RunConfig
from align_cluster.rewards.base import sound
from align_cluster.streams import hashed, stream
from align_cluster.types import ReplayBatch


@dataclass(frozen=True)
class Block:
    """Holds what is kept of one step's images; it never changes.

    states    fp16 [n, K, C, H, W]
    places    [n, K], the denoising steps that the states stand before
    rewards   fp64 [n, R], as they were scored; NaN where a reward does not judge the image
    versions  [n], the policy versions that drew them
    texts     uint8, the JSON of the n prompts
    """

    states: np.ndarray
    places: np.ndarray
    rewards: np.ndarray
    versions: np.ndarray
    texts: np.ndarray

    def __len__(self) -> int:
        return len(self.states)

    @property
    def prompts(self) -> list[str]:
        """Return the prompt of each image."""
        return json.loads(self.texts.tobytes())

    @classmethod
    def of(
        cls, states: np.ndarray, places: np.ndarray, rewards: np.ndarray, versions: np.ndarray, prompts: list[str]
    ) -> "Block":
        """Keep the images whose states are finite and that a reward judges."""
        judged = np.where(sound(rewards), rewards, np.nan)
        rows = np.isfinite(states).all((1, 2, 3, 4)) & np.isfinite(judged).any(1)
        texts = json.dumps([text for text, row in zip(prompts, rows, strict=True) if row]).encode()
        return cls(states[rows], places[rows], judged[rows], versions[rows], np.frombuffer(texts, np.uint8))


class ReplayBuffer:
    """Keeps the last images of a run, at most `replay.images`, one block a step."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.settings = config, config.algorithm.replay
        self.blocks: deque[Block] = deque()

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    def add(self, block: Block) -> None:
        """Keep a step's images, and let go of the oldest steps beyond the bound."""
        self.blocks.append(block)
        while len(self) > self.settings.images:
            self.blocks.popleft()

    def minibatches(
        self, step: int, sigmas: np.ndarray, mean: np.ndarray, deviation: np.ndarray
    ) -> tuple[ReplayBatch, ...]:
        """Return what the critic's updates of a step read, each other images, until all had their turn.

        Values regress on rewards normalised by `mean` and `deviation` [R], discounted to the state's denoising step.
        """
        if not len(self):
            return ()
        settings = self.config.algorithm
        count = settings.critic_updates(self.config.images_per_step)
        own = stream(hashed(f"replay {self.config.seed} {step}"))
        order, updates = self._order(own), []
        rewards = np.concatenate([block.rewards for block in self.blocks])
        targets = ((rewards - mean) / deviation).astype(np.float32)
        places = np.concatenate([block.places for block in self.blocks])
        texts = [text for block in self.blocks for text in block.prompts]
        firsts = np.cumsum([0, *map(len, self.blocks)])
        reads = min(settings.critic_states or places.shape[1], places.shape[1])
        for _ in range(count):
            rows = np.sort([next(order) for _ in range(min(self.settings.minibatch, len(self)))])
            slots = np.stack([torch.randperm(places.shape[1], generator=own)[:reads].numpy() for _ in rows])
            owners, slots = np.repeat(rows, reads), slots.ravel()
            blocks = np.searchsorted(firsts, owners, "right") - 1
            states = [
                self.blocks[b].states[row - firsts[b], k] for b, row, k in zip(blocks, owners, slots, strict=True)
            ]
            stood = places[owners, slots]
            discounts = (settings.discount ** (len(sigmas) - 2 - stood)).astype(np.float32)[:, None]
            updates.append(
                ReplayBatch(
                    np.stack(states),
                    sigmas[stood].astype(np.float32),
                    targets[owners] * discounts,
                    tuple(texts[row] for row in owners),
                    len(owners),
                )
            )
        return tuple(updates)

    def _order(self, own: torch.Generator) -> Iterator[int]:
        """Yield numbers of images for ever: all of them in random order, and then all of them again."""
        while True:
            yield from torch.randperm(len(self), generator=own).tolist()

    @property
    def age(self) -> float:
        """Return how many steps ago the kept images were drawn, on average. Versions do not tell: evaluations and
        resumed runs publish more of them."""
        counts = [len(block) for block in self.blocks]
        return float(np.average(np.arange(len(counts))[::-1], weights=counts))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint keeps."""
        return {f"{i:06d}/{name}": array for i, block in enumerate(self.blocks) for name, array in vars(block).items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from the arrays of an earlier run."""
        numbers = sorted({name.split("/")[0] for name in arrays})
        names = Block.__dataclass_fields__
        self.blocks = deque(Block(**{name: arrays[f"{number}/{name}"] for name in names}) for number in numbers)
