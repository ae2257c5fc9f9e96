"""The request of flow_grpo's reward servers (github.com/yifan123/flow_grpo, flow_grpo/rewards.py) without its pickles.

The fields have the same names: images (JPEG, PNG or WebP files), prompts, meta_datas (GenEval's records) and
only_strict. They come as JSON with the images in base64, or as a form in which each value is a part and records are
JSON. The fields of the answer are those of the GenEval server (scores, rewards, strict_rewards, group_rewards and
group_strict_rewards), and `outputs`, which the other servers have.
"""

import base64
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import HTTPException
from pydantic import BeforeValidator, Field, WithJsonSchema
from python_multipart import multipart
from python_multipart.exceptions import FormParserError

from align_cluster.prompts.files import check_record
from align_cluster.rewards.wire import WireFailure, encode_answer, encode_image, one_line
from align_cluster.serving.config import Limits
from align_cluster.serving.decoding import check_limit, check_prompts, decode_images, read_json, validated
from align_cluster.settings import Section
from align_cluster.types import Prompt, Scores

JSON, FORM = "application/json", "multipart/form-data"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OTHER_TASK = -10.0  # flow_grpo has this in a task's column for images of another task.
FORMATS = ("JPEG", "PNG", "WEBP")
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="

Column = list[float | None]
logging.getLogger("python_multipart").setLevel(logging.ERROR)  # It would write a line for each broken form.


def _file(image: object) -> bytes:
    """Return an image of a form as it is, and one of a JSON, which is in base64, decoded."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise ValueError("it is no text")
    try:
        return base64.b64decode(image, validate=True)
    except ValueError as error:
        raise ValueError(f"it is no base64 ({error})") from None


class FlowGrpoRequest(Section):
    """The fields of a request: each image has a prompt, or a record that holds one as `prompt`, or both.

    `only_strict` changes nothing, because one detection gives all verdicts.
    """

    images: Annotated[
        list[Annotated[bytes, BeforeValidator(_file), WithJsonSchema({"type": "string", "format": "byte"})]],
        Field(min_length=1),
    ]
    prompts: list[str] | None = None
    meta_datas: list[dict[str, Any]] | None = None
    only_strict: bool = False


class FlowGrpoAnswer(Section):
    """Scores with one entry an image: null where it has no score, because `failure` says why or nothing was judged.

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


def request_schema() -> dict[str, Any]:
    """Return both kinds of body for the OpenAPI document, with an example."""
    image = base64.b64encode(encode_image(np.full((8, 8, 3), 128, np.uint8), "png")).decode()
    record = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}
    example = {"images": [image], "meta_datas": [record], "only_strict": True}
    part, json_part = {"type": "string"}, {"type": "string", "contentMediaType": JSON}
    form = {
        "images": {"type": "array", "items": {"type": "string", "contentMediaType": "image/jpeg"}, "minItems": 1},
        "prompts": {"type": "array", "items": part},
        "meta_datas": {"type": "array", "items": json_part},
        "only_strict": {"type": "boolean"},
    }
    form_schema = {"type": "object", "properties": form, "required": ["images"], "additionalProperties": False}
    return {
        "required": True,
        "content": {
            JSON: {"schema": FlowGrpoRequest.model_json_schema(), "example": example},
            FORM: {"schema": form_schema},
        },
    }


def decode_request(body: bytes, content_type: str, limits: Limits) -> tuple[np.ndarray, list[Prompt]]:
    """Return images uint8 [B, H, W, 3] and their prompts. HTTPException says why a body is refused."""
    is_form = content_type.lower().startswith(FORM)
    request = _form(body, content_type, limits) if is_form else _json(body, limits)
    count = len(request.images)
    records = [{}] * count if request.meta_datas is None else request.meta_datas
    texts = [record.get("prompt") for record in records] if request.prompts is None else request.prompts
    for name, column in (("prompts", texts), ("meta_datas", records)):
        if len(column) != count:
            raise HTTPException(422, f"{count} images came with {len(column)} {name}; give one an image")
    if not all(isinstance(text, str) for text in texts):
        raise HTTPException(422, "prompts is missing, and not all meta_datas have a prompt; give one an image")
    for index, record in enumerate(records):
        try:
            check_record(record)
        except ValueError as error:
            raise HTTPException(422, f"meta_datas.{index}.{error}") from None
    prompts = [Prompt(index, text, record) for index, (text, record) in enumerate(zip(texts, records, strict=True))]
    check_prompts(prompts, limits)
    return decode_images(request.images, FORMATS, limits), prompts


def encode_scores(scores: Scores, reward: str, prompts: Sequence[Prompt]) -> FlowGrpoAnswer:
    """Return the answer with the scores of one reward."""
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


def _json(body: bytes, limits: Limits) -> FlowGrpoRequest:
    # Every value but base64 has other characters, so this bounds how many values there are before they take memory.
    other = len(body.translate(None, BASE64))
    check_limit(other, limits.json_bytes, f"the JSON has {other} bytes beside base64")
    request = validated(FlowGrpoRequest, read_json(body))
    rest = len(body) - sum(4 * math.ceil(len(file) / 3) for file in request.images)  # 4 characters for 3 bytes
    check_limit(rest, limits.json_bytes, f"the JSON has {rest} bytes beside images")
    return request


def _form(body: bytes, content_type: str, limits: Limits) -> FlowGrpoRequest:
    parts = _parts(body, content_type, most=3 * limits.images + 1)
    rest = sum(len(content) for name, contents in parts.items() if name != "images" for content in contents)
    check_limit(rest, limits.json_bytes, f"the JSON has {rest} bytes beside images")
    fields: dict[str, Any] = dict(parts)
    if "meta_datas" in fields:
        fields["meta_datas"] = [read_json(content) for content in fields["meta_datas"]]
    if len(fields.get("only_strict", ())) == 1:
        (fields["only_strict"],) = fields["only_strict"]
    return validated(FlowGrpoRequest, fields, strict=False)


def _parts(body: bytes, content_type: str, most: int) -> dict[str, list[bytes]]:
    """Return the contents of a form's parts by their names."""
    boundary = multipart.parse_options_header(content_type)[1].get(b"boundary", b"")
    line = b"--" + boundary
    if not boundary or not body[-len(line) - 6 :].rstrip(b"\r\n").endswith(line + b"--"):
        raise HTTPException(422, "the form does not end with the boundary of its content type; it may be cut off")
    check_limit(body.count(line) - 1, most, f"the form has {body.count(line) - 1} parts")
    parts: dict[str, list[bytes]] = defaultdict(list)

    def add(name: bytes, content: bytes) -> None:
        parts[name.decode("utf-8", "replace")].append(content)

    def add_file(file: multipart.File) -> None:
        file.file_object.seek(0)
        add(file.field_name, file.file_object.read())

    def add_field(field: multipart.Field) -> None:
        add(field.field_name, field.value)

    in_memory = {"MAX_MEMORY_FILE_SIZE": len(body)}
    try:
        multipart.FormParser(FORM, add_field, add_file, boundary=boundary, config=in_memory).write(body)
    except FormParserError as error:
        raise HTTPException(422, f"the form cannot be read: {one_line(error)}") from None
    return parts
