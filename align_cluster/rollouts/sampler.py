"""The sampler worker: it owns a denoiser with one adapter, draws chunks, and proves each weight sync."""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path as FilePath
from tempfile import TemporaryDirectory
from types import MappingProxyType

import numpy as np
import torch

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.adapters import Merged, adapter_parameters, add_adapters
from align_cluster.backbones.base import BackboneSection, rounded
from align_cluster.conditions.cache import cached
from align_cluster.conditions.exploration import E2po, strength
from align_cluster.prompts.images import read_image
from align_cluster.rollouts.denoise import Path, Policy, Velocity, denoise
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.rollouts.schedule import SCHEDULES
from align_cluster.rollouts.steps import STEPS
from align_cluster.rollouts.windows import Window
from align_cluster.settings import Section
from align_cluster.types import Chunk, Condition, DrawInfo, Manifest, Perturbation, Receipt, Record
from align_cluster.weights import adopt, view


@dataclass(frozen=True)
class DrawRequest:
    """Says how to draw. All chunks of a step share one request.

    version              version of the weights that must draw
    steps, step          number of denoising steps, and the settings of their kind
    guidance             strength of classifier-free guidance (1: none)
    window               the denoising steps that are noisy, and those to record
    means                whether to record the means of the recorded densities
    schedule             settings of the noise levels
    exploration          E2PO's settings, which say how strongly perturbed conditions act at each noise level
    path                 whether to record all steps, trained or not
    distilled_guidance   strength that is fed to a guidance-distilled network (None: the backbone's)
    offline              take the prompts' own images and draw nothing
    """

    version: int
    steps: int
    step: Section
    _: KW_ONLY
    guidance: float = 1.0
    window: Window | None = None
    means: bool = False
    schedule: Section = SCHEDULES["native"].Config()
    exploration: E2po | None = None
    path: bool = False
    distilled_guidance: float | None = None
    offline: bool = False


class Sampler:
    """Draws images. It is a plain class: tests construct it directly, and the cluster wraps it in an actor.

    Version 0 is the base model: the adapter changes nothing until the first `adopt`. `merge` adds the adapter into the
    base's weights.
    """

    def __init__(
        self,
        config: BackboneSection,
        threads: int = 1,
        name: str = "sampler",
        device: str = "cpu",
        merge: bool = False,
    ) -> None:
        torch.set_num_threads(threads)
        self.name, self.version, self.merges = name, 0, merge
        self.backbone = BACKBONES[config.kind](config, device)
        self._denoiser: torch.nn.Module | None = None

    @property
    def denoiser(self) -> torch.nn.Module:
        """Return the network. It loads at first use, so a worker that only encodes never holds it."""
        if self._denoiser is None:
            self._denoiser = add_adapters(self.backbone, self.backbone.load_denoiser(), ("default",)).eval()
        return self._denoiser

    @cached_property
    def _merged(self) -> Merged:
        return Merged(self.denoiser, "default")

    def encode(self, texts: list[str]) -> list[Condition]:
        """Return the conditions of prompts from the disk cache; only for missing ones do the text encoders load."""
        return cached(Condition, texts, self.backbone.condition_key, self.backbone.encode)

    def perturb(self, texts: list[str], config: E2po, seed: int) -> list[Perturbation]:
        """Return the perturbations of prompts from the disk cache; prompts that it lacks are learned together.

        What is learned for one step alone does not go there, because nobody would read it again.
        """
        if config.learned == "each_time":
            return self.backbone.perturb(texts, config, seed)
        return cached(
            Perturbation,
            texts,
            lambda text: self.backbone.perturbation_key(text, config, seed),
            lambda missing: self.backbone.perturb(missing, config, seed),
        )

    def adopt(self, manifest: Manifest, buffer: np.ndarray) -> Receipt:
        """Bind every tensor of a published buffer to this worker's adapter.

        The receipt's checksum is read back from the parameters. Raises RuntimeError if the tensors do not match.
        """
        started = time.perf_counter()
        parameters = adapter_parameters(self.denoiser, "default")
        checksum = adopt(manifest, buffer, parameters)
        self.version = manifest.version
        if self.merges:
            self._merged.merge()
        return Receipt(self.name, manifest.version, len(parameters), checksum, time.perf_counter() - started)

    def lora_file(self, manifest: Manifest, buffer: np.ndarray) -> tuple[str, bytes]:
        """Return name and content of the file that a published buffer's weights are shipped in.

        It is made here because that takes peft and the pipeline's class, which a sampler has imported and the driver
        has not.
        """
        state = {tensor.name: view(buffer, tensor) for tensor in manifest.tensors}
        with TemporaryDirectory() as folder:
            path = self.backbone.save_lora(state, FilePath(folder))
            return path.name, path.read_bytes()

    def draw(
        self,
        chunk: Chunk,
        conditions: Mapping[str, Condition],
        null: Condition | None,
        request: DrawRequest,
        perturbations: Mapping[str, Perturbation] = MappingProxyType({}),
    ) -> tuple[DrawInfo, np.ndarray, Record]:
        """Draw one chunk: return (info for the driver, images uint8 [B, H, W, 3], record for the learner).

        `conditions` has an entry for each of the chunk's texts, `perturbations` for each of its perturbed texts. A row
        whose latents or pixels are not finite is named in the info; its image is black and its record 0. Raises
        RuntimeError if this worker holds other weights than the request names.
        """
        if request.version != self.version:
            raise RuntimeError(
                f"{self.name} holds weights {self.version}, but was asked to draw with {request.version}"
            )
        started = time.perf_counter()
        step = STEPS[request.step.kind](request.step, self.sigmas(request), self.backbone.prediction)
        indices, slots = recorded_indices(chunk, request.window), None
        if request.path:
            indices, slots = np.tile(np.arange(request.steps), (len(chunk), 1)), request.window.trained
        if request.offline:
            path = Path(self._given(chunk))
        else:
            self.backbone.distilled_guidance = request.distilled_guidance
            velocity, policy = self._velocities(chunk, conditions, null, request, perturbations, step.sigmas)
            path = denoise(
                velocity,
                step,
                self.backbone.latent_shape,
                chunk.seeds,
                chunk.noises,
                request.window.noisy if request.window else None,
                indices,
                policy,
                request.means,
                self.backbone.device,
            )
        path, images, finite = self.decoded(path)
        kept = (path.before, path.after, path.log_probs, path.means)
        arrays = [None if tensor is None else tensor.cpu().numpy() for tensor in kept]
        record = Record(chunk, self.version, path.x0.cpu().numpy(), step.sigmas, indices, *arrays, slots)
        info = DrawInfo(
            chunk,
            self.version,
            fingerprint(chunk, request, keys_of(conditions), keys_of(perturbations)),
            time.perf_counter() - started,
            float(images[finite].std((1, 2, 3)).mean()) / 255 if finite.any() else 0.0,
            diversity(images[finite], [row.group for row, sound in zip(chunk.rows, finite, strict=True) if sound]),
            tuple(np.flatnonzero(~finite).tolist()),
        )
        return info, images, record

    @torch.no_grad()
    def decoded(self, path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
        """Return the path, the images uint8 [B, H, W, 3], and which rows are finite, bool [B]; the others are 0.

        One row without a number would otherwise become a black image with a score, and its loss NaN for all.
        """
        finite = path.finite
        pixels = self.backbone.pixels((path if finite.all() else path.only(finite)).x0.to(self.backbone.device))
        finite = finite & torch.isfinite(pixels).flatten(1).all(1)
        if not finite.all():
            path, pixels = path.only(finite), torch.where(finite.view(-1, 1, 1, 1), pixels, -1.0)
        return path, rounded(pixels), finite.cpu().numpy()

    def _given(self, chunk: Chunk) -> torch.Tensor:
        """Return the latents of each row's own image; rows with the same image differ in their later noise."""
        _, height, width = self.backbone.latent_shape
        factor, known = self.backbone.vae_factor, {}
        paths = [prompt.metadata["image"] for prompt in chunk.prompts]
        for path in dict.fromkeys(paths):  # one by one, so that latents do not depend on the neighbours
            known[path] = self.backbone.latents(read_image(path, height * factor, width * factor)[None])
        return torch.cat([known[path] for path in paths])

    def sigmas(self, request: DrawRequest) -> np.ndarray:
        """Return the noise levels [N + 1] of a request."""
        schedule = SCHEDULES[request.schedule.kind](request.schedule)
        return schedule.sigmas(request.steps, self.backbone.sigmas, self.backbone.image_tokens)

    def _velocities(
        self,
        chunk: Chunk,
        conditions: Mapping[str, Condition],
        null: Condition | None,
        request: DrawRequest,
        perturbations: Mapping[str, Perturbation],
        levels: np.ndarray,
    ) -> tuple[Velocity, Policy | None]:
        """Return the function that a chunk is drawn with, and the policy's prediction if that is another function.

        Perturbed rows are drawn under gamma C_k + (1 - gamma) C, gamma being E2PO's strength at sigma. The policy knows
        C alone.
        """
        texts = [prompt.text for prompt in chunk.prompts]
        original = TextBatch.build([conditions[text] for text in texts], null, self.backbone.device)

        def guided(x: torch.Tensor, sigma: torch.Tensor, text: TextBatch = original) -> torch.Tensor:
            return guided_velocity(self.backbone, self.denoiser, x, sigma, text, request.guidance)

        if not chunk.perturbed_texts:
            return guided, None
        explored = (conditions, perturbations, self.backbone.insert, null, self.backbone.device)
        perturbed = TextBatch.perturbed(chunk.rows, *explored)

        def weight(sigma: torch.Tensor) -> float:
            return strength(float(sigma[0]), levels, request.exploration)

        def explore(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return guided(x, sigma, original.towards(perturbed, weight(sigma)))

        return explore, lambda x, sigma: guided(x, sigma) if weight(sigma) else None


def recorded_indices(chunk: Chunk, window: Window | None) -> np.ndarray:
    """Return the steps [B, K] that each row of a chunk records.

    They are all trained steps of the window or, if the window keeps fewer, a seeded choice for each row.
    """
    if window is None:
        return np.empty((len(chunk), 0), dtype=np.int64)
    if window.keep == len(window.trained):
        return np.tile(np.array(window.trained, dtype=np.int64), (len(chunk), 1))
    choices = [random.Random(seed).sample(window.trained, window.keep) for seed in chunk.seeds]
    return np.array(choices, dtype=np.int64)


def diversity(images: np.ndarray, groups: Sequence[int]) -> float:
    """Return how images uint8 [B, H, W, 3] of one group differ: a pixel's standard deviation between them in [0, 1].

    It is averaged over pixels and over the groups that have several images, and 0 where none has.
    """
    owner = np.array(groups)
    several = [group for group, count in Counter(groups).items() if count > 1]
    return float(np.mean([images[owner == group].std(0).mean() for group in several])) / 255 if several else 0.0


def keys_of(encodings: Mapping[str, Condition | Perturbation]) -> dict[str, str]:
    """Return the content address of each text's encoding."""
    return {text: encoding.key for text, encoding in encodings.items()}


def fingerprint(
    chunk: Chunk, request: DrawRequest, conditions: Mapping[str, str], perturbations: Mapping[str, str]
) -> str:
    """Return a hash of everything that decides a draw. The driver compares a sampler's fingerprint with its own.

    `conditions` and `perturbations` are content addresses by text, of the chunk's texts and of its perturbed texts.
    """
    parts = (request.step, request.schedule, request.exploration)
    settings = [part and part.model_dump_json() for part in parts]
    facts = (request.version, request.steps, *settings, request.guidance, request.window, request.means)
    facts += (request.path, request.distilled_guidance, request.offline)
    rows = [(row.seed, row.noise, row.variant, conditions[row.prompt.text]) for row in chunk.rows]
    perturbed = [perturbations[text] for text in chunk.perturbed_texts]
    return hashlib.blake2b(repr((facts, rows, perturbed)).encode(), digest_size=8).hexdigest()
