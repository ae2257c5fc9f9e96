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
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from align_cluster.config.base import Section
from align_cluster.rewards.image_files import decode, encode, size_of
from align_cluster.types import Failure, FailureKind, Prompt, Scores

MEDIA_TYPE = "application/vnd.align-cluster.score"
PREFIX = struct.Struct("<Q")
Encoding = Literal["png", "webp", "raw"]


class Limits(Section):
    """What a service takes. A request takes up to `body_bytes` and 3 bytes for each of `request_pixels` of memory."""

    body_bytes: PositiveInt = 128 * 2**20
    json_bytes: PositiveInt = 2**20
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
    count = len(head.prompts)
    if count > limits.images:
        raise WireError(413, f"there are {count} images, and this service takes at most {limits.images} in a request")
    for index, prompt in enumerate(head.prompts):
        if len(prompt.text) > limits.prompt_chars:
            raise WireError(
                413,
                f"prompt {index} has {len(prompt.text)} characters, and this service takes at most "
                f"{limits.prompt_chars}",
            )
    if len(set(head.rewards)) < len(head.rewards):
        raise WireError(422, "rewards names one of them twice; name each once")
    if isinstance(head.images, Raw):
        images = _raw(head.images, rest, count, limits)
    else:
        images = _files(head.images, rest, count, limits)
    return head.rewards, images, [Prompt(i, prompt.text, prompt.metadata) for i, prompt in enumerate(head.prompts)]


def _head(body: bytes, limits: Limits) -> tuple[Head, memoryview]:
    if len(body) < PREFIX.size:
        raise WireError(422, f"the body has {len(body)} bytes; it starts with 8 bytes that tell the length of its JSON")
    (length,) = PREFIX.unpack_from(body)
    if length > len(body) - PREFIX.size:
        raise WireError(
            422, f"the body says that its JSON has {length} bytes, and only {len(body) - PREFIX.size} follow"
        )
    if length > limits.json_bytes:
        raise WireError(413, f"the JSON has {length} bytes, and this service takes at most {limits.json_bytes}")
    view = memoryview(body)
    text = bytes(view[PREFIX.size : PREFIX.size + length])
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()  # no NaN, infinity or half of a surrogate pair
    except UnicodeDecodeError:
        raise WireError(422, "the JSON is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise WireError(422, f"the JSON cannot be read: {str(error)[:200]}") from None
    try:
        return Head.model_validate(data, strict=True), view[PREFIX.size + length :]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:100] or "the JSON"
        raise WireError(
            415 if first["type"] == "union_tag_invalid" else 422, f"{where}: {first['msg'][:300]}"
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _check_pixels(count: int, width: int, height: int, limits: Limits) -> None:
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


def _raw(images: Raw, rest: memoryview, count: int, limits: Limits) -> np.ndarray:
    _check_pixels(count, images.width, images.height, limits)
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
    files, start = [], 0
    for size in images.sizes:
        files.append(bytes(rest[start : start + size]))
        start += size
    sizes = []
    for index, file in enumerate(files):
        try:
            sizes.append(size_of(file, images.encoding))
        except ValueError as error:
            raise WireError(422, f"image {index}: {error}") from None
        _check_pixels(count, *sizes[-1], limits)
        if sizes[-1] != sizes[0]:
            raise WireError(
                422,
                f"image {index} has {sizes[-1][0]} x {sizes[-1][1]} pixels, image 0 {sizes[0][0]} x {sizes[0][1]}; "
                "send images of one size in a request",
            )
    width, height = sizes[0]
    pixels = np.empty((count, height, width, 3), np.uint8)
    for index, file in enumerate(files):
        try:
            pixels[index] = decode(file, images.encoding, sizes[0])
        except ValueError as error:
            raise WireError(422, f"image {index}: {error}") from None
    return pixels


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
    return Scores(values, valid, failures, details, answer.seconds)


def _nulls(column: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in column]


def _nans(column: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in column], np.float64)
