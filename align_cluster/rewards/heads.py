"""Shared code of rewards on a CLIP-like tower: OpenAI CLIP's preprocessing and a linear head."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def stretched(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scale images [B, C, H, W] in [0, 1] to [B, C, height, width], with a gradient.

    It is PIL's bicubic: along the rows first, with antialiasing, and each pass clamped. PIL also rounds both passes to
    8 bits; this does not, so the two differ by at most about one level of 255. (Recent PIL may take the columns first
    if that is less work, which shows at hard edges only.)
    """
    for size in ((images.shape[2], width), (height, width)):
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    return images


def cropped(images: torch.Tensor, side: int) -> torch.Tensor:
    """Return the middle square of images [B, C, H, W] in [0, 1], with the shorter side scaled to `side`.

    OpenAI's CLIP sees images like this. Sizes and offsets round as torchvision's Resize and CenterCrop do.
    """
    shorter = min(images.shape[2:])
    height, width = (int(side * length / shorter) for length in images.shape[2:])
    top, left = round((height - side) / 2), round((width - side) / 2)
    return stretched(images, height, width)[:, :, top : top + side, left : left + side]


def linear_head(width: int, places: Sequence[int]) -> nn.Sequential:
    """Build linear layers width-1024-128-64-16-1 with nothing between them, as in LAION's aesthetic predictor.

    The published heads have dropout between some layers, for training, and no activation. `places` are the layers'
    numbers in the published Sequential, so that its state dict fits this one, and that of a head with activations does
    not.
    """
    sizes = pairwise((width, 1024, 128, 64, 16, 1))
    return nn.Sequential(OrderedDict((str(place), nn.Linear(*size)) for place, size in zip(places, sizes, strict=True)))
