"""A rule-based object detector of the embedded world, batched, in torch only.

A pixel gets the colour class of its hue, or white or black by its brightness against the ground. A connected part of
one colour class is an object. Its outline is compared with rendered templates of every shape. Lengths are in pixels of
the 48 x 48 canvas.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from align_cluster.embedded import scene
from align_cluster.embedded.render import SIZE, coverage

COLORS = tuple(scene.COLORS)
HUES = torch.tensor([15.5, 42.5, 85.0, 178.0, 252.0, 325.0])  # degrees at which red, orange, ..., purple end
WASHED = 0.45  # foreground starts at this fraction of the way from ground to pure colour; a small VAE pales edges
MIN_SIDE, MAX_SIDE = 6, 40  # pixels; anything smaller is a speck, anything larger is ground
MARGIN = 0.14  # a true shape leads the next best by this; each point less costs two, since a blob is no circle
CROP = 24  # templates and outlines are compared on a CROP x CROP raster


@dataclass(frozen=True, eq=False)
class Detection:
    """Describes one found object. All detectors return this record.

    label   class name
    score   confidence in [0, 1]; here the overlap (IoU) with the best template, reduced if a second shape fits too
    box     x0, y0, x1, y1 in pixels, the far edges exclusive
    mask    bool [H, W], None if the detector finds boxes only
    color   colour name, None if the detector does not tell colours
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None
    color: str | None = None


@torch.no_grad()
def detect(images: np.ndarray | torch.Tensor) -> list[list[Detection]]:
    """Return the objects in each of B images, uint8 [B, H, W, 3], the most confident first."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
    classes = _majority(_classes(pixels))
    owner, masks, color = _parts(classes)
    boxes = _boxes(masks)
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = (sides.amin(1) >= MIN_SIDE) & (sides.amax(1) <= MAX_SIDE)
    kept &= ~_fringes(owner, masks)
    owner, masks, color, boxes = owner[kept], masks[kept], color[kept], boxes[kept]
    shape, score = _match(masks, boxes)
    found: list[list[Detection]] = [[] for _ in range(len(pixels))]
    rows = zip(shape.tolist(), score.tolist(), boxes.tolist(), masks.numpy(), color.tolist(), strict=True)
    for image, (k, s, box, mask, c) in zip(owner.tolist(), rows, strict=True):
        found[image].append(Detection(scene.SHAPES[k], s, tuple(box), mask, COLORS[c]))
    for detections in found:
        detections.sort(key=lambda detection: -detection.score)
    return found


def _classes(pixels: torch.Tensor) -> torch.Tensor:
    """Return the colour class of each pixel, long [B, H, W]: an index into COLORS, or -1 for the ground."""
    high, low, brightness = pixels.amax(1), pixels.amin(1), pixels.mean(1)
    chroma = high - low
    red, green, blue = pixels.unbind(1)
    sector = torch.where(
        high == red,
        (green - blue) / chroma.clamp_min(1e-6) % 6,
        torch.where(
            high == green, (blue - red) / chroma.clamp_min(1e-6) + 2, (red - green) / chroma.clamp_min(1e-6) + 4
        ),
    )
    hue = torch.bucketize(60 * sector, HUES) % len(HUES)
    pure = torch.tensor([max(rgb) - min(rgb) for rgb in scene.COLORS.values()][: len(HUES)]) / 255
    border = torch.cat([brightness[:, :2].flatten(1), brightness[:, -2:].flatten(1)], 1)
    border = torch.cat([border, brightness[:, :, :2].flatten(1), brightness[:, :, -2:].flatten(1)], 1)
    ground = border.median(1).values.view(-1, 1, 1)
    lift = brightness - ground
    bright, dark = (sum(scene.COLORS[name]) / 765 for name in ("white", "black"))
    classes = torch.full_like(hue, -1)
    classes[lift > WASHED * (bright - ground).clamp_min(0.15)] = COLORS.index("white")
    classes[lift < WASHED * (dark - ground).clamp_max(-0.15)] = COLORS.index("black")
    return torch.where(chroma > WASHED * pure[hue], hue, classes)


def _majority(classes: torch.Tensor) -> torch.Tensor:
    """Give each object pixel the commonest class of its 5 x 5 neighbourhood.

    Thin colour fringes thereby join their blob.
    """
    votes = F.one_hot(classes + 1, len(COLORS) + 1)[..., 1:].permute(0, 3, 1, 2).float()
    return torch.where(classes >= 0, F.avg_pool2d(votes, 5, stride=1, padding=2).argmax(1), classes)


def _parts(classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the connected parts that are not specks: image index [N], masks bool [N, H, W], colour class [N]."""
    count, height, width = classes.shape
    where = (classes.flatten() >= 0).nonzero()[:, 0]
    rows = _runs(classes).flatten()[where]
    columns = _runs(classes.transpose(1, 2)).view(count, width, height).transpose(1, 2).flatten()[where]
    # A run of a row and a run of a column that cross get the same label. This repeats until no label changes.
    label = torch.arange(count * height * width)
    while True:
        across = torch.zeros_like(label).scatter_reduce_(0, columns, label[rows], "amax")
        updated = torch.zeros_like(label).scatter_reduce_(0, rows, across[columns], "amax")
        if torch.equal(updated[rows], label[rows]):
            break
        label = updated
    flat = torch.full((classes.numel(),), -1)
    flat[where] = label[rows]
    names, area = torch.unique(label[rows], return_counts=True)
    names = names[area >= 2 * MIN_SIDE]
    first = torch.full((classes.numel(),), classes.numel()).scatter_reduce_(0, label[rows], where, "amin")[names]
    owner = first // (height * width)
    return owner, flat.view(count, height, width)[owner] == names.view(-1, 1, 1), classes.flatten()[first]


def _runs(classes: torch.Tensor) -> torch.Tensor:
    """Number the runs of equal classes along the last dimension; [B, H, W], numbers unique in the batch."""
    starts = torch.ones_like(classes)
    starts[..., 1:] = classes[..., 1:] != classes[..., :-1]
    return starts.flatten().cumsum(0).view_as(classes) - 1


def _boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return the bounding boxes [N, 4] of masks [N, H, W]: x0, y0, x1, y1, the far edges exclusive."""
    edges = []
    for dim in (1, 2):
        hit = masks.any(dim).to(torch.uint8)
        edges.append((hit.argmax(1), hit.shape[1] - hit.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], 1).float()


def _fringes(owner: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return bool [N]: whether a part is the fringe of a blob at least twice its size, mostly within 2 pixels of it."""
    flat = masks.flatten(1).float()
    near = F.max_pool2d(masks[:, None].float(), 5, stride=1, padding=2).flatten(1)
    area, touched = flat.sum(1)[:, None], flat @ near.T
    return ((owner[:, None] == owner) & (2 * area <= area.T) & (2 * touched > area)).any(1)


def _match(masks: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best shape's index [N] and its score [N] in [0, 1] for masks [N, H, W]."""
    templates, sides = _templates()
    outlines, size = _crops(masks, boxes).flatten(1), boxes[:, 2:] - boxes[:, :2]
    shared = outlines @ templates.T
    overlap = shared / (outlines.sum(1)[:, None] + templates.sum(1) - shared)
    width, widths = size.amax(1, keepdim=True), sides.amax(1)
    overlap = overlap * ((width.clamp(widths.min(), widths.max()) - widths).abs() <= 0.15 * widths)
    stretch = ((size[:, 0] / size[:, 1]).log()[:, None] - (sides[:, 0] / sides[:, 1]).log()).abs()
    overlap = overlap * torch.exp(-2 * (stretch - 0.1).clamp_min(0))  # an oval is no circle
    (best, rival), shapes = (v.T for v in overlap.unflatten(1, (len(scene.SHAPES), -1)).amax(2).topk(2, dim=1))
    return shapes[0], (best - 2 * (MARGIN - (best - rival)).clamp_min(0)).clamp_min(0)


def _crops(masks: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Return square windows around boxes [N, 4], as wide as the longer side, resampled to 0 or 1, [N, CROP, CROP]."""
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True)
    steps = (torch.arange(CROP) + 0.5) / CROP - 0.5
    extent = torch.tensor([masks.shape[2], masks.shape[1]])
    x, y = (2 * (centre[:, :, None] + side[:, :, None] * steps) / extent.view(1, 2, 1) - 1).unbind(1)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3)
    return (F.grid_sample(masks[:, None].float(), grid, align_corners=False)[:, 0] > 0.5).float()


@cache
def _templates() -> tuple[torch.Tensor, torch.Tensor]:
    """Return outlines of every shape at sizes around those in use, [6 * K, CROP * CROP], and their sides [6 * K, 2].

    Radii are whole, on the pixel lattice and half a pixel off. More templates would accept too much: a circle of 14.5
    pixels, cut to 14 by its raster, looks like a square with round corners.
    """
    radius, x, y = torch.tensor(list(product(range(6, 17), (0, 0.5), (0, 0.5)))).T
    masks = []
    for shape in scene.SHAPES:
        cover = coverage(shape, SIZE / 2 + x, SIZE / 2 + y, radius)
        masks += [_parts((cover > cut).long() - 1)[1] for cut in (0.4, 0.55)]  # with and without thin tips
    boxes = _boxes(torch.cat(masks))
    return _crops(torch.cat(masks), boxes).flatten(1), boxes[:, 2:] - boxes[:, :2]
