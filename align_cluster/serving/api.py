"""The routes of a reward service over HTTP. Needs the extra `serve`."""

import asyncio
import json
import time

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from align_cluster import __version__
from align_cluster.rewards.limits import Limits, WireError
from align_cluster.rewards.wire import MEDIA_TYPE, Answer, Head, decode_request, encode_answer
from align_cluster.serving import flow_grpo
from align_cluster.serving.intake import REFUSALS, Backend, Intake, Refusal

ABOUT = f"""Scores images with reward models. A body is of type `{MEDIA_TYPE}`: 8 bytes with the length of the JSON
(little-endian), the JSON, and the bytes of the images one after the other. Every refusal has a sentence
in `detail`. Scores that failed are null, with the reason in `failure`."""
WANTED = (
    f"send {MEDIA_TYPE}: 8 bytes with the length of the JSON, the JSON, and the images; see /docs, or use "
    "align_cluster.rewards.client.RewardClient"
)
BODY = {
    "required": True,
    "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
    "description": f"8 bytes, JSON, images. The JSON's schema:\n```json\n"
    f"{json.dumps(Head.model_json_schema(), indent=1)}\n```",
}


def create_app(limits: Limits, described: list[dict[str, object]], token: bytes | None, backend: Backend) -> FastAPI:
    """The app for rewards `described` by name, kind and so on. `token` is the SHA-256 of the bearer token, if any."""
    intake = Intake(limits, [str(reward["name"]) for reward in described], token, backend)
    app = FastAPI(title="align_cluster rewards", version=__version__, description=ABOUT, redirect_slashes=False)
    app.include_router(_scoring(intake))
    app.include_router(flow_grpo.router(intake))
    app.include_router(_telling(intake, described))
    return app


def _scoring(intake: Intake) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/score",
        response_model=Answer,
        dependencies=[Depends(intake.authorize)],
        responses=REFUSALS,
        openapi_extra={"requestBody": BODY},
    )
    async def score(request: Request) -> Response:
        """Score images with one reward or several."""
        async with intake.request():
            body = await intake.body(request, [MEDIA_TYPE], WANTED)
            wanted, images, prompts = await asyncio.to_thread(decode_request, body, intake.limits)
            missing = [name for name in wanted if name not in intake.names]
            if missing:
                has = ", ".join(intake.names)
                raise WireError(422, f"there is no reward {missing[0][:80]!r} here; this service has {has}")
            started = time.perf_counter()
            scores = await intake.score(wanted, images, prompts)
            answer = encode_answer(scores, time.perf_counter() - started)
            return Response(answer.model_dump_json(), media_type="application/json")

    return router


def _telling(intake: Intake, described: list[dict[str, object]]) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/v1/rewards",
        dependencies=[Depends(intake.authorize)],
        responses={status: REFUSALS[status] for status in (401, 431)},
    )
    async def rewards() -> dict[str, object]:
        """The rewards here: names, kinds, inputs and versions; and what a request may hold."""
        return {"rewards": described, "limits": intake.limits.model_dump(), "version": __version__}

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """200 while the service answers at all."""
        return {"status": "ok"}

    @router.get("/readyz", responses={503: {"model": Refusal, "description": "some reward is not ready"}})
    async def readyz() -> dict[str, str]:
        """200 while every reward can be scored with."""
        unready = await intake.backend.unready()
        if unready:
            raise HTTPException(503, f"not ready: {', '.join(unready)}")
        return {"status": "ready"}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus text."""
        return Response(generate_latest(intake.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
