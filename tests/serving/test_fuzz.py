"""Whatever comes over the network is taken or refused in a sentence: bodies at the service, answers at the client."""

import json
import struct
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
from fastapi import HTTPException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align_cluster.rewards.base import RewardError
from align_cluster.rewards.http import RewardClient
from align_cluster.rewards.wire import decode_answer, encode_image, encode_request, one_line
from align_cluster.serving import flow_grpo
from align_cluster.serving.config import Limits
from align_cluster.serving.decoding import decode_request
from align_cluster.types import Prompt

LIMITS = Limits(images=4, image_pixels=64, request_pixels=200, prompt_chars=20, json_bytes=2000, body_bytes=20_000)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
PROMPTS = [Prompt(0, "a"), Prompt(1, "b", {"include": [{"class": "circle", "count": 1}]})]
BODIES = [encode_request(["clip"], IMAGES, PROMPTS, encoding) for encoding in ("png", "webp", "raw")]
ANSWER = {
    "rewards": {"clip": {"values": [0.5, None], "valid": [True, False], "details": {"exact": [1, 0]}}},
    "seconds": 0.1,
}
FORM = b"".join(
    b'--b\r\nContent-Disposition: form-data; name="%s"; filename="f"\r\n\r\n%s\r\n' % part
    for part in [(b"images", encode_image(IMAGES[0], "png")), (b"prompts", b"p"), (b"meta_datas", b'{"count": 1}')]
)
EXAMPLES = settings(
    derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck)
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**18, -1, 2**64, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "\0", "a\nb", "\u202e", "png", "raw", "clip", "\x1b[2J"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def like(value: object) -> st.SearchStrategy:
    """Values of the form of `value`, in which any part may be something else, missing, or there beside others."""
    if isinstance(value, dict):
        fields = {name: like(part) for name, part in value.items()}
        whole = st.fixed_dictionaries({}, optional=fields)
        more = st.tuples(whole, values).map(lambda both: {**both[0], "x": both[1]})
        same = st.one_of(st.fixed_dictionaries(fields), whole, more)
    elif isinstance(value, list):
        same = st.tuples(*map(like, value)).map(list) | st.lists(like(value[0]) if value else values, max_size=5)
    else:
        same = st.just(value)
    return st.one_of(same, same, same, values)


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def deep(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def framed(head: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(head)) + head + rest


def damaged(bodies: list[bytes]) -> st.SearchStrategy:
    """Right bodies with some bytes changed, cut off or with more at the end."""

    def change(body: bytes, changes: list[tuple[int, bytes]], end: int, more: bytes) -> bytes:
        for at, piece in changes:
            at %= len(body)
            body = body[:at] + piece + body[at + len(piece) :]
        return body[: len(body) - end] + more

    changes = st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4)), max_size=4)
    return st.builds(change, st.sampled_from(bodies), changes, st.integers(0, 60), st.binary(max_size=20))


def head_of(body: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack_from("<Q", body)
    return json.loads(body[8 : 8 + length]), body[8 + length :]


heads = [head_of(body) for body in BODIES]
json_bodies = st.one_of(*[st.builds(framed, like(head).map(as_json), st.just(rest)) for head, rest in heads])
broken = st.one_of(st.binary(max_size=300), st.integers(1, 3000).map(deep), values.map(as_json))
scored = json_bodies | damaged(BODIES) | st.builds(framed, broken, st.binary(max_size=20)) | broken
flow_fields = {"images": ["iVBORw0KGgo="], "prompts": ["p"], "meta_datas": [{"prompt": "p"}], "only_strict": True}


def taken(decode: Callable[[], tuple[np.ndarray, list[Prompt]]]) -> None:
    """Decode a body within the limits, or refuse it in a sentence."""
    try:
        images, prompts = decode()
    except HTTPException as refusal:
        assert refusal.status_code in (413, 415, 422)
        assert refusal.detail.isprintable() and 0 < len(refusal.detail) < 600
    else:
        assert images.dtype == np.uint8 and images.shape[3] == 3 and 1 <= len(images) == len(prompts) <= LIMITS.images
        assert images[0, :, :, 0].size <= LIMITS.image_pixels and images.size <= 3 * LIMITS.request_pixels
        assert all(len(prompt.text) <= LIMITS.prompt_chars for prompt in prompts)
        json.dumps([prompt.metadata for prompt in prompts], allow_nan=False)


@EXAMPLES
@given(scored)
def test_a_body_to_score_is_decoded_or_refused_in_a_sentence(body):
    taken(lambda: decode_request(body, LIMITS)[1:])


@EXAMPLES
@given(like(flow_fields).map(as_json) | broken | damaged([as_json(flow_fields)]))
def test_flow_grpos_json_is_decoded_or_refused_in_a_sentence(body):
    taken(lambda: flow_grpo.decode_request(body, flow_grpo.JSON, LIMITS))


@EXAMPLES
@given(
    damaged([FORM + b"--b--\r\n"]).map(lambda body: body.removesuffix(b"--b--\r\n") + b"--b--\r\n"),
    st.sampled_from(["b", "b; charset=x", '"b"', ""]),
)
def test_flow_grpos_form_is_decoded_or_refused_in_a_sentence(body, boundary):
    taken(lambda: flow_grpo.decode_request(body, f"{flow_grpo.FORM}; boundary={boundary}", LIMITS))


answers = like(ANSWER).map(as_json) | damaged([as_json(ANSWER)]) | broken


@EXAMPLES
@given(answers)
def test_an_answer_is_scores_or_a_reason(body):
    try:
        scores = decode_answer(body, len(IMAGES))
    except ValueError as error:
        assert one_line(error)
    else:
        for name, valid in scores.valid.items():
            columns = [scores.values[name], *scores.details.values()]
            assert all(len(column) == len(valid) == len(IMAGES) for column in columns)
            assert np.isfinite(scores.values[name][valid]).all() and not any(map(np.isinf, np.concatenate(columns)))
        assert all(failure.message == one_line(failure.message) for failure in scores.failures.values())


@settings(EXAMPLES, max_examples=40)
@given(answers, st.sampled_from([200, 200, 201, 302, 401, 404, 422, 500, 599]))
def test_a_client_returns_scores_or_raises_one_printable_line(answering, body, status):
    answering.body, answering.status = body, status
    client = RewardClient(answering.url, timeout_s=10)
    for ask in (client.rewards, lambda: client.score(["clip"], IMAGES, PROMPTS)):
        try:
            ask()
        except RewardError as error:
            assert str(error).isprintable() and len(str(error)) < 600
        else:
            assert status == 200


class Answering:
    """An ASGI app that answers with `status` and `body`, whatever it is asked."""

    def __init__(self) -> None:
        self.status, self.body, self.url = 200, b"", ""

    async def __call__(self, scope, receive, send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"location", b"http://a")]})
        await send({"type": "http.response.body", "body": self.body})


@pytest.fixture(scope="module")
def answering(http_server):
    app = Answering()
    with http_server(app) as app.url:
        yield app
