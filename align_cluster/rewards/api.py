"""The HTTP side of a reward service: who may ask, how much, and what a refusal says. Needs the extra `serve`."""

import asyncio
import hashlib
import hmac
import json
import time
from typing import Annotated, Protocol

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest

from align_cluster import __version__
from align_cluster.rewards.failure import classify
from align_cluster.rewards.mix import beside
from align_cluster.rewards.wire import MEDIA_TYPE, Answer, Head, Limits, WireError, decode_request, encode_answer
from align_cluster.types import Failure, Prompt, Scores

PICKLE = (
    "this looks like a pickle, which is refused because unpickling runs whatever code its sender put there; "
    f"send JSON and image bytes as {MEDIA_TYPE} (align_cluster.rewards.client.RewardClient does)"
)
ABOUT = f"""Scores images with reward models. A body is of type `{MEDIA_TYPE}`: 8 bytes with the length of the JSON
(little-endian), the JSON, and the bytes of the images one after the other. Every refusal has a sentence
in `detail`. Scores that failed are null, with the reason in `failure`."""
SCHEMA = json.dumps(Head.model_json_schema(), indent=1)
REFUSALS = {
    401: "no token, or a wrong one",
    408: "the body did not arrive in time",
    413: "over a limit",
    415: "not this format",
    422: "malformed, or an unknown reward",
    429: "too many requests at once",
}


class Backend(Protocol):
    """What computes. `score` raises what went wrong."""

    async def score(self, reward: str, images: np.ndarray, prompts: list[Prompt]) -> Scores: ...

    async def unready(self) -> list[str]:
        """Names of rewards that cannot be scored with now."""


class Metrics:
    """Counters of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made = {"registry": self.registry, "namespace": "align_cluster"}
        self.requests = Counter("requests", "requests to score by HTTP status", ["status"], **made)
        self.images = Counter("images", "images scored by reward", ["reward"], **made)
        self.failures = Counter("failures", "images without a score, by reward and kind", ["reward", "kind"], **made)
        self.seconds = Histogram("request_seconds", "whole requests to score", **made)
        self.reward_seconds = Histogram("reward_seconds", "one reward, waiting included", ["reward"], **made)


def create_app(limits: Limits, described: list[dict[str, object]], token: bytes | None, backend: Backend) -> FastAPI:
    """The app for rewards `described` by name, kind and so on. `token` is the SHA-256 of the bearer token, if any."""
    app = FastAPI(title="align_cluster rewards", version=__version__, description=ABOUT)
    room = asyncio.Semaphore(limits.concurrency)
    metrics, names = Metrics(), [str(reward["name"]) for reward in described]

    def authorize(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]) -> None:
        if token is None:
            return
        digest = hashlib.sha256(given.credentials.encode() if given else b"").digest()
        if not hmac.compare_digest(digest, token):
            metrics.requests.labels("401").inc()
            raise HTTPException(
                401, "give the service's token as `Authorization: Bearer TOKEN`", {"WWW-Authenticate": "Bearer"}
            )

    async def scored(reward: str, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        started = time.perf_counter()
        try:
            scores = await asyncio.wait_for(backend.score(reward, images, prompts), limits.score_timeout_s)
        except asyncio.TimeoutError:
            scores = _nothing(
                reward, images, Failure("timeout", f"no score in {limits.score_timeout_s:g} s", len(images))
            )
        except Exception as error:
            scores = _nothing(reward, images, Failure(classify(error), str(error)[:500], len(images)))
        metrics.reward_seconds.labels(reward).observe(time.perf_counter() - started)
        failed = 0
        if failure := scores.failures.get(reward):
            metrics.failures.labels(reward, failure.kind).inc(failure.images)
            failed = failure.images
        metrics.images.labels(reward).inc(len(images) - failed)
        return scores

    async def answer(request: Request) -> Answer:
        body = await _body(request, limits)
        wanted, images, prompts = await asyncio.to_thread(decode_request, body, limits)
        missing = [name for name in wanted if name not in names]
        if missing:
            raise WireError(422, f"there is no reward {missing[0][:80]!r} here; this service has {', '.join(names)}")
        started = time.perf_counter()
        parts = await asyncio.gather(*(scored(reward, images, prompts) for reward in wanted))
        return encode_answer(beside(parts, wanted), time.perf_counter() - started)

    @app.post(
        "/v1/score",
        response_model=Answer,
        dependencies=[Depends(authorize)],
        responses={status: {"description": reason} for status, reason in REFUSALS.items()},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
                "description": f"8 bytes, JSON, images. The JSON's schema:\n```json\n{SCHEMA}\n```",
            }
        },
    )
    async def score(request: Request) -> Response:
        """Score images with one reward or several."""
        started, status = time.perf_counter(), 500
        try:
            if room.locked():
                raise WireError(429, f"{limits.concurrency} requests are in work, which is the most; try again soon")
            async with room:
                text = (await answer(request)).model_dump_json()
            status = 200
            return Response(text, media_type="application/json")
        except WireError as error:
            status = error.status
            raise HTTPException(status, str(error), {"Retry-After": "1"} if status == 429 else None) from None
        finally:
            metrics.requests.labels(str(status)).inc()
            metrics.seconds.observe(time.perf_counter() - started)

    @app.get("/v1/rewards", dependencies=[Depends(authorize)], responses={401: {"description": REFUSALS[401]}})
    async def rewards() -> dict[str, object]:
        """The rewards here: names, kinds, inputs and versions; and what a request may hold."""
        return {"rewards": described, "limits": limits.model_dump(), "version": __version__}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """200 while the service answers at all."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "some reward cannot be scored with now"}})
    async def readyz() -> dict[str, str]:
        """200 while every reward can be scored with."""
        unready = await backend.unready()
        if unready:
            raise HTTPException(503, f"not ready: {', '.join(unready)}")
        return {"status": "ready"}

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Prometheus text."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, if it is of the right type and not too large, and arrives in time."""
    try:
        return await asyncio.wait_for(_read(request, limits), limits.body_timeout_s)
    except asyncio.TimeoutError:
        raise WireError(408, f"the body did not arrive within {limits.body_timeout_s:g} s") from None


async def _read(request: Request, limits: Limits) -> bytes:
    right_type = request.headers.get("content-type", "").partition(";")[0].strip().lower() == MEDIA_TYPE
    announced = request.headers.get("content-length", "0")
    body = bytearray()
    if right_type and announced.isdecimal() and int(announced) > limits.body_bytes:
        raise WireError(413, f"the body has {announced} bytes, and this service takes at most {limits.body_bytes}")
    async for chunk in request.stream():
        body += chunk
        if not right_type and len(body) > 1:
            break
        if len(body) > limits.body_bytes:
            raise WireError(413, f"the body has more than {limits.body_bytes} bytes, the most that this service takes")
    if right_type:
        return bytes(body)
    if "pickle" in request.headers.get("content-type", "") or (body[:1] == b"\x80" and body[1:2] <= b"\x05"):
        raise WireError(415, PICKLE)
    raise WireError(415, f"send {MEDIA_TYPE}: 8 bytes with the length of the JSON, the JSON, and the images; see /docs")


def _nothing(reward: str, images: np.ndarray, failure: Failure) -> Scores:
    count = len(images)
    return Scores({reward: np.full(count, np.nan)}, {reward: np.zeros(count, bool)}, {reward: failure})
