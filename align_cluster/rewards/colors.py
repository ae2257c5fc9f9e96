"""Names the colours of objects by zero-shot CLIP, as GenEval does (Ghosh et al. 2023, arXiv 2310.11513)."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from align_cluster.embedded.detector import Detection
from align_cluster.prompts.geneval import COLORS
from align_cluster.rewards.loading import open_clip_model

TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
GROUND = 0x99  # grey level around an object whose mask is known: GenEval's #999
BATCH = 32  # objects in one forward pass of CLIP


def cutout(image: np.ndarray, detection: Detection) -> np.ndarray:
    """Return the object's box, uint8 [h, w, 3], of an image uint8 [H, W, 3]; with a mask, its surroundings are grey.

    Box edges round to whole pixels, and a box has at least one pixel.
    """
    if detection.mask is not None:
        image = np.where(detection.mask[:, :, None], image, np.uint8(GROUND))
    height, width = image.shape[:2]
    x0, y0, x1, y1 = (round(edge) for edge in detection.box)
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return image[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]


class ColorNamer:
    """Names colours with open_clip's ViT-L/14 and OpenAI's weights, or with the CLIP at `path`.

    `path` is a hub id or a folder in open_clip's format. A colour's embedding is the normalised mean of the normalised
    embeddings of three sentences, made for each class of objects. An object gets the colour with the embedding nearest
    to its cutout's.
    """

    def __init__(self, path: str | None, device: str) -> None:
        # OpenAI's weights need QuickGELU. Recent open_clip uses it under this name only, GenEval's under either name.
        source, tag = ("ViT-L-14-quickgelu", "openai") if path is None else (path, None)
        model, self.transform, self.tokenizer = open_clip_model("geneval", "color_clip", source, tag)
        self.model, self.device = model.to(device).eval().requires_grad_(False), torch.device(device)
        self.known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, cutouts: list[np.ndarray], labels: list[str]) -> list[str]:
        """The colour of each cutout, uint8 [h, w, 3] of any sizes; `labels` say what the objects are."""
        colors = []
        for start in range(0, len(cutouts), BATCH):
            pixels = [self.transform(Image.fromarray(cut)) for cut in cutouts[start : start + BATCH]]
            with torch.autocast(self.device.type, enabled=False):
                seen = self.model.encode_image(torch.stack(pixels).to(self.device), normalize=True)
                read = torch.stack([self._embedded(label) for label in labels[start : start + BATCH]])
                nearest = (read @ seen[:, :, None])[:, :, 0].argmax(1)
            colors += [COLORS[index] for index in nearest.tolist()]
        return colors

    def _embedded(self, label: str) -> torch.Tensor:
        """Return embeddings [10, D] of the colours of objects with this label; each label is read once."""
        if label not in self.known:
            texts = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
            read = self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True)
            self.known[label] = F.normalize(read.unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1), dim=-1)
        return self.known[label]
