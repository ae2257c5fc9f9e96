"""A seeded, batched renderer of the embedded world: metadata records in, 48 x 48 RGB images out."""

import math
import random
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from align_cluster.embedded import scene

SIZE = 48
_rows, _cols = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Return the signed distance in pixels, negative inside, of points at offsets (x, y) from the shape's centre.

    y points down. Raises ValueError for an unknown shape.
    """
    ax, ay, rho = x.abs(), y.abs(), (x * x + y * y).sqrt()
    if shape == "circle":
        return rho - 0.98 * radius
    if shape == "square":
        return torch.maximum(ax, ay) - 0.88 * radius
    if shape == "triangle":
        slope = 1.85
        sides = (slope * ax - (y + radius)) / math.hypot(slope, 1)
        return torch.maximum(sides, y - 0.85 * radius)
    if shape == "star":
        # Fold the plane into one of ten sectors; the edge runs from an outer tip to an inner corner.
        sector = 2 * math.pi / 5
        angle = torch.atan2(x, -y) / sector
        angle = (angle - torch.round(angle)).abs() * sector
        inner = 0.46
        ex, ey = inner * math.cos(math.pi / 5) - 1, inner * math.sin(math.pi / 5)
        return -(ex * rho * torch.sin(angle) - ey * (rho * torch.cos(angle) - radius)) / math.hypot(ex, ey)
    if shape == "cross":
        bar = torch.maximum(ax - 0.95 * radius, ay - 0.34 * radius)
        return torch.minimum(bar, torch.maximum(ay - 0.95 * radius, ax - 0.34 * radius))
    if shape == "ring":
        return (rho - 0.74 * radius).abs() - 0.25 * radius
    raise ValueError(f"unknown shape {shape!r}: the embedded world has {', '.join(scene.SHAPES)}")


def coverage(shape: str, cx: torch.Tensor, cy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Return anti-aliased masks in [0, 1], [B, 48, 48], of one shape at B centres and radii, each [B]."""
    cx, cy, radius = (value.view(-1, 1, 1).float() for value in (cx, cy, radius))
    return (0.5 - signed_distance(shape, _cols - cx, _rows - cy, radius)).clamp(0, 1)


@cache
def _glyph(letter: str, size: int) -> torch.Tensor:
    canvas = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(canvas).text((16, 12), letter, font=ImageFont.load_default(size), fill=255, stroke_width=0)
    ink = np.asarray(canvas, dtype=np.float32) / 255
    ink = np.maximum(ink, np.roll(ink, 1, 1))  # half a pixel bolder
    ys, xs = np.where(ink > 0.3)
    return torch.from_numpy(ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].copy())


def _write(image: torch.Tensor, word: str, color: torch.Tensor) -> None:
    """Paint `word` into fixed letter slots, in place.

    Each word length has one size and set of slots, so that letters fall on the latent grid.
    """
    size, slots = {2: (26, (13, 35)), 3: (18, (8, 24, 40))}[len(word)]
    for letter, centre in zip(word, slots, strict=True):
        ink = _glyph(letter, size)
        height, width = ink.shape
        top, left = 24 - height // 2, min(max(centre - width // 2, 0), SIZE - width)
        patch = image[:, top : top + height, left : left + width]
        patch.mul_(1 - ink).add_(ink * color.view(3, 1, 1))


def render(records: list[dict], seed: int) -> torch.Tensor:
    """Return images that satisfy `records`: uint8 [B, 3, 48, 48], a pure function of (records, seed)."""
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float) -> torch.Tensor:
        return (torch.rand(*shape, generator=gen) - 0.5) * scale

    count = len(records)
    palette = {name: torch.tensor(rgb) / 255 for name, rgb in scene.COLORS.items()}
    level = torch.tensor([scene.background(record) for record in records]).view(-1, 1, 1, 1)
    tilt = noise(count, 2, 1, 1, 1, scale=0.05)
    images = level + noise(count, 3, 1, 1, scale=0.02)
    images = images + tilt[:, 0] * (_cols / SIZE - 0.5) + tilt[:, 1] * (_rows / SIZE - 0.5)
    pieces: dict[str, list[tuple]] = {}
    for index, record in enumerate(records):
        if record["tag"] == "ocr":
            _write(images[index], record["text"], palette[rng.choice(("black", "white"))])
        else:
            for shape, color, x, y, radius in scene.layout(record, rng):
                pieces.setdefault(shape, []).append((index, palette[color], x, y, radius))
    for shape in scene.SHAPES:
        if shape not in pieces:
            continue
        owner, color, x, y, radius = zip(*pieces[shape], strict=True)
        tint = (torch.stack(color) + noise(len(owner), 3, scale=0.04)).clamp(0, 1)
        masks = coverage(shape, *(torch.tensor(value) for value in (x, y, radius)))
        for index, mask, rgb in zip(owner, masks, tint, strict=True):
            images[index] = images[index] * (1 - mask) + mask * rgb.view(3, 1, 1)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
