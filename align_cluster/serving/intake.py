"""What all routes of a reward service share: who may ask, how much, and how it is scored and counted."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Protocol

import numpy as np
from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Histogram
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from align_cluster.rewards.failure import classify
from align_cluster.rewards.limits import Limits, WireError
from align_cluster.rewards.mix import beside, unscored
from align_cluster.types import Failure, Prompt, Scores

HEADER_BYTES = 2**16
PICKLE = "this looks like a pickle, which is refused because unpickling runs whatever code its sender put there; "


class Refusal(BaseModel):
    """Why a request is refused, in a sentence."""

    detail: str


REFUSALS = {
    status: {"model": Refusal, "description": reason}
    for status, reason in {
        400: "the connection closed before the whole body was there",
        401: "no token, or a wrong one",
        408: "the body did not arrive in time",
        413: "over a limit",
        415: "not this format",
        422: "malformed, or an unknown reward",
        429: "too many requests at once",
        431: "the headers are too long",
    }.items()
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


class Intake:
    """Lets requests for the rewards `names` in, within `limits`. `token` is the SHA-256 of the bearer token, if any."""

    def __init__(self, limits: Limits, names: Sequence[str], token: bytes | None, backend: Backend) -> None:
        self.limits, self.names, self.token, self.backend = limits, names, token, backend
        self.metrics = Metrics()
        self.room = asyncio.Semaphore(limits.concurrency)

    async def authorize(
        self,
        request: Request,
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        """A dependency of routes: 401 without the token, 431 where the headers are too long to look for one."""
        headers = sum(len(name) + len(value) for name, value in request.headers.raw)
        if headers > HEADER_BYTES:
            self.metrics.requests.labels("431").inc()
            raise HTTPException(431, f"the headers have {headers} bytes; send at most {HEADER_BYTES}")
        digest = hashlib.sha256(given.credentials.encode() if given else b"").digest()
        if self.token is not None and not hmac.compare_digest(digest, self.token):
            self.metrics.requests.labels("401").inc()
            raise HTTPException(
                401, "give the service's token as `Authorization: Bearer TOKEN`", {"WWW-Authenticate": "Bearer"}
            )

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around the work for one request: finds room for it, counts it, and answers WireErrors."""
        started, status = time.perf_counter(), 500
        try:
            if self.room.locked():
                most = self.limits.concurrency
                raise WireError(429, f"{most} requests are in work, which is the most; try again soon")
            async with self.room:
                yield
            status = 200
        except WireError as error:
            status = error.status
            raise HTTPException(status, str(error), {"Retry-After": "1"} if status == 429 else None) from None
        finally:
            self.metrics.requests.labels(str(status)).inc()
            self.metrics.seconds.observe(time.perf_counter() - started)

    async def body(self, request: Request, types: Collection[str], wanted: str) -> bytes:
        """The body, if it is of one of the media types and not too large, and arrives in time.

        What else comes is refused in a sentence that ends with `wanted`, the advice what to send instead.
        """
        given = media_type(request)
        try:
            return await asyncio.wait_for(self._read(request, given in types, wanted), self.limits.body_timeout_s)
        except asyncio.TimeoutError:
            raise WireError(408, f"the body did not arrive within {self.limits.body_timeout_s:g} s") from None
        except ClientDisconnect:
            raise WireError(400, "the connection closed before the whole body was there") from None

    async def _read(self, request: Request, right_type: bool, wanted: str) -> bytes:
        most, announced = self.limits.body_bytes, request.headers.get("content-length", "0")
        if right_type and announced.isdecimal() and int(announced) > most:
            raise WireError(413, f"the body has {announced} bytes, and this service takes at most {most}")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if not right_type and len(body) > 1:
                break
            if len(body) > most:
                raise WireError(413, f"the body has more than {most} bytes, the most that this service takes")
        if right_type:
            return bytes(body)
        pickled = "pickle" in media_type(request) or (body[:1] == b"\x80" and body[1:2] <= b"\x05")
        raise WireError(415, f"{PICKLE if pickled else ''}{wanted}")

    async def score(self, rewards: Sequence[str], images: np.ndarray, prompts: list[Prompt]) -> Scores:
        """Scores of uint8 [B, H, W, 3] by each reward. What goes wrong with one is its failure and no other's."""
        return beside(await asyncio.gather(*(self._score(name, images, prompts) for name in rewards)), rewards)

    async def _score(self, reward: str, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        started, count, limit = time.perf_counter(), len(images), self.limits.score_timeout_s
        try:
            scores = await asyncio.wait_for(self.backend.score(reward, images, prompts), limit)
        except asyncio.TimeoutError:
            scores = unscored([reward], Failure("timeout", f"no score in {limit:g} s", count))
        except Exception as error:
            scores = unscored([reward], Failure(classify(error), str(error)[:500], count))
        self.metrics.reward_seconds.labels(reward).observe(time.perf_counter() - started)
        failed = 0
        if failure := scores.failures.get(reward):
            self.metrics.failures.labels(reward, failure.kind).inc(failure.images)
            failed = failure.images
        self.metrics.images.labels(reward).inc(count - failed)
        return scores


def media_type(request: Request) -> str:
    """Of the body, in lower case and without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
