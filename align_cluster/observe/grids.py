"""Sample grids show rows of images under their prompts, as one PNG."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from align_cluster.files import atomic

PAPER, INK = (255, 255, 255), (40, 44, 52)
MARGIN, GAP, TEXT = 12, 6, 16  # pixels around the grid, between images, and of a letter's height
LINE, CAPTION_LINES = 20, 2  # pixels of a line of text, and lines that a caption may have


def save_grid(
    images: np.ndarray,
    columns: int,
    path: Path,
    captions: list[str] | None = None,
    min_px: int = 128,
    titles: Sequence[str] = (),
) -> None:
    """Write `images`, uint8 [R * columns, H, W, 3], as R rows with one caption above each.

    `titles` stand at the top, each over its equal share of the columns. Captions wrap to two lines.

    Images whose shorter side is under `min_px` are enlarged by the smallest whole factor that reaches it, with nearest
    neighbour, so a reader sees the pixels that the model drew. The file appears whole or not at all. ValueError where
    the counts do not fit.
    """
    count, height, width, channels = images.shape
    if images.dtype != np.uint8 or channels != 3 or count == 0 or count % columns:
        raise ValueError(f"a grid of {columns} columns needs uint8 [R * {columns}, H, W, 3], not {images.shape}")
    rows = count // columns
    if captions is not None and len(captions) != rows:
        raise ValueError(f"{rows} rows need {rows} captions, not {len(captions)}")
    scale = max(1, -(-min_px // min(height, width)))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = images.shape[1:3]

    total = 2 * MARGIN + columns * width + (columns - 1) * GAP
    font = ImageFont.load_default(TEXT)
    texts = [_wrap(caption, font, total - 2 * MARGIN) for caption in captions] if captions else [[]] * rows
    heads = [len(lines) * LINE + (2 if lines else 0) for lines in texts]
    spacing = MARGIN if captions else GAP
    top = MARGIN + (LINE + GAP if titles else 0)
    canvas = Image.new("RGB", (total, top + MARGIN + sum(heads) + rows * height + (rows - 1) * spacing), PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, title in enumerate(titles):
        left = MARGIN + index * (columns // len(titles)) * (width + GAP)
        draw.text((left, MARGIN), title, font=font, fill=INK)
    for row, (lines, head) in enumerate(zip(texts, heads, strict=True)):
        for index, line in enumerate(lines):
            draw.text((MARGIN, top + index * LINE), line, font=font, fill=INK)
        for column in range(columns):
            image = Image.fromarray(images[row * columns + column])
            canvas.paste(image, (MARGIN + column * (width + GAP), top + head))
        top += head + height + spacing
    with atomic(path) as temporary:
        canvas.save(temporary)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break `text` into at most CAPTION_LINES lines that fit into `width` pixels; "…" marks what was cut."""
    letter = font.getlength("abcdefghijklmnopqrstuvwxyz ") / 27
    size = max(8, int(width / letter))
    while True:
        lines = textwrap.wrap(text, size, max_lines=CAPTION_LINES, placeholder=" …") or [""]
        if size <= 8 or all(font.getlength(line) <= width for line in lines):
            return lines
        size -= 1
