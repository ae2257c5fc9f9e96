"""The format in which reward services are asked: JSON and image bytes in one body, and JSON back.

Nothing in it can run code, so it holds no pickles. A request is 8 bytes with the length of the JSON (little-endian),
the JSON, and the images' bytes one after the other:

    {"rewards": ["clip"], "prompts": [{"text": "a red circle", "metadata": {}}],
     "images": {"encoding": "png", "sizes": [1234]}}

Each image has one prompt. Images of the encoding `raw` have a height and a width instead of sizes; they are uint8 RGB,
row by row. `serving/decoding.py` reads requests.
"""

import io
import json
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from align_cluster.settings import Section
from align_cluster.types import Failure, FailureKind, Prompt, Scores

MEDIA_TYPE = "application/vnd.align-cluster.score"
JOB = "X-Align-Cluster-Job"  # the header with the name of the run that asks, by which a service counts
PREFIX = struct.Struct("<Q")  # the length of the JSON
Encoding = Literal["png", "webp", "raw"]
MAX_DETAILS = 256  # columns of one reward; the kinds here have fewer than ten, and each becomes a metric of the run
COLUMN_NAME = r"^[ -~]{1,100}$"  # printable ASCII, because it becomes the name of a metric
LINE = 300  # characters of a foreign sentence that reach a log


class WirePrompt(Section):
    """A prompt, and what rewards read beside it: GenEval's include, or the text for OCR."""

    text: str
    metadata: dict[str, Any] = {}


class Files(Section):
    """Images are sent as files; `sizes` has the number of bytes of each."""

    encoding: Literal["png", "webp"]
    sizes: Annotated[list[PositiveInt], Field(min_length=1)]


class Raw(Section):
    """Images are sent as uint8 RGB, row by row."""

    encoding: Literal["raw"]
    height: PositiveInt
    width: PositiveInt


class Head(Section):
    """The JSON of a request."""

    rewards: Annotated[list[str], Field(min_length=1)]
    prompts: Annotated[list[WirePrompt], Field(min_length=1)]
    images: Annotated[Files | Raw, Field(discriminator="encoding")]


class WireFailure(Section):
    """Says why the images at places `rows` of a request, counted from 0, have no score."""

    kind: FailureKind
    message: str
    rows: Annotated[list[NonNegativeInt], Field(min_length=1)]


class RewardScores(Section):
    """Scores by one reward: each image has one entry, which is null where it has no score; `valid` is false there.

    Without a failure, an image has no score where the reward does not judge its prompt. Details are more columns.
    """

    values: list[float | None]
    valid: list[bool]
    details: Annotated[
        dict[Annotated[str, Field(pattern=COLUMN_NAME)], list[float | None]], Field(max_length=MAX_DETAILS)
    ] = {}
    failure: WireFailure | None = None


class Answer(Section):
    """The JSON of an answer: scores by the name of the reward, and the seconds that scoring took, waiting included."""

    rewards: dict[str, RewardScores]
    seconds: float


def one_line(text: object) -> str:
    """Return what another program said as one line of at most LINE printable characters."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)[: 8 * LINE]).split())
    return line if len(line) <= LINE else f"{line[: LINE - 1]}…"


def encode_image(image: np.ndarray, encoding: Literal["png", "webp"]) -> bytes:
    """Return the file of an image uint8 [H, W, 3], without loss."""
    buffer = io.BytesIO()
    settings = {"compress_level": 1} if encoding == "png" else {"lossless": True, "method": 0}
    Image.fromarray(image).save(buffer, encoding, **settings)
    return buffer.getvalue()


def encode_request(rewards: Sequence[str], images: np.ndarray, prompts: Sequence[Prompt], encoding: Encoding) -> bytes:
    """Return the body of a request to score images uint8 [B, H, W, 3] with one prompt each."""
    if encoding == "raw":
        files = [np.ascontiguousarray(images).tobytes()]
        described = {"height": images.shape[1], "width": images.shape[2]}
    else:
        files = [encode_image(image, encoding) for image in images]
        described = {"sizes": [len(file) for file in files]}
    head = {
        "rewards": list(rewards),
        "prompts": [{"text": prompt.text, "metadata": prompt.metadata} for prompt in prompts],
        "images": {"encoding": encoding, **described},
    }
    text = json.dumps(head, allow_nan=False).encode()
    return b"".join([PREFIX.pack(len(text)), text, *files])


def encode_answer(scores: Scores, seconds: float) -> Answer:
    """Return scores as an answer; the numbers keep every bit, and undefined ones become null."""
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
            failure=failure and WireFailure(kind=failure.kind, message=failure.message, rows=list(failure.rows)),
        )
    return Answer(rewards=rewards, seconds=seconds)


def decode_answer(body: bytes, count: int) -> Scores:
    """Return the scores of the `count` images of a request. ValueError says why the body is no answer to it."""
    try:
        answer = Answer.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))[:100]}: {first['msg']}") from None
    values, valid, failures, details = {}, {}, {}, {}
    for name, part in answer.rewards.items():
        columns = {"values": part.values, "valid": part.valid, **part.details}
        wrong = next((column for column, found in columns.items() if len(found) != count), None)
        if wrong:
            raise ValueError(f"{name}.{wrong} has {len(columns[wrong])} entries for {count} images")
        values[name], valid[name] = np.array(part.values, np.float64), np.array(part.valid, bool)
        if np.isnan(values[name][valid[name]]).any():
            raise ValueError(f"{name} has valid images without a value")
        details |= {f"{name}/{detail}": np.array(column, np.float64) for detail, column in part.details.items()}
        if part.failure:
            rows = sorted(set(part.failure.rows))
            if rows[-1] >= count or valid[name][rows].any():
                raise ValueError(f"{name}.failure names rows that are none of the {count} images, or that have a score")
            failures[name] = Failure(part.failure.kind, one_line(part.failure.message), tuple(rows))
    return Scores(values, valid, failures, details, dict.fromkeys(values, answer.seconds))


def _nulls(column: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in column]
