"""The request of flow_grpo's reward servers (github.com/yifan123/flow_grpo, flow_grpo/rewards.py) without its pickles.

The fields have the same names: images (JPEG files; PNG and WebP will do), prompts, meta_datas (GenEval's records) and
only_strict. They come as JSON with the images in base64, or as a form with one part a value and the records as JSON. So
do the answer's: scores, rewards, strict_rewards, group_rewards and group_strict_rewards, as of the GenEval server, and
outputs, as of the others.
"""

import asyncio
import base64
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import Field
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from align_cluster.rewards.image_files import encode, format_of
from align_cluster.rewards.limits import (
    Limits,
    WireError,
    check_json,
    check_prompts,
    decode_files,
    read_json,
    validated,
)
from align_cluster.rewards.wire import WireFailure, encode_answer
from align_cluster.serving.intake import REFUSALS, Intake, Refusal, media_type
from align_cluster.settings import Section
from align_cluster.types import Prompt, Scores

JSON, FORM = "application/json", "multipart/form-data"
WANTED = f"send the same fields as {JSON}, images in base64, or as {FORM}; see /docs"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OTHER_TASK = -10.0  # what flow_grpo has in a task's column for images of another one
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="

Column = list[float | None]
logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it would write a line for each broken form


class Fields(Section):
    """What comes beside the images, one of each an image. Prompts may stand in the records as `prompt` instead.

    `only_strict` spares nothing here and changes nothing: the verdicts are all of one detection.
    """

    prompts: list[str] | None = None
    meta_datas: list[dict[str, Any]] | None = None
    only_strict: bool = False


class FlowGrpoRequest(Fields):
    """The JSON of a request: with images, files in base64."""

    images: Annotated[list[Annotated[str, Field(json_schema_extra={"format": "byte"})]], Field(min_length=1)]


class FlowGrpoAnswer(Section):
    """One entry an image, null where there is no score, and then `failure` says why, or the prompt was not judged.

    `scores` and `outputs` are the values of the reward. A GenEval reward also gives `rewards` (the benchmark's verdict,
    0 or 1), `strict_rewards`, and both by task, with -10 for images of another task.
    """

    scores: Column
    outputs: Column
    rewards: Column | None
    strict_rewards: Column | None
    group_rewards: dict[str, Column] | None
    group_strict_rewards: dict[str, Column] | None
    failure: WireFailure | None


def router(intake: Intake) -> APIRouter:
    """The route, for every reward of the service."""
    routes = APIRouter()

    @routes.post(
        "/v1/flow_grpo/{reward}",
        response_model=FlowGrpoAnswer,
        dependencies=[Depends(intake.authorize)],
        responses={**REFUSALS, 404: {"model": Refusal, "description": "there is no such reward"}},
        openapi_extra={"requestBody": _documented()},
    )
    async def score(
        reward: Annotated[str, Path(json_schema_extra={"enum": list(intake.names)})], request: Request
    ) -> Response:
        """Score images as flow_grpo's reward servers do, without pickle."""
        async with intake.request():
            if reward not in intake.names:
                has = ", ".join(intake.names)
                raise WireError(404, f"there is no reward {reward[:80]!r} here; this service has {has}")
            body = await intake.body(request, (JSON, FORM), WANTED)
            form = request.headers["content-type"] if media_type(request) == FORM else None
            images, prompts = await asyncio.to_thread(decode_request, body, form, intake.limits)
            answer = encode_scores(await intake.score([reward], images, prompts), reward, prompts)
            return Response(answer.model_dump_json(), media_type=JSON)

    return routes


def _documented() -> dict[str, Any]:
    """The two kinds of body for the OpenAPI document, with an example."""
    image = base64.b64encode(encode(np.full((8, 8, 3), 128, np.uint8), "png")).decode()
    record = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}
    part, json_part = {"type": "string"}, {"type": "string", "contentMediaType": JSON}
    form = {
        "images": {"type": "array", "items": {"type": "string", "contentMediaType": "image/jpeg"}, "minItems": 1},
        "prompts": {"type": "array", "items": part},
        "meta_datas": {"type": "array", "items": json_part},
        "only_strict": {"type": "boolean"},
    }
    return {
        "required": True,
        "content": {
            JSON: {
                "schema": FlowGrpoRequest.model_json_schema(),
                "example": {"images": [image], "meta_datas": [record], "only_strict": True},
            },
            FORM: {
                "schema": {"type": "object", "properties": form, "required": ["images"], "additionalProperties": False}
            },
        },
    }


def decode_request(body: bytes, form: str | None, limits: Limits) -> tuple[np.ndarray, list[Prompt]]:
    """Images uint8 [B, H, W, 3] and their prompts. `form` is the content type of a form; without it, JSON is meant."""
    files, fields = _form(body, form, limits) if form else _json(body, limits)
    count = len(files)
    records = [{}] * count if fields.meta_datas is None else fields.meta_datas
    texts = [record.get("prompt") for record in records] if fields.prompts is None else fields.prompts
    for name, column in (("prompts", texts), ("meta_datas", records)):
        if len(column) != count:
            raise WireError(422, f"{count} images came with {len(column)} {name}; give one an image")
    if not all(isinstance(text, str) for text in texts):
        raise WireError(422, "prompts is missing, and not all meta_datas have a prompt in its place; give one an image")
    check_prompts(texts, limits)
    formats = []
    for index, file in enumerate(files):
        try:
            formats.append(format_of(file))
        except ValueError as error:
            raise WireError(422, f"image {index}: {error}") from None
    return decode_files(files, formats, limits), [
        Prompt(index, *pair) for index, pair in enumerate(zip(texts, records, strict=True))
    ]


def encode_scores(scores: Scores, reward: str, prompts: Sequence[Prompt]) -> FlowGrpoAnswer:
    """The answer with the scores of one reward."""
    part = encode_answer(scores, 0.0).rewards[reward]
    verdicts, strict = (part.details.get(name) for name in ("accuracy", "strict"))
    return FlowGrpoAnswer(
        scores=part.values,
        outputs=part.values,
        rewards=verdicts,
        strict_rewards=strict,
        group_rewards=_by_task(verdicts, prompts),
        group_strict_rewards=_by_task(strict, prompts),
        failure=part.failure,
    )


def _by_task(column: Column | None, prompts: Sequence[Prompt]) -> dict[str, Column] | None:
    if column is None:
        return None
    pairs = list(zip(column, prompts, strict=True))
    return {task: [value if prompt.task == task else OTHER_TASK for value, prompt in pairs] for task in TASKS}


def _json(body: bytes, limits: Limits) -> tuple[list[bytes], Fields]:
    check_json(len(body.translate(None, BASE64)), limits)  # what remains tells how many values there are at most
    request = validated(FlowGrpoRequest, read_json(body, limits, apart="images"))
    files = []
    for index, text in enumerate(request.images):
        try:
            files.append(base64.b64decode(text, validate=True))
        except ValueError as error:
            raise WireError(422, f"images.{index}: it is no base64 ({error})") from None
    return files, request


def _form(body: bytes, content_type: str, limits: Limits) -> tuple[list[bytes], Fields]:
    found = defaultdict(list)
    for name, content in _parts(body, content_type, most=3 * limits.images + 1):
        found[name].append(bytes(content))
    files = found.pop("images", [])
    if not files:
        raise WireError(422, "the form has no part named images; give each image one")
    check_json(sum(len(content) for contents in found.values() for content in contents), limits)
    fields: dict[str, Any] = {}
    for name, contents in found.items():
        if name == "meta_datas":
            fields[name] = [read_json(content, limits) for content in contents]
            continue
        try:
            texts = [content.decode("utf-8") for content in contents]
        except UnicodeDecodeError:
            raise WireError(422, f"{name[:80]} is not UTF-8") from None
        fields[name] = texts if name == "prompts" or len(texts) > 1 else texts[0]
    return files, validated(Fields, fields, strict=False)


def _parts(body: bytes, content_type: str, most: int) -> list[tuple[str, bytearray]]:
    """Names and contents of a form's parts."""
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    line = b"--" + boundary
    if not boundary or not body[-len(line) - 6 :].rstrip(b"\r\n").endswith(line + b"--"):
        raise WireError(422, "the form does not end with the boundary that its content type names; it may be cut off")
    if body.count(line) > most + 1:
        raise WireError(413, f"the form has {body.count(line) - 1} parts, and this service takes at most {most}")
    names: list[str] = []
    contents: list[bytearray] = []
    header, value = bytearray(), bytearray()

    def begin() -> None:
        names.append("")
        contents.append(bytearray())

    def end_of_header() -> None:
        if header.lower() == b"content-disposition":
            names[-1] = parse_options_header(bytes(value))[1].get(b"name", b"").decode("utf-8", "replace")
        header.clear()
        value.clear()

    callbacks = {
        "on_part_begin": begin,
        "on_header_field": lambda data, start, end: header.extend(data[start:end]),
        "on_header_value": lambda data, start, end: value.extend(data[start:end]),
        "on_header_end": end_of_header,
        "on_part_data": lambda data, start, end: contents[-1].extend(data[start:end]),
    }
    try:
        MultipartParser(boundary, callbacks).write(body)
    except FormParserError as error:
        raise WireError(422, f"the form cannot be read: {error}") from None
    return list(zip(names, contents, strict=True))
