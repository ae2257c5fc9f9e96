"""JPEG size (Black et al. 2023, DDPO, arXiv 2305.13301): a reward without a model, and the smallest example of one."""

from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image

from align_cluster.rewards.base import ModelSize, Result, Reward, RewardSection
from align_cluster.types import Prompt


class Jpeg(Reward):
    """Minus the kilobytes (1000 bytes) of an image saved at PIL's quality 95: smooth images are worth more."""

    class Config(RewardSection):
        """`incompressible` turns the sign: detail is worth more. Flow-GRPO divides by 500: set weight to 0.002."""

        kind: Literal["jpeg"] = "jpeg"
        incompressible: bool = False

    def model_sizes(self) -> list[ModelSize | None]:
        """Return nothing, because no model is loaded."""
        return []

    def load(self, device: str, threads: int) -> None:
        pass

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Result:
        kilobytes = np.array([self._bytes(image) / 1000 for image in images])
        return Result(kilobytes if self.config.incompressible else -kilobytes, np.ones(len(images), dtype=bool))

    def _bytes(self, image: np.ndarray) -> int:
        file = BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=95)
        return file.tell()
