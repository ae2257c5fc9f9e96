"""Reads requests to score within the limits of a service: it checks sizes before contents, and never unpickles.

Every refusal is an HTTPException with a sentence: 413 for what is over a limit, 415 for another format, and 422 for
what is malformed.
"""

import io
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
from fastapi import HTTPException
from PIL import Image
from pydantic import BaseModel, ValidationError

from align_cluster.plain import json_value
from align_cluster.rewards.wire import PREFIX, Head, Raw, one_line
from align_cluster.serving.config import Limits
from align_cluster.types import Prompt

ORIENTATION = 0x0112  # The EXIF tag says how to turn the image: 1, and 0 for unknown, is upright.
PNG_DEPTH = 24  # The byte of a PNG that holds its bits a channel; Pillow drops half of 16 without a word.

Model = TypeVar("Model", bound=BaseModel)


def check_limit(count: int, most: int, what: str) -> None:
    """Refuse a count above `most` with a sentence that begins with `what`."""
    if count > most:
        raise HTTPException(413, f"{what}, and this service takes at most {most}")


def decode_request(body: bytes, limits: Limits) -> tuple[list[str], np.ndarray, list[Prompt]]:
    """Return the names of rewards, images uint8 [B, H, W, 3], and their prompts."""
    rest = len(body) - PREFIX.size
    if rest < 0:
        raise HTTPException(422, f"the body has {len(body)} bytes; it starts with 8 bytes, the length of its JSON")
    (length,) = PREFIX.unpack_from(body)
    if length > rest:
        raise HTTPException(422, f"the body says that its JSON has {length} bytes, and only {rest} follow")
    check_limit(length, limits.json_bytes, f"the JSON has {length} bytes")
    data = memoryview(body)[PREFIX.size :]
    head = validated(Head, read_json(bytes(data[:length])))
    if len(set(head.rewards)) < len(head.rewards):
        raise HTTPException(422, "rewards names one of them twice; name each once")
    prompts = [Prompt(index, prompt.text, prompt.metadata) for index, prompt in enumerate(head.prompts)]
    check_prompts(prompts, limits)
    if isinstance(head.images, Raw):
        return head.rewards, _raw(head.images, data[length:], len(prompts), limits), prompts
    files = _files(head.images.sizes, data[length:], len(prompts))
    return head.rewards, decode_images(files, [head.images.encoding.upper()], limits), prompts


def _raw(images: Raw, data: memoryview, count: int, limits: Limits) -> np.ndarray:
    check_pixels(count, images.width, images.height, limits)
    shape = (count, images.height, images.width, 3)
    if len(data) != np.prod(shape):
        raise HTTPException(
            422,
            f"{len(data)} bytes follow the JSON, where uint8 {list(shape)} (one image a prompt) needs {np.prod(shape)}",
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _files(sizes: Sequence[int], data: memoryview, count: int) -> list[bytes]:
    if len(sizes) != count:
        raise HTTPException(422, f"{len(sizes)} images came with {count} prompts; give one prompt an image")
    if sum(sizes) != len(data):
        raise HTTPException(422, f"images.sizes add up to {sum(sizes)} bytes, and {len(data)} follow the JSON")
    return [bytes(data[end - size : end]) for end, size in zip(accumulate(sizes), sizes, strict=True)]


def read_json(text: bytes) -> Any:
    """Return the value of strict JSON, and refuse what is none."""
    try:
        return json_value(text)
    except ValueError as error:
        raise HTTPException(422, f"the JSON cannot be read: {one_line(error)[:200]}") from None


def validated(model: type[Model], data: Any, *, strict: bool = True) -> Model:
    """Return the data as a model. Forms, whose values are all text, need `strict=False`."""
    try:
        return model.model_validate(data, strict=strict)
    except ValidationError as error:
        first = error.errors()[0]
        where = one_line(".".join(map(str, first["loc"])))[:100] or "the JSON"
        status = 415 if first["type"] == "union_tag_invalid" else 422
        raise HTTPException(status, f"{where}: {one_line(first['msg'].removeprefix('Value error, '))}") from None


def check_prompts(prompts: Sequence[Prompt], limits: Limits) -> None:
    """Refuse too many prompts, and prompts that are too long."""
    check_limit(len(prompts), limits.images, f"there are {len(prompts)} images in the request")
    for index, prompt in enumerate(prompts):
        check_limit(len(prompt.text), limits.prompt_chars, f"prompt {index} has {len(prompt.text)} characters")


def check_pixels(count: int, width: int, height: int, limits: Limits) -> None:
    """Refuse `count` images of a size that is too large for one image, or for all together."""
    pixels = width * height
    check_limit(pixels, limits.image_pixels, f"an image has {width} x {height} pixels")
    check_limit(
        count * pixels, limits.request_pixels, f"{count} images of {width} x {height} have {count * pixels} pixels"
    )


def decode_images(files: Sequence[bytes], formats: Sequence[str], limits: Limits) -> np.ndarray:
    """Return image files of one size as uint8 [B, H, W, 3]. `formats` are the only ones that Pillow tries.

    Pillow opens a file by its header, and it decodes an image only after its size has passed the limits.
    """
    pixels: np.ndarray | None = None
    for index, file in enumerate(files):
        try:
            with Image.open(io.BytesIO(file), formats=formats) as image:
                if pixels is None:
                    check_pixels(len(files), *image.size, limits)
                    pixels = np.empty((len(files), image.height, image.width, 3), np.uint8)
                pixels[index] = _decoded(image, pixels.shape[1:3], bits=file[PNG_DEPTH] if image.format == "PNG" else 8)
        except Image.DecompressionBombError:
            raise HTTPException(413, f"image {index} has far more than {limits.image_pixels} pixels") from None
        except Image.UnidentifiedImageError:
            raise HTTPException(422, f"image {index} cannot be read as {' or '.join(formats)}") from None
        except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
            raise HTTPException(422, f"image {index} cannot be used: {one_line(error)}") from None
    return pixels


def _decoded(image: Image.Image, shape: tuple[int, int], bits: int) -> np.ndarray:
    frames = getattr(image, "n_frames", 1)
    if image.mode != "RGB" or bits != 8 or frames != 1:
        raise ValueError(f"it has {frames} frames of {bits}-bit {image.mode}; send a single one of 8-bit RGB")
    if (image.height, image.width) != shape:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, image 0 {shape[1]} x {shape[0]}; send images of one size"
        )
    pixels = np.asarray(image)
    turned = image.getexif().get(ORIENTATION, 1)
    if turned not in (0, 1):
        raise ValueError(f"it is to be turned before it is shown (EXIF orientation {turned}); send it upright")
    return pixels
