"""What tests of rewards share: inputs, CLIP's preprocessing by PIL and numpy, and how a load is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from align_cluster.errors import UserError
from align_cluster.types import Prompt

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


def prompts(texts):
    return [Prompt(i, text) for i, text in enumerate(texts)]


def floats(images):
    """Images uint8 [B, H, W, 3] as a reward's floats [B, 3, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def framed(image, width, height):
    """PIL's bicubic without its rounding to 8 bits: image uint8 [H, W, 3] as floats [height, width, 3] in [0, 1]."""
    planes = []
    for channel in range(3):
        plane = Image.fromarray(image[:, :, channel].astype(np.float32) / 255)  # mode F
        for size in ((width, image.shape[0]), (width, height)):
            plane = Image.fromarray(np.asarray(plane.resize(size, Image.Resampling.BICUBIC)).clip(0, 1))
        planes.append(np.asarray(plane))
    return np.stack(planes, -1)


def middle(image, side):
    """CLIP's view of an image uint8 [H, W, 3] before it is normalised, [side, side, 3]: the shorter side, the middle.

    Odd margins as torchvision has them.
    """
    width, height = (side * length // min(image.shape[:2]) for length in (image.shape[1], image.shape[0]))
    left, top = (round((length - side) / 2) for length in (width, height))
    return framed(image, width, height)[top : top + side, left : left + side]


def batched(pixels, mean=CLIP_MEAN, std=CLIP_STD):
    """Pixels [H, W, 3] in [0, 1] as a model's normalised fp32 [1, 3, H, W]."""
    return torch.tensor((pixels - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]


def cosine(a, b):
    """In fp64, of two tensors [D]."""
    a, b = a.double().numpy(), b.double().numpy()
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def open_clip_architecture(side, **more):
    """ViT-H-14 in small, as open_clip's model configs have it: the same patch size, vocabulary and text length."""
    return {
        "embed_dim": 16,
        "vision_cfg": {"image_size": side, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        **more,
    }


def refusal(match, load, *args, **settings):
    """The one sentence that `load` is refused with."""
    with pytest.raises(UserError, match=match) as caught:
        load(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)
