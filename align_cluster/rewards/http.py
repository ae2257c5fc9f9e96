"""A reward that a service computes, and the client that asks the service: `RewardClient(url).score(["clip"], ...)`.

Runs on other machines share the rewards of one service, which `align-cluster serve-rewards` starts.
"""

import asyncio
import math
import os
import platform
import ssl
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx2
import numpy as np
from PIL import Image
from pydantic import PositiveFloat, field_validator, model_validator
from pydantic_core import from_json

from align_cluster.errors import UserError
from align_cluster.prompts.images import rgb
from align_cluster.rewards.base import ModelSize, Result, Reward, RewardError, RewardSection
from align_cluster.rewards.wire import JOB, MAX_DETAILS, MEDIA_TYPE, Encoding, decode_answer, encode_request, one_line
from align_cluster.settings import Section
from align_cluster.types import FailureKind, Prompt, Scores

UNKNOWN = 401  # the status of a refusal for the token
STARTING = threading.Lock()  # Threads that ask for the first time at once must not start a loop each.
ANSWER_BYTES = 2**20  # of an answer without scores, which holds some sentences about each reward
SCORE_BYTES = 32 * MAX_DETAILS  # more of an answer for each image and reward: about 25 bytes a column
TOKEN_BYTES = 2**16  # A token file is no larger; a device such as /dev/zero has no end.
# The kind of a refusal by its HTTP status. Every other status is of kind "unavailable".
KINDS: dict[int, FailureKind] = dict.fromkeys((400, 413, 415, 422), "bad_input") | dict.fromkeys((408, 504), "timeout")


class Token(Section):
    """Names the place of a bearer token. Exactly one of `env` and `file` must be given."""

    env: str | None = None
    """The name of the environment variable that holds the token."""
    file: str | None = None
    """The path of a file that holds the token and nothing else."""

    @model_validator(mode="after")
    def one_source(self) -> "Token":
        """Refuse a token with two places, or with none."""
        if (self.env is None) == (self.file is None):
            raise ValueError("either env, the name of a variable, or file, a path")
        return self

    def read(self, whose: str = "") -> str:
        """Return the token. UserError says what is wrong with its place, and in the environment of `whose` process."""
        whose = whose or f"this process on {platform.node()}"
        try:
            text = os.environ.get(self.env, "") if self.env else _start_of(Path(self.file).expanduser())
        except (OSError, ValueError, RuntimeError) as error:  # also of a path with NUL, and of ~nobody
            raise UserError(
                f"token.file: {self.file} cannot be read by {whose} ({error}); put the token there"
            ) from None
        token, source = text.strip(), f"token.env: {self.env}" if self.env else f"token.file: {self.file}"
        if self.env and not token:
            raise UserError(f"{source} is not set in the environment of {whose}")
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise UserError(f"{source} holds no token; put one word of ASCII there, as `openssl rand -hex 32` prints")
        return token


def _start_of(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.read(TOKEN_BYTES)


def service_address(url: str) -> str:
    """Return the address of a service as it is. ValueError says what an address must be."""
    try:
        parts = urlsplit(url)
        whole = parts.hostname and parts.port != 0 and not (parts.query or parts.fragment or parts.username)
    except ValueError:
        whole = False
    if not whole or parts.scheme not in ("http", "https") or any(char.isspace() for char in url):
        raise ValueError("the address of a service such as http://10.0.0.5:8000")
    return url


class Unauthorized(RewardError):
    """A service refuses a token, or the lack of one."""


class RewardClient:
    """Asks the service at `url` for scores. Its errors are RewardErrors: timeout, unavailable or bad_input.

    Each request has `timeout_s` seconds from the connection to the last byte of the answer, and an answer is read up
    to a size that follows from the request. Several threads may share a client.
    """

    def __init__(
        self, url: str, token: str | None = None, *, timeout_s: float = 120, encoding: Encoding = "png", job: str = ""
    ) -> None:
        """Prepare to ask; nothing is sent. The service counts what is asked by `job`, the name of a run.

        UserError says where `url` is no address, or `timeout_s` no time.
        """
        try:
            self.url = service_address(url).rstrip("/")
        except ValueError as error:
            raise UserError(f"{url!r} is no address; it must be {error}") from None
        if not 0 < timeout_s < math.inf:
            raise UserError(f"a request cannot have {timeout_s:g} s; give it a positive number of seconds")
        self.timeout_s, self.encoding = timeout_s, encoding
        headers = {"Accept-Encoding": "identity", "Authorization": token and f"Bearer {token}", JOB: job}
        self._client = httpx2.AsyncClient(
            headers={name: value for name, value in headers.items() if value},
            # httpx2's own timeouts hold for each read and write, so a slow service could stretch them without an end.
            timeout=None,
            # A request fails when the service closes an idle connection in that moment, so each has a new one.
            limits=httpx2.Limits(max_keepalive_connections=0),
            verify=ssl.create_default_context(),
            trust_env=False,
        )

    def rewards(self) -> dict[str, dict]:
        """Return what the service offers: the kind, inputs and version of each reward by its name."""
        try:
            served = from_json(self._ask("GET", "/v1/rewards"))["rewards"]
            return {one_line(reward["name"]): dict(reward) for reward in served}
        except (ValueError, KeyError, TypeError):
            raise RewardError("unavailable", f"{self.url} is no reward service") from None

    def metadata(self, reward: str) -> dict[str, str]:
        """Return what a reward reads of a prompt beside its text, by the name of the field, with its meaning."""
        inputs = self.rewards().get(reward, {}).get("inputs")
        fields = inputs.get("metadata") if isinstance(inputs, dict) else None
        return {one_line(name): one_line(meaning) for name, meaning in dict(fields or {}).items()}

    def ready(self) -> None:
        """Return if the service can score with every reward. RewardError says why it cannot."""
        self._ask("GET", "/readyz")

    def score(self, rewards: Sequence[str], images: np.ndarray, prompts: Sequence[Prompt]) -> Scores:
        """Return the scores of images uint8 [B, H, W, 3] with one prompt each."""
        try:
            body = encode_request(rewards, images, prompts, self.encoding)
        except (ValueError, TypeError, RecursionError) as error:
            raise RewardError("bad_input", f"the request cannot be written as JSON: {error}") from None
        answer = self._ask("POST", "/v1/score", body, ANSWER_BYTES + SCORE_BYTES * len(images) * len(rewards))
        try:
            scores = decode_answer(answer, len(images))
            if set(scores.values) != set(rewards):
                raise ValueError(f"scores of {', '.join(scores.values) or 'nothing'}")
            return scores
        except ValueError as error:
            reason = one_line(error)
            raise RewardError("unavailable", f"{self.url} answered something else than scores: {reason}") from None

    def _ask(self, method: str, path: str, body: bytes | None = None, most: int = ANSWER_BYTES) -> bytes:
        with STARTING:
            loop = _event_loop(os.getpid())
        request = asyncio.run_coroutine_threadsafe(self._request(method, path, body, most), loop)
        try:
            return request.result()
        finally:
            request.cancel()  # Ends the request where the caller is interrupted, and does nothing after an answer.

    async def _request(self, method: str, path: str, body: bytes | None, most: int) -> bytes:
        try:
            response, answer = await asyncio.wait_for(self._exchange(method, path, body, most), self.timeout_s)
        except TimeoutError:
            raise RewardError("timeout", f"{self.url} did not answer within {self.timeout_s:g} s") from None
        except (OSError, httpx2.HTTPError, httpx2.InvalidURL) as error:
            reason = one_line(error) or type(error).__name__
            raise RewardError("unavailable", f"{self.url} does not answer: {reason}") from None
        if response.status_code == 200:
            return answer
        kind = KINDS.get(response.status_code, "unavailable")
        reason = one_line(_detail(answer) or response.reason_phrase)
        refusal = Unauthorized if response.status_code == UNKNOWN else RewardError
        raise refusal(kind, f"{self.url} says {response.status_code}: {reason}")

    async def _exchange(self, method: str, path: str, body: bytes | None, most: int) -> tuple[httpx2.Response, bytes]:
        answer = bytearray()
        headers = {} if body is None else {"Content-Type": MEDIA_TYPE}
        async with self._client.stream(method, self.url + path, content=body, headers=headers) as response:
            async for part in response.aiter_raw():
                answer += part
                if len(answer) > most:
                    raise httpx2.RemoteProtocolError(f"it answers with more than {most} bytes")
        return response, bytes(answer)


@cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """Return the loop of this process's requests, which runs in a thread of its own; a forked process gets another."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"reward-client-{process}", daemon=True).start()
    return loop


def _detail(answer: bytes) -> str | None:
    try:
        return str(from_json(answer)["detail"])
    except (ValueError, KeyError, TypeError):
        return None


def read_image(path: str | Path) -> np.ndarray:
    """Return an image file of any kind as uint8 RGB [H, W, 3]. UserError says why it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(rgb(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from None


class Http(Reward):
    """Sends images and prompts to a service.

    A failure there keeps its kind here, so `on_failure` treats it as if the reward ran in this process.
    """

    remote = True

    class Config(RewardSection):
        """Names a reward of a service, which `align-cluster serve-rewards` starts."""

        kind: Literal["http"] = "http"
        url: str
        """The address of the service, such as http://10.0.0.5:8000."""
        reward: str
        """The name that the reward has in the service's own file. GET /v1/rewards lists all names."""
        token: Token | None = None
        """Where the token of the service is. A variable is the driver's, which sends it to the workers (see `submit
        --env`), and a file must be there on all nodes. null sends none, which suits a service on this machine."""
        timeout_s: PositiveFloat = 60.0
        """The seconds that one request has, from the connection to the last byte of the answer. A request over them
        fails, and `on_failure` says how often it is tried again."""
        encoding: Encoding = "png"
        """How images travel, without loss in every case: as `png` or `webp` files, or `raw`, which sends more bytes and
        takes less time to pack. Choose raw on a fast network."""

        @field_validator("url")
        @classmethod
        def is_an_address(cls, url: str) -> str:
            """Refuse what is no address of a service."""
            return service_address(url)

    def model_sizes(self) -> list[ModelSize | None]:
        """Return nothing, because the service holds the models."""
        return []

    def load(self, device: str, threads: int) -> None:
        """Ask the service whether it has the reward. UserError says why it cannot be used."""
        config = self.config
        token = config.token.read() if config.token else None
        settings = {"timeout_s": config.timeout_s, "encoding": config.encoding, "job": self.job}
        self.client = RewardClient(config.url, token, **settings)
        try:
            served = self.client.rewards()
        except Unauthorized as error:
            raise UserError(f"the reward service cannot be used ({error}); give or correct its token") from None
        except RewardError as error:
            raise UserError(
                f"the reward service cannot be used ({error}); correct url, or start one with "
                "`align-cluster serve-rewards`"
            ) from None
        if config.reward not in served:
            has = one_line(", ".join(served))
            raise UserError(f"{config.url} has no reward {config.reward!r}; it has {has}")

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Result:
        """Score images uint8 [B, H, W, 3] with one prompt each, all in one request."""
        name = self.config.reward
        scores = self.client.score([name], images, prompts)
        failure = scores.failures.get(name)
        if failure and (failure.kind != "bad_input" or failure.images == len(images)):
            raise RewardError(failure.kind, failure.message)  # the service tries once, the run as its policy says
        details = {detail.removeprefix(f"{name}/"): column for detail, column in scores.details.items()}
        return Result(scores.values[name], scores.valid[name], details, failure)
