"""What reward services speak: JSON and image bytes in one body, JSON back. Nothing in it can run code; never pickle.

A request is 8 bytes with the length of the JSON (little-endian), the JSON, and the images' bytes one after the other:

    {"rewards": ["clip"], "prompts": [{"text": "a red circle", "metadata": {}}],
     "images": {"encoding": "png", "sizes": [1234]}}

There is one prompt an image. `raw` images have a height and a width instead of sizes: uint8 RGB, row by row. Sizes are
read from the images' headers and compared with the limits before anything is decoded.
"""

import json
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from align_cluster.rewards.image_files import encode
from align_cluster.rewards.limits import (
    Limits,
    WireError,
    check_json,
    check_pixels,
    check_prompts,
    decode_files,
    read_json,
    validated,
)
from align_cluster.settings import Section
from align_cluster.types import Failure, FailureKind, Prompt, Scores

MEDIA_TYPE = "application/vnd.align-cluster.score"
PREFIX = struct.Struct("<Q")
Encoding = Literal["png", "webp", "raw"]


class WirePrompt(Section):
    """A prompt and what rewards read beside it: GenEval's include, the text for OCR."""

    text: str
    metadata: dict[str, Any] = {}


class Files(Section):
    """Images as files, with the number of bytes of each."""

    encoding: Literal["png", "webp"]
    sizes: Annotated[list[PositiveInt], Field(min_length=1)]


class Raw(Section):
    """Images as uint8 RGB, row by row."""

    encoding: Literal["raw"]
    height: PositiveInt
    width: PositiveInt


class Head(Section):
    """The JSON of a request."""

    rewards: Annotated[list[str], Field(min_length=1)]
    prompts: Annotated[list[WirePrompt], Field(min_length=1)]
    images: Annotated[Files | Raw, Field(discriminator="encoding")]


def encode_request(rewards: Sequence[str], images: np.ndarray, prompts: Sequence[Prompt], encoding: Encoding) -> bytes:
    """The body of a request to score images uint8 [B, H, W, 3], one prompt an image. WebP is lossless."""
    if encoding == "raw":
        files = [np.ascontiguousarray(images).tobytes()]
        described = {"height": images.shape[1], "width": images.shape[2]}
    else:
        files = [encode(image, encoding) for image in images]
        described = {"sizes": [len(file) for file in files]}
    head = {
        "rewards": list(rewards),
        "prompts": [{"text": prompt.text, "metadata": prompt.metadata} for prompt in prompts],
        "images": {"encoding": encoding, **described},
    }
    text = json.dumps(head, allow_nan=False).encode()
    return b"".join([PREFIX.pack(len(text)), text, *files])


def decode_request(body: bytes, limits: Limits) -> tuple[list[str], np.ndarray, list[Prompt]]:
    """Rewards asked for, images uint8 [B, H, W, 3] and their prompts. WireError says why a body is refused."""
    if len(body) > limits.body_bytes:
        raise WireError(413, f"the body has {len(body)} bytes, and this service takes at most {limits.body_bytes}")
    head, rest = _head(body, limits)
    check_prompts([prompt.text for prompt in head.prompts], limits)
    if len(set(head.rewards)) < len(head.rewards):
        raise WireError(422, "rewards names one of them twice; name each once")
    images = (_raw if isinstance(head.images, Raw) else _files)(head.images, rest, len(head.prompts), limits)
    return head.rewards, images, [Prompt(i, prompt.text, prompt.metadata) for i, prompt in enumerate(head.prompts)]


def _head(body: bytes, limits: Limits) -> tuple[Head, memoryview]:
    if len(body) < PREFIX.size:
        raise WireError(422, f"the body has {len(body)} bytes; it starts with 8 bytes that tell the length of its JSON")
    (length,) = PREFIX.unpack_from(body)
    if length > len(body) - PREFIX.size:
        raise WireError(
            422, f"the body says that its JSON has {length} bytes, and only {len(body) - PREFIX.size} follow"
        )
    check_json(length, limits)
    view = memoryview(body)[PREFIX.size :]
    return validated(Head, read_json(bytes(view[:length]), limits)), view[length:]


def _raw(images: Raw, rest: memoryview, count: int, limits: Limits) -> np.ndarray:
    check_pixels(count, images.width, images.height, limits)
    shape = (count, images.height, images.width, 3)
    if len(rest) != np.prod(shape):
        raise WireError(
            422,
            f"{len(rest)} bytes follow the JSON, where uint8 {list(shape)} (one image a prompt) needs {np.prod(shape)}",
        )
    return np.frombuffer(rest, np.uint8).reshape(shape)


def _files(images: Files, rest: memoryview, count: int, limits: Limits) -> np.ndarray:
    if len(images.sizes) != count:
        raise WireError(422, f"{len(images.sizes)} images came with {count} prompts; give one prompt an image")
    if sum(images.sizes) != len(rest):
        raise WireError(422, f"images.sizes add up to {sum(images.sizes)} bytes, and {len(rest)} follow the JSON")
    ends = list(accumulate(images.sizes))
    files = [bytes(rest[end - size : end]) for end, size in zip(ends, images.sizes, strict=True)]
    return decode_files(files, [images.encoding] * count, limits)


class WireFailure(Section):
    """Why `images` of a request have no score."""

    kind: FailureKind
    message: str
    images: PositiveInt


class RewardScores(Section):
    """Scores by one reward, one of each an image: null where there is none, `valid` false there.

    Without a failure, an image has no score where the reward does not judge its prompt. Details are more columns.
    """

    values: list[float | None]
    valid: list[bool]
    details: dict[str, list[float | None]] = {}
    failure: WireFailure | None = None


class Answer(Section):
    """The JSON of an answer: scores by the name of the reward, and the seconds that scoring took, waiting included."""

    rewards: dict[str, RewardScores]
    seconds: float


def encode_answer(scores: Scores, seconds: float) -> Answer:
    """Scores as an answer; the numbers come out with the same bits."""
    rewards = {}
    for name, values in scores.values.items():
        failure = scores.failures.get(name)
        rewards[name] = RewardScores(
            values=_nulls(np.where(scores.valid[name], values, np.nan)),
            valid=scores.valid[name].tolist(),
            details={
                detail.removeprefix(f"{name}/"): _nulls(column)
                for detail, column in scores.details.items()
                if detail.startswith(f"{name}/")
            },
            failure=failure and WireFailure(kind=failure.kind, message=failure.message, images=failure.images),
        )
    return Answer(rewards=rewards, seconds=seconds)


def decode_answer(body: bytes, count: int) -> Scores:
    """Scores of the `count` images of a request. ValueError where the answer is not one to it."""
    answer = Answer.model_validate_json(body)
    values, valid, failures, details = {}, {}, {}, {}
    for name, part in answer.rewards.items():
        columns = {"values": part.values, "valid": part.valid, **part.details}
        wrong = next((column for column, found in columns.items() if len(found) != count), None)
        if wrong:
            raise ValueError(f"{name}.{wrong} has {len(columns[wrong])} entries for {count} images")
        values[name], valid[name] = _nans(part.values), np.array(part.valid, bool)
        if np.isnan(values[name][valid[name]]).any():
            raise ValueError(f"{name} has valid images without a value")
        details |= {f"{name}/{detail}": _nans(column) for detail, column in part.details.items()}
        if part.failure:
            failures[name] = Failure(part.failure.kind, part.failure.message, part.failure.images)
    return Scores(values, valid, failures, details, dict.fromkeys(values, answer.seconds))


def _nulls(column: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in column]


def _nans(column: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in column], np.float64)
