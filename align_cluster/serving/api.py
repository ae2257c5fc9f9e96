"""The HTTP side of a reward service: who may ask, how much, and the routes. Needs the extra `serve`."""

import asyncio
import hashlib
import hmac
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path as FilePath
from typing import Annotated, Protocol

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from jinja2 import Environment
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from align_cluster import __version__
from align_cluster.rewards.failure import classify
from align_cluster.rewards.mix import beside, unscored
from align_cluster.rewards.wire import JOB, MEDIA_TYPE, Answer, Head, encode_answer, one_line
from align_cluster.serving import flow_grpo
from align_cluster.serving.config import Limits
from align_cluster.serving.decoding import check_limit, decode_request
from align_cluster.types import Prompt, Scores

ABOUT = f"""Scores images with reward models. A body is of type `{MEDIA_TYPE}`: 8 bytes with the length of the JSON
(little-endian), the JSON, and the bytes of the images one after the other. Every refusal has a sentence
in `detail`. Scores that failed are null, with the reason in `failure`. /metrics counts by the job that the header
`{JOB}` names."""
NO_PICKLE = "pickles are refused, because unpickling runs whatever code their sender put there"
WANTED = (
    f"send {MEDIA_TYPE}: 8 bytes with the length of the JSON, the JSON, and the images; see /docs, or use "
    f"align_cluster.rewards.http.RewardClient; {NO_PICKLE}"
)
WANTED_OF_FLOW_GRPO = (
    f"send the same fields as {flow_grpo.JSON}, images in base64, or as {flow_grpo.FORM}; see /docs; {NO_PICKLE}"
)
BODY = {
    "required": True,
    "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
    "description": f"8 bytes, JSON, images. The JSON's schema:\n```json\n"
    f"{json.dumps(Head.model_json_schema(), indent=1)}\n```",
}
DOCS = FilePath(__file__).with_name("docs.html.j2")
HEADER_BYTES = 2**16
JOB_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")  # what a run can be called
MOST_JOBS = 100  # names that become a label: a monitoring system keeps a series for each


class Refusal(BaseModel):
    """Says in a sentence why a request is refused."""

    detail: str


REFUSALS = {
    status: {"model": Refusal, "description": reason}
    for status, reason in {
        400: "the connection closed before the whole body was there",
        401: "no token, or a wrong one",
        404: "there is no such reward",
        408: "the body did not arrive in time",
        413: "over a limit",
        415: "not this format",
        422: "malformed, or an unknown reward",
        429: "too many requests at once",
        431: "the headers are too long",
    }.items()
}


class Backend(Protocol):
    """Computes the scores."""

    async def score(self, reward: str, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] with one reward. It raises what went wrong."""

    async def unready(self) -> list[str]:
        """Return the names of the rewards that cannot score now."""


class Metrics:
    """Counts what one process does, in a registry of its own."""

    def __init__(self) -> None:
        """Register all metrics with the value 0."""
        self.registry = CollectorRegistry()
        made = {"registry": self.registry, "namespace": "align_cluster"}
        self.requests = Counter("requests", "requests to score by HTTP status", ["status", "job"], **made)
        self.images = Counter("images", "images scored by reward", ["reward", "job"], **made)
        self.failures = Counter(
            "failures", "images without a score, by reward and kind", ["reward", "kind", "job"], **made
        )
        self.jobs: set[str] = set()
        self.seconds = Histogram("request_seconds", "whole requests to score", **made)
        self.reward_seconds = Histogram("reward_seconds", "one reward, waiting included", ["reward"], **made)

    def job(self, name: str) -> str:
        """Return the label of a run: its name, "" for none, or "other" where it is no name or MOST_JOBS have come."""
        if not name or name in self.jobs:
            return name
        if len(self.jobs) >= MOST_JOBS or not JOB_NAME.fullmatch(name):
            return "other"
        self.jobs.add(name)
        return name


class Frontend:
    """Receives requests for the rewards `names` within `limits`, has them scored, and counts them.

    `token` is the SHA-256 of the bearer token; None lets everybody in.
    """

    def __init__(self, backend: Backend, names: Sequence[str], *, limits: Limits, token: bytes | None) -> None:
        """Let requests in, of which `backend` computes the scores."""
        self.backend, self.names, self.limits, self.token = backend, names, limits, token
        self.metrics = Metrics()
        self.checking: asyncio.Task[list[str]] | None = None
        self.room = asyncio.Semaphore(limits.concurrency)

    async def authorize(
        self,
        request: Request,
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        """Refuse with 401 without the token, and with 431 where the headers are too long to look for one."""
        headers = sum(len(name) + len(value) for name, value in request.headers.raw)
        if headers > HEADER_BYTES:
            self.metrics.requests.labels("431", "").inc()
            raise HTTPException(431, f"the headers have {headers} bytes; send at most {HEADER_BYTES}")
        digest = hashlib.sha256(given.credentials.encode() if given else b"").digest()
        if self.token is not None and not hmac.compare_digest(digest, self.token):
            self.metrics.requests.labels("401", "").inc()
            what = "the token that came is not the service's" if given else "no token came"
            challenge = 'Bearer error="invalid_token"' if given else "Bearer"
            raise HTTPException(
                401, f"{what}; give the service's as `Authorization: Bearer TOKEN`", {"WWW-Authenticate": challenge}
            )

    @asynccontextmanager
    async def request(self, request: Request) -> AsyncIterator[str]:
        """Hold a place for the work on one request, count it, and yield its job as the metrics name it.

        It refuses with 429 where all places are taken.
        """
        started, status, job = time.perf_counter(), 500, self.metrics.job(request.headers.get(JOB, ""))
        try:
            if self.room.locked():
                busy = f"{self.limits.concurrency} requests are in work, the most; try again soon"
                raise HTTPException(429, busy, {"Retry-After": "1"})
            async with self.room:
                yield job
            status = 200
        except HTTPException as refusal:
            status = refusal.status_code
            raise
        finally:
            self.metrics.requests.labels(str(status), job).inc()
            self.metrics.seconds.observe(time.perf_counter() - started)

    async def body(self, request: Request, *types: str, wanted: str) -> bytes:
        """Return the body of a request. It refuses other media types with `wanted`, and what is too large or late."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in types:
            raise HTTPException(415, wanted)
        most, announced = self.limits.body_bytes, request.headers.get("content-length", "0")
        check_limit(int(announced), most, f"the body has {announced} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    check_limit(len(body), most, f"the body has more than {most} bytes")
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {self.limits.body_timeout_s:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the connection closed before the whole body was there") from None
        return bytes(body)

    async def unready(self) -> list[str]:
        """Return the names of the rewards that cannot score now. All who ask meanwhile share one answer."""
        if self.checking is None or self.checking.done():
            self.checking = asyncio.create_task(self.backend.unready())
        return await asyncio.shield(self.checking)

    async def score(self, rewards: Sequence[str], images: np.ndarray, prompts: list[Prompt], job: str) -> Scores:
        """Score images uint8 [B, H, W, 3] with each reward. What goes wrong with one is a failure of that one alone."""
        return beside(await asyncio.gather(*(self._score(name, images, prompts, job) for name in rewards)), rewards)

    async def _score(self, reward: str, images: np.ndarray, prompts: list[Prompt], job: str) -> Scores:
        started, count, limit = time.perf_counter(), len(images), self.limits.score_timeout_s
        try:
            async with asyncio.timeout(limit) as timeout:
                scores = await self.backend.score(reward, images, prompts)
        except Exception as error:
            late = timeout.expired()
            kind, message = ("timeout", f"no score in {limit:g} s") if late else (classify(error), one_line(error))
            scores = unscored([reward], kind, message, count)
        self.metrics.reward_seconds.labels(reward).observe(time.perf_counter() - started)
        if failure := scores.failures.get(reward):
            self.metrics.failures.labels(reward, failure.kind, job).inc(failure.images)
            count -= failure.images
        self.metrics.images.labels(reward, job).inc(count)
        return scores


def create_app(
    backend: Backend,
    described: Sequence[dict[str, object]],
    *,
    limits: Limits,
    token: bytes | None,
    without_token: Sequence[str] = (),
) -> FastAPI:
    """Return the app for rewards that are `described` by name, kind and so on.

    `token` is as in Frontend, and `without_token` as in ServiceConfig.
    """
    frontend = Frontend(backend, [str(reward["name"]) for reward in described], limits=limits, token=token)
    app = FastAPI(
        title="align_cluster rewards",
        version=__version__,
        description=ABOUT,
        redirect_slashes=False,
        openapi_url=None,  # which leaves out FastAPI's own routes, because they ask for no token
    )
    ask = {
        "dependencies": [Depends(frontend.authorize)],
        "responses": {status: REFUSALS[status] for status in (401, 431)},
    }
    app.include_router(_scoring(frontend))
    app.include_router(_rewards(frontend, described), **ask)
    app.include_router(_health(frontend))
    app.include_router(_metrics(frontend), **({} if "metrics" in without_token else ask))
    app.include_router(_docs(app, frontend, described), **({} if "docs" in without_token else ask))
    return app


def _scoring(frontend: Frontend) -> APIRouter:
    router = APIRouter(dependencies=[Depends(frontend.authorize)])
    has = f"this service has {', '.join(frontend.names)}"

    @router.post(
        "/v1/score",
        response_model=Answer,
        responses={status: refusal for status, refusal in REFUSALS.items() if status != 404},
        openapi_extra={"requestBody": BODY},
    )
    async def score(request: Request) -> Response:
        """Score images with one reward or several."""
        async with frontend.request(request) as job:
            body = await frontend.body(request, MEDIA_TYPE, wanted=WANTED)
            rewards, images, prompts = await asyncio.to_thread(decode_request, body, frontend.limits)
            for name in rewards:
                if name not in frontend.names:
                    raise HTTPException(422, f"there is no reward {name[:80]!r} here; {has}")
            started = time.perf_counter()
            scores = await frontend.score(rewards, images, prompts, job)
            answer = encode_answer(scores, time.perf_counter() - started)
            return Response(answer.model_dump_json(), media_type="application/json")

    @router.post(
        "/v1/flow_grpo/{reward}",
        response_model=flow_grpo.FlowGrpoAnswer,
        responses=REFUSALS,
        openapi_extra={"requestBody": flow_grpo.request_schema()},
    )
    async def score_as_flow_grpo(
        reward: Annotated[str, Path(json_schema_extra={"enum": list(frontend.names)})], request: Request
    ) -> Response:
        """Score images as flow_grpo's reward servers do, without pickle."""
        async with frontend.request(request) as job:
            if reward not in frontend.names:
                raise HTTPException(404, f"there is no reward {reward[:80]!r} here; {has}")
            body = await frontend.body(request, flow_grpo.JSON, flow_grpo.FORM, wanted=WANTED_OF_FLOW_GRPO)
            content_type = request.headers["content-type"]
            images, prompts = await asyncio.to_thread(flow_grpo.decode_request, body, content_type, frontend.limits)
            scores = await frontend.score([reward], images, prompts, job)
            answer = flow_grpo.encode_scores(scores, reward, prompts)
            return Response(answer.model_dump_json(), media_type="application/json")

    return router


def _rewards(frontend: Frontend, described: Sequence[dict[str, object]]) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/rewards")
    async def rewards() -> dict[str, object]:
        """Tell the names, kinds, ranges, inputs and versions of the rewards, and what a request may hold."""
        return {"rewards": described, "limits": frontend.limits.model_dump(), "version": __version__}

    return router


def _health(frontend: Frontend) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Answer 200 while the service answers at all."""
        return {"status": "ok"}

    @router.get("/readyz", responses={503: {"model": Refusal, "description": "some reward is not ready"}})
    async def readyz() -> dict[str, str]:
        """Answer 200 while the service can score with every reward."""
        unready = await frontend.unready()
        if unready:
            raise HTTPException(503, f"not ready: {', '.join(unready)}")
        return {"status": "ready"}

    return router


def _metrics(frontend: Frontend) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Answer with the metrics as Prometheus text."""
        return Response(generate_latest(frontend.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _docs(app: FastAPI, frontend: Frontend, described: Sequence[dict[str, object]]) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(DOCS.read_text(encoding="utf-8"))

    @router.get("/openapi.json")
    async def openapi() -> dict[str, object]:
        """Answer with the OpenAPI document."""
        return app.openapi()

    @router.get("/docs")
    async def docs(request: Request) -> HTMLResponse:
        """Answer with a page about the rewards and the routes. A browser needs nothing else, and no network, for it."""
        facts = {"document": app.openapi(), "rewards": described, "limits": frontend.limits.model_dump()}
        page = template.render(facts, token=frontend.token, url=str(request.base_url).rstrip("/"))
        return HTMLResponse(page, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})

    return router
