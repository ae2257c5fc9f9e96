"""What test_contract.py needs of each backbone, to compare it with the stock pipeline. A tiny_KIND.py has

build(folder)       writes a random pipeline of a test's size
stock(folder)       the pipeline as stock diffusers loads it
encoded(pipe, text) a prompt's (sequence [T, D], pooled [P]), as the stock pipeline encodes it
draw(pipe, texts, noise, steps, guidance, output)
                    what the stock pipeline draws from noise [B, C, H, W]: latents like it for the output "latent",
                    else images; guidance leads away from no prompt, 1 is none
levels(pipe)        noise levels [N + 1] of the last draw
SETTINGS            of the backbone's Config, where images of 64 pixels are not the pipeline's own choice
"""

import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.adapters import adapter_parameters
from align_cluster.backbones.base import Backbone
from align_cluster.rollouts.denoise import denoise, initial_noise
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.rollouts.steps import Euler
from align_cluster.streams import stream

TEXT = "a photo of a red circle"


@dataclass(frozen=True)
class Case:
    """One kind of backbone and its tiny pipeline."""

    kind: str
    folder: Path

    @property
    def tiny(self) -> Any:
        return importlib.import_module(f".tiny_{self.kind}", __package__)

    def backbone(self, folder: Path | None = None, **settings: Any) -> Any:
        kind = BACKBONES[self.kind]
        values = (
            {"path": str(folder or self.folder), "precision": "fp32"} | getattr(self.tiny, "SETTINGS", {}) | settings
        )
        return kind(kind.Config(**values))

    def pipe(self) -> Any:
        pipe = self.tiny.stock(self.folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def only(self, folder: Path, *parts: str) -> Path:
        """A copy of the pipeline that has the weights of these parts alone."""
        shutil.copytree(self.folder, folder)
        for path in folder.glob("*/*.safetensors"):
            if path.parent.name not in parts:
                path.unlink()
        return folder


def noise_of(backbone: Backbone, seeds: tuple[int, ...]) -> torch.Tensor:
    """Initial noise [B, C, H, W], as `sample` begins with."""
    return initial_noise([stream(seed) for seed in seeds], backbone.latent_shape)


def sample(
    backbone: Backbone,
    denoiser: torch.nn.Module,
    conditions: list,
    seeds: tuple[int, ...],
    guidance: float = 1.0,
    steps: int = 4,
) -> torch.Tensor:
    """Final latents of our ODE rollout of one prompt, under `conditions`: the prompt's and the empty one's."""
    condition, null = conditions
    text = TextBatch.build([condition] * len(seeds), null, torch.device("cpu"))
    return denoise(
        lambda x, sigma: guided_velocity(backbone, denoiser, x, sigma, text, guidance),
        Euler(Euler.Config(), backbone.sigmas(steps), backbone.prediction),
        backbone.latent_shape,
        seeds,
    ).x0


def random_state(denoiser: torch.nn.Module, scale: float = 0.3) -> dict[str, np.ndarray]:
    """Random weights of the adapter "default", put into it too."""
    rng, state = np.random.default_rng(0), {}
    for name, parameter in sorted(adapter_parameters(denoiser, "default").items()):
        state[name] = (scale * rng.standard_normal(parameter.shape)).astype(np.float32)
        parameter.data.copy_(torch.from_numpy(state[name]))
    return state
