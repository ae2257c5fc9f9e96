"""schemathesis asks for what the OpenAPI document promises, and for what it does not."""

import base64
import hashlib
import struct

import numpy as np
import pytest

from align_cluster.rewards.wire import MEDIA_TYPE, encode_image, encode_request
from align_cluster.serving.config import Limits
from align_cluster.types import Prompt, Scores

schemathesis = pytest.importorskip("schemathesis", reason="the extra 'dev' is not installed")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.ignored_auth,
]
PNG = encode_image(np.zeros((4, 4, 3), np.uint8), "png")
BODY = encode_request(["mean"], np.zeros((1, 4, 4, 3), np.uint8), [Prompt(0, "p")], "png")


class Backend:
    async def score(self, reward, images, prompts):
        return Scores({reward: images.mean((1, 2, 3))}, {reward: np.ones(len(images), bool)})

    async def unready(self):
        return []


@pytest.fixture(scope="module")
def document(http_server):
    from align_cluster.serving.api import create_app

    app = create_app(Backend(), [{"name": "mean"}], limits=Limits(), token=hashlib.sha256(b"secret").digest())
    with http_server(app) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json", headers={"Authorization": "Bearer secret"})


def damaged(data):
    """A right body with some bytes changed, and its end cut off or grown."""
    changes, end = data
    body = bytearray(BODY)
    for at, value in changes:
        body[at % len(body)] = value
    return bytes(body[:end])


bodies = st.one_of(
    st.just(BODY),
    st.binary(max_size=200),
    st.binary(max_size=200).map(lambda text: struct.pack("<Q", len(text)) + text),
    st.tuples(
        st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=3), st.integers(0, 2 * len(BODY))
    ).map(damaged),
)
schemathesis.openapi.media_type(MEDIA_TYPE, bodies)
# Images in base64: one that is right, one that is none, and bytes in the right alphabet.
schemathesis.openapi.format("byte", st.sampled_from([base64.b64encode(PNG).decode(), "", "AAAA"]))


POSTED = ["/v1/score", "/v1/flow_grpo/{reward}"]
READ = ["/v1/rewards", "/healthz", "/readyz", "/metrics"]


def statuses(operation, mode, examples):
    """Statuses of answers to generated requests, all checked; the same requests every time."""
    found = set()
    same = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))

    @settings(same, max_examples=examples)
    @given(case=operation.as_strategy(mode))
    def holds(case):
        answer = case.call_and_validate(headers={"Authorization": "Bearer secret"}, checks=CHECKS)
        found.add(answer.status_code)

    holds()
    return found


def test_right_and_wrong_requests_get_declared_answers_that_fit_their_schemas(document):
    for path in POSTED:
        operation = document[path]["POST"]
        assert {200, 422} <= statuses(operation, schemathesis.GenerationMode.POSITIVE, 150)
        assert {401, 422} <= statuses(operation, schemathesis.GenerationMode.NEGATIVE, 150)


def test_what_the_service_tells_fits_the_document(document):
    for path in READ:
        assert statuses(document[path]["GET"], schemathesis.GenerationMode.POSITIVE, 5) == {200}


def test_the_document_has_no_other_routes(document):
    found = {(operation.ok().path, operation.ok().method.upper()) for operation in document.get_all_operations()}
    assert found == {(path, "POST") for path in POSTED} | {(path, "GET") for path in READ}
