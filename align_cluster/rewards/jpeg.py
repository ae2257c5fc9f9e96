"""JPEG size (Black et al. 2023, DDPO, arXiv 2305.13301): a reward without a model, and the smallest example."""

from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image

from align_cluster.rewards.base import Bounds, ModelSize, Result, Reward, RewardSection
from align_cluster.types import Prompt


class Jpeg(Reward):
    """Prefers smooth images: minus the kilobytes (1000 bytes) of the image saved at PIL's JPEG quality 95."""

    class Config(RewardSection):
        """Configures the JPEG reward. Flow-GRPO divides it by 500: set weight to 0.002 for the same scale."""

        kind: Literal["jpeg"] = "jpeg"
        incompressible: bool = False
        """Whether large files are preferred, so that the score is plus the kilobytes and detail pays. false prefers
        small files, and so smooth images."""

    @property
    def bounds(self) -> Bounds:
        """Those of a size, or of minus a size."""
        return (0.0, None) if self.config.incompressible else (None, 0.0)

    def model_sizes(self) -> list[ModelSize | None]:
        """Return nothing, because no model is loaded."""
        return []

    def load(self, device: str, threads: int) -> None:
        """There is nothing to load."""
        pass

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Result:
        """Compress each image; the prompt plays no part."""
        kilobytes = np.array([self._bytes(image) / 1000 for image in images])
        return Result(kilobytes if self.config.incompressible else -kilobytes, np.ones(len(images), dtype=bool))

    def _bytes(self, image: np.ndarray) -> int:
        file = BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=95)
        return file.tell()
