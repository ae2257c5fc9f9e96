"""What a service takes from strangers, and why it refuses the rest: sizes first, contents after, never code."""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError

from align_cluster.rewards.image_files import Format, decode, size_of
from align_cluster.settings import Section

Model = TypeVar("Model", bound=BaseModel)


class Limits(Section):
    """What a service takes. A request takes up to twice `body_bytes` of memory, with images in base64 three times, and
    3 bytes for each of `request_pixels`."""

    body_bytes: PositiveInt = 128 * 2**20
    json_bytes: PositiveInt = Field(2**20, description="without what base64 takes in flow_grpo's requests")
    images: PositiveInt = Field(64, description="in one request")
    image_pixels: PositiveInt = 2048 * 2048
    request_pixels: PositiveInt = 2**25
    prompt_chars: PositiveInt = 4096
    concurrency: PositiveInt = Field(32, description="requests that are read or scored at once")
    body_timeout_s: PositiveFloat = Field(30.0, description="for the body to arrive")
    score_timeout_s: PositiveFloat = Field(120.0, description="for a reward to score it, waiting included")


class WireError(Exception):
    """Why a request is refused: an HTTP status (413 over a limit, 415 another format, 422 malformed) and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def read_json(text: bytes, limits: Limits, apart: str = "") -> Any:
    """Strict JSON: UTF-8, every key once, and all can be written again: no infinity, no half of a surrogate pair.

    What stands at the top under the key `apart`, such as images in base64, is not looked at and does not count.
    """
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
        rest = {key: value for key, value in data.items() if key != apart} if isinstance(data, dict) else data
        length = len(json.dumps(rest, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode())
    except UnicodeDecodeError:
        raise WireError(422, "the JSON is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise WireError(422, f"the JSON cannot be read: {str(error)[:200]}") from None
    check_json(length, limits)
    return data


def check_json(length: int, limits: Limits) -> None:
    """JSON of this many bytes is not too long."""
    if length > limits.json_bytes:
        raise WireError(413, f"the JSON has {length} bytes, and this service takes at most {limits.json_bytes}")


def validated(model: type[Model], data: Any, strict: bool = True) -> Model:
    """The data as a model; strict as JSON is, or lenient as forms must be."""
    try:
        return model.model_validate(data, strict=strict)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:100] or "the JSON"
        status = 415 if first["type"] == "union_tag_invalid" else 422
        raise WireError(status, f"{where}: {first['msg'][:300]}") from None


def check_prompts(prompts: Sequence[str], limits: Limits) -> None:
    """There are not too many, and none is too long."""
    count = len(prompts)
    if count > limits.images:
        raise WireError(413, f"there are {count} images, and this service takes at most {limits.images} in a request")
    for index, text in enumerate(prompts):
        if len(text) > limits.prompt_chars:
            raise WireError(
                413, f"prompt {index} has {len(text)} characters, and this service takes at most {limits.prompt_chars}"
            )


def check_pixels(count: int, width: int, height: int, limits: Limits) -> None:
    """`count` images of this size are not too large."""
    if width * height > limits.image_pixels:
        raise WireError(
            413, f"an image has {width} x {height} pixels, and this service takes at most {limits.image_pixels}"
        )
    if count * width * height > limits.request_pixels:
        raise WireError(
            413,
            f"{count} images of {width} x {height} have {count * width * height} pixels, and this service takes at "
            f"most {limits.request_pixels} in a request",
        )


def decode_files(files: Sequence[bytes], formats: Sequence[Format], limits: Limits) -> np.ndarray:
    """Image files of one size as uint8 [B, H, W, 3]. Sizes are read from all headers before anything is decoded."""
    first: tuple[int, int] | None = None
    for index, (file, format) in enumerate(zip(files, formats, strict=True)):
        try:
            size = size_of(file, format)
        except ValueError as error:
            raise WireError(422, f"image {index}: {error}") from None
        check_pixels(len(files), *size, limits)
        first = first or size
        if size != first:
            raise WireError(
                422,
                f"image {index} has {size[0]} x {size[1]} pixels, image 0 {first[0]} x {first[1]}; send images of one "
                "size in a request",
            )
    width, height = first
    pixels = np.empty((len(files), height, width, 3), np.uint8)
    for index, (file, format) in enumerate(zip(files, formats, strict=True)):
        try:
            pixels[index] = decode(file, format, first)
        except ValueError as error:
            raise WireError(422, f"image {index}: {error}") from None
    return pixels


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found
