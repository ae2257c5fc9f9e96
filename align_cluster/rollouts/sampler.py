"""The sampler worker: owns a denoiser with one adapter, draws chunks with it, and proves each weight sync."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.base import BackboneSection
from align_cluster.conditions.cache import ConditionCache, default_folder
from align_cluster.config.base import Section
from align_cluster.rollouts.denoise import denoise
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.rollouts.steps import STEPS
from align_cluster.types import Chunk, Condition, DrawInfo, Manifest, Receipt, Record
from align_cluster.weights import adopt


@dataclass(frozen=True)
class DrawRequest:
    """How to draw: the same for all chunks of a step. `indices` are the denoising steps to record; `version` the
    weights."""

    version: int
    steps: int
    step: Section
    guidance: float = 1.0
    indices: tuple[int, ...] = ()


class Sampler:
    """Draws images. A plain class: tests construct it directly, the cluster wraps it in an actor.

    Version 0 is the base model: its adapter is zero until the first `adopt`.
    """

    def __init__(self, config: BackboneSection, threads: int = 1, name: str = "sampler", device: str = "cpu") -> None:
        torch.set_num_threads(threads)
        self.name, self.version = name, 0
        self.backbone = BACKBONES[config.kind](config, device)
        self._denoiser: torch.nn.Module | None = None

    @property
    def denoiser(self) -> torch.nn.Module:
        """Loaded at first use, so that a worker that only encodes never holds it."""
        if self._denoiser is None:
            self._denoiser = add_adapters(self.backbone, self.backbone.load_denoiser(), ("default",)).eval()
        return self._denoiser

    def encode(self, texts: list[str]) -> list[Condition]:
        """Conditions of prompts, from the disk cache where they are there; the text encoders load only for the
        others."""
        cache = ConditionCache(default_folder())
        found = [cache.get(self.backbone.condition_key(text)) for text in texts]
        missing = [text for text, condition in zip(texts, found, strict=True) if condition is None]
        fresh = {}
        for condition, text in zip(self.backbone.encode(missing) if missing else [], missing, strict=True):
            cache.put(condition)
            fresh[text] = condition
        return [condition or fresh[text] for text, condition in zip(texts, found, strict=True)]

    def adopt(self, manifest: Manifest, buffer: np.ndarray) -> Receipt:
        """Bind every tensor of a published buffer to this worker's adapter; the checksum is read back from the
        parameters."""
        started = time.perf_counter()
        parameters = adapter_parameters(self.denoiser, "default")
        checksum = adopt(manifest, buffer, parameters)
        self.version = manifest.version
        return Receipt(self.name, manifest.version, len(parameters), checksum, time.perf_counter() - started)

    def draw(
        self, chunk: Chunk, condition: Condition, null: Condition | None, request: DrawRequest
    ) -> tuple[DrawInfo, np.ndarray, Record]:
        """Draw one chunk: (what the driver keeps, images uint8 [B, H, W, 3], what the learner needs)."""
        if request.version != self.version:
            raise RuntimeError(
                f"{self.name} holds weights {self.version}, but was asked to draw with {request.version}"
            )
        started = time.perf_counter()
        sigmas = self.backbone.sigmas(request.steps)
        text = TextBatch.build([condition] * len(chunk.seeds), null, self.backbone.device)
        path = denoise(
            lambda x, sigma: guided_velocity(self.backbone, self.denoiser, x, sigma, text, request.guidance),
            STEPS[request.step.kind](request.step, sigmas),
            sigmas,
            self.backbone.latent_shape,
            chunk.seeds,
            request.indices,
            self.backbone.device,
        )
        images = self.backbone.decode(path.x0)
        arrays = [None if t is None else t.cpu().numpy() for t in (path.before, path.after, path.log_probs)]
        record = Record(
            chunk, self.version, path.x0.cpu().numpy(), sigmas, np.array(request.indices, dtype=np.int64), *arrays
        )
        info = DrawInfo(
            chunk,
            self.version,
            fingerprint(chunk.seeds, request, condition.key),
            time.perf_counter() - started,
            request.steps * (1 if request.guidance == 1.0 else 2),
        )
        return info, images, record


def fingerprint(seeds: Sequence[int], request: DrawRequest, condition_key: str) -> str:
    """Hash of everything that decides a draw; the driver compares the one that comes back with its own."""
    facts = (request.version, request.steps, request.step.model_dump_json(), request.guidance, request.indices)
    return hashlib.blake2b(repr((facts, tuple(seeds), condition_key)).encode(), digest_size=8).hexdigest()
