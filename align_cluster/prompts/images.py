"""Prompts that each come with a real image: a folder of captioned pictures."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field

from align_cluster.errors import UserError
from align_cluster.plain import json_value
from align_cluster.prompts.base import PromptSource
from align_cluster.settings import Root, Section
from align_cluster.texts import fault, lines, read_text
from align_cluster.types import Prompt

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTIONS = "metadata.jsonl"


@dataclass(frozen=True)
class Survey:
    """Lists what a folder holds: (image, caption) pairs in the order of file names, and the unusable images."""

    pairs: tuple[tuple[Path, str], ...]
    uncaptioned: tuple[Path, ...]
    unreadable: tuple[Path, ...]


class ImagePrompts(PromptSource):
    """Takes image captions as prompts; the metadata of each prompt say where its `image` is.

    The caption of cat.jpg is in cat.txt, or in a line {"file_name": "cat.jpg", "text": "a cat"} of metadata.jsonl.
    Folders below count too; their images are called below/cat.jpg there. Images without a caption and unreadable images
    are left out, and `validate` and `train` say how many. With rollout.offline the model trains on these images.
    """

    class Config(Section):
        """Configures an image folder."""

        kind: Literal["images"] = "images"
        folder: Annotated[str, Field(min_length=1)]
        """The folder of the images and their captions, with the folders below it. Every sampler must find it under the
        same path; a submitted job does not carry it."""

        def notes(self, where: str, run: Root) -> Iterator[str]:
            """Note the images of the folder that are left out."""
            if sentence := left_out(self.folder):
                yield sentence

    has_images = True

    def load(self) -> list[Prompt]:
        """Return one prompt an image. Raises UserError if the folder is missing or has no usable image."""
        found = survey(self.config.folder)
        if not found.pairs:
            raise UserError(
                f"{self.config.folder} has no image that can be used: {len(found.uncaptioned)} have no caption and "
                f"{len(found.unreadable)} cannot be read; write captions into text files beside the images (cat.jpg, "
                f"cat.txt) or into {CAPTIONS}"
            )
        return [Prompt(i, text, {"image": str(path)}) for i, (path, text) in enumerate(found.pairs)]


def left_out(folder: str) -> str | None:
    """Describe the images of a folder that are not used in one sentence, or return None if all are used."""
    found = survey(folder)
    parts = [
        f"{len(paths)} {what}, such as {paths[0].relative_to(Path(folder).expanduser())}"
        for paths, what in ((found.uncaptioned, "without a caption"), (found.unreadable, "that cannot be read"))
        if paths
    ]
    total = len(found.pairs) + len(found.uncaptioned) + len(found.unreadable)
    return f"{folder}: of {total} images are left out {' and '.join(parts)}" if parts else None


@lru_cache(maxsize=8)
def survey(folder: str) -> Survey:
    """Read a folder and those below it, once a process. Every image is decoded, since an intact header does not prove
    an intact file. Names that begin with a dot are no images.

    Raises UserError if the folder does not exist.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"prompts.folder is {folder}, which is no folder here; give one with images and captions")
    captions = _captions(root)
    listed = {path for path in root.rglob("*") if path.suffix.lower() in ENDINGS and not _hidden(root, path)}
    images = sorted(listed | {root / name for name in captions})
    for path in images:
        _inside(root, path)
    texts = [captions.get(str(path.relative_to(root))) or _beside(root, path) for path in images]
    captioned = [path for path, text in zip(images, texts, strict=True) if text]
    with ThreadPoolExecutor() as pool:
        whole = dict(zip(captioned, pool.map(_readable, captioned), strict=True))
    return Survey(
        tuple((path, text) for path, text in zip(images, texts, strict=True) if text and whole[path]),
        tuple(path for path, text in zip(images, texts, strict=True) if not text),
        tuple(path for path in captioned if not whole[path]),
    )


def _hidden(root: Path, path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _captions(root: Path) -> dict[str, str]:
    """Return the captions of metadata.jsonl by the image's path in the folder."""
    file, captions = root / CAPTIONS, {}
    if not file.exists():
        return captions
    _inside(root, file)
    for number, line in lines(read_text(file, "the captions")):
        where = f"{file}, line {number}"
        try:
            row = json_value(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, LookupError, TypeError):
            name = text = None
        if not (isinstance(name, str) and isinstance(text, str) and Path(name).name):
            raise UserError(f'{where}: write one object a line, such as {{"file_name": "cat.jpg", "text": "a cat"}}')
        if (problem := fault(name)) or (text.strip() and (problem := fault(text))):
            raise UserError(f"{where}: the text or the file_name {problem}; delete it there")
        name = str(Path(name))  # ./cat.jpg is cat.jpg
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{where}: file_name {name} leads out of the folder; name a file in it")
        if name in captions:
            raise UserError(f"{where}: {name} has a caption above already; delete one of the two")
        captions[name] = text.strip()
    return captions


def _beside(root: Path, path: Path) -> str:
    file = path.with_suffix(".txt")
    if not os.path.isfile(file):
        return ""
    text = " ".join(read_text(_inside(root, file), "the caption").split())
    if text and (problem := fault(text)):
        raise UserError(f"the caption {file} {problem}; delete it there")
    return text


def _inside(root: Path, path: Path) -> Path:
    """Return the path of something in the folder. Raises UserError where a link leads out of it."""
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(root)):
        raise UserError(f"{path} leads to {target}, out of the folder; put the file itself there")
    return path


def _readable(path: Path) -> bool:
    if not os.path.isfile(path):  # a pipe would wait for a writer
        return False
    try:
        with Image.open(path) as image:
            rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def rgb(image: Image.Image) -> Image.Image:
    """Return an opened image as 8-bit RGB. Raises ValueError for numbers that have no known white.

    Pillow cuts grey values of 16 bits at 255, which makes almost all of them white; here 65,535 is white.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits; save it with 8 or 16 bits")
    return image.convert("RGB")


def read_image(path: str, height: int, width: int) -> torch.Tensor:
    """Read an image as fp32 [3, height, width] in [0, 1], scaled to cover that size and cropped around the middle."""
    with Image.open(path) as image:
        fitted = ImageOps.fit(rgb(ImageOps.exif_transpose(image)), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255).permute(2, 0, 1)
