"""OCR reward (Flow-GRPO, Liu et al. 2025, arXiv 2505.05470): is the text that the prompt quotes readable?"""

import unicodedata
from typing import Literal

import numpy as np
from PIL import Image

from align_cluster.prompts.files import quoted
from align_cluster.rewards.base import Bounds, ModelSize, Result, Reward, RewardSection, malformed
from align_cluster.rewards.loading import extra
from align_cluster.types import Prompt

# Pixels of the shorter side. RapidOCR misreads tiny letters: at 48 px, enlarging raised the scores of the embedded
# world's words from .97 to 1.0.
READABLE_SIDE = 192


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def plain(text: str) -> str:
    """Return the text in lower case without white space.

    Full-width letters, which the reader often returns, become common ones.
    """
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def similarity(read: str, target: str) -> float:
    """Return 1 if `target` is part of `read`, else 1 - edit distance / length of the target, at least 0.

    Both texts must be `plain`.
    """
    distance = 0 if target in read else min(edit_distance(read, target), len(target))
    return 1 - distance / len(target)


def enlarged(image: np.ndarray) -> np.ndarray:
    """Return the image uint8 [H, W, 3], enlarged by a whole factor if its shorter side is below READABLE_SIDE."""
    height, width = image.shape[:2]
    factor = -(-READABLE_SIDE // min(height, width))
    if factor <= 1:
        return image
    return np.asarray(Image.fromarray(image).resize((factor * width, factor * height), Image.Resampling.BICUBIC))


class Ocr(Reward):
    """Compares the text that RapidOCR reads with the prompt's quoted text (metadata `text`, else the first quotes).

    Prompts that quote nothing have no score. The detail `exact` is 1 if the text read is the target and no more.
    """

    class Config(RewardSection):
        """The OCR reward has no settings of its own."""

        kind: Literal["ocr"] = "ocr"

    needs = "it needs prompts that quote text, as the embedded task ocr does"
    metadata = {"text": "the text that an image must show, in place of the first one that the prompt quotes"}

    @classmethod
    def judges(cls, prompt: Prompt) -> bool:
        """Return whether the prompt asks for text."""
        return bool(prompt.metadata.get("text") or quoted(prompt.text))

    @property
    def bounds(self) -> Bounds:
        """Those of a share."""
        return 0.0, 1.0

    def model_sizes(self) -> list[ModelSize | None]:
        """Return nothing: the reader's models take a few megabytes."""
        return []

    def load(self, device: str, threads: int) -> None:
        """Load RapidOCR's detection and recognition models."""
        with extra(self.config.kind):
            import cv2
            from rapidocr import RapidOCR

            cv2.setNumThreads(threads)
            self.reader = RapidOCR(
                params={
                    "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                    "Global.log_level": "error",
                    "Det.limit_side_len": 320,
                    "Det.limit_type": "min",
                }
            )

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Result:
        """Read each image with a quoted text; the others stay invalid."""
        values, exact = (np.full(len(prompts), np.nan) for _ in range(2))
        failure = malformed(prompts, tuple(self.metadata))
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            if failure and index in failure.rows:
                continue
            target = plain(prompt.metadata.get("text") or quoted(prompt.text))
            if target:
                read = plain(self.read(image))
                values[index], exact[index] = similarity(read, target), read == target
        return Result(values, np.isfinite(values), {"exact": exact}, failure)

    def read(self, image: np.ndarray) -> str:
        """Return all text found in an image uint8 [H, W, 3]."""
        found = self.reader(enlarged(image)[:, :, ::-1], use_cls=False)
        return " ".join(found.txts or ())
