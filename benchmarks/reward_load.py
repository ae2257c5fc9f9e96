"""The load of reward_service.py: a model, images, those who ask for scores, and what to make of their answers.

Nothing here needs Ray: the bare model and the clients run in processes of their own (`process`).
"""

import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any, get_args

import numpy as np
import torch

from align_cluster.embedded import scene
from align_cluster.pretraining.networks import new_tokenizer
from align_cluster.rewards.base import RewardError
from align_cluster.rewards.clip_score import ClipScore
from align_cluster.rewards.http import RewardClient
from align_cluster.rewards.wire import Encoding, encode_request
from align_cluster.serving.config import Limits
from align_cluster.serving.decoding import decode_request
from align_cluster.types import Prompt

SIDE, IMAGES = 512, 32
BATCH, REQUEST = 16, 4  # images that the model scores at once; images in a request, which share a prompt
TEXTS = [record["prompt"] for record in scene.prompts("position", "held_out")[: IMAGES // REQUEST]]
NICENESS = 15  # Ray's worker_niceness, or others on the machine would slow its workers only
WINDOW_S, TICK_S = 3.0, 0.1  # around a kill: a p95 is of the requests of the last 3 s, and is taken ten times a second


@dataclass(frozen=True)
class Asked:
    """A request: when it was due, the seconds until its answer, and its scores or what went wrong."""

    due: float
    seconds: float
    values: np.ndarray | None
    error: str | None = None


@dataclass(frozen=True)
class Batch:
    """What a replica scored at once, and when."""

    images: int
    started: float
    ended: float


def process() -> ProcessPoolExecutor:
    """A process for the bare model, or for clients, of the priority that Ray gives its workers."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=os.nice, initargs=(NICENESS,))


def checkpoint(folder: str, tower: dict[str, int]) -> None:
    """A CLIP of random weights in the layout of published ones, ViT-B/32 but for what `tower` changes."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    config = CLIPConfig(text_config=tower | {"bos_token_id": 2, "eos_token_id": 3}, vision_config=tower)
    for part in (CLIPModel(config), new_tokenizer(), CLIPImageProcessorPil()):
        part.save_pretrained(folder)


@cache
def pictures() -> np.ndarray:
    """uint8 [IMAGES, SIDE, SIDE, 3]: clouds whose contrast falls with their size, some ellipses, a little grain. As PNG
    they take about 400 kB, like photographs."""
    random = torch.Generator().manual_seed(0)
    canvas = torch.full((IMAGES, 3, SIDE, SIDE), 0.5)
    for cells in (3, 6, 12, 24, 48, 96, 192):
        clouds = torch.randn(IMAGES, 3, cells, cells, generator=random)
        canvas += 0.54 / cells * torch.nn.functional.interpolate(clouds, (SIDE, SIDE), mode="bicubic")
    y, x = torch.linspace(-1, 1, SIDE)[:, None], torch.linspace(-1, 1, SIDE)
    for _ in range(5):
        middle, radius, color = (torch.rand(IMAGES, n, 1, 1, generator=random) for n in (2, 2, 3))
        across = ((x, y)[i] - 2 * middle[:, i : i + 1] + 1 for i in range(2))
        inside = sum((a / (0.1 + 0.4 * radius[:, i : i + 1])) ** 2 for i, a in enumerate(across)) < 1
        canvas += 0.7 * inside * (color - canvas)
    canvas += 0.006 * torch.randn(canvas.shape, generator=random)
    return (255 * canvas.clamp(0, 1)).byte().permute(0, 2, 3, 1).contiguous().numpy()


def piece(index: int, size: int) -> tuple[np.ndarray, list[Prompt]]:
    """Batch or request number `index` of `size` images."""
    start = index * size % IMAGES
    return pictures()[start : start + size], [Prompt(i, TEXTS[i // REQUEST]) for i in range(start, start + size)]


@cache
def bare_reward(path: str) -> ClipScore:
    torch.set_num_threads(1)
    reward = ClipScore(ClipScore.Config(path=path))
    reward.load("cpu", 1)
    return reward


def bare(path: str, batches: int) -> tuple[float, np.ndarray]:
    """Seconds for so many batches, and their scores."""
    reward, work = bare_reward(path), [piece(index, BATCH) for index in range(batches)]
    started = time.perf_counter()
    values = [reward.score(*batch).values for batch in work]
    return time.perf_counter() - started, np.concatenate(values)


@torch.no_grad()
def forwards(path: str) -> float:
    """Seconds of one batch without its preprocessing."""
    clip = bare_reward(path).clip
    pixels = torch.randn(BATCH, 3, clip.side, clip.side)
    tokens = clip.tokenizer(TEXTS[: BATCH // REQUEST], padding=True, return_tensors="pt")
    started = time.perf_counter()
    clip.model.get_image_features(pixel_values=pixels)
    clip.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return time.perf_counter() - started


def ask(client: RewardClient, index: int, size: int, due: float | None = None) -> Asked:
    images, prompts = piece(index, size)
    due = due or time.perf_counter()
    try:
        scores = client.score(["clip"], images, prompts)
    except RewardError as error:
        return Asked(due, time.perf_counter() - due, None, f"{error.kind}: {error}")
    failure = scores.failures.get("clip")
    return Asked(due, time.perf_counter() - due, scores.values["clip"], failure and failure.message)


def in_turn(url: str, clients: int, requests: int, size: int) -> list[Asked]:
    """Each client asks again as soon as it has its answer."""
    client = RewardClient(url)
    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(lambda index: ask(client, index, size), range(requests)))


def steadily(url: str, rate: float, seconds: float) -> list[Asked]:
    """Single images, `rate` a second, however long the answers take; each counts from when it was due."""
    client, asked = RewardClient(url), []
    with ThreadPoolExecutor(64) as threads:
        started = time.perf_counter()
        for index in range(int(rate * seconds)):
            due = started + index / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            asked.append(threads.submit(ask, client, index, 1, due))
    return [future.result() for future in asked]


def packing() -> dict[str, dict[str, float]]:
    """By encoding the size of an image in a request, and milliseconds to write it there and to read it."""
    found = {}
    for encoding in get_args(Encoding):
        write, read = [], []
        for index in range(IMAGES // REQUEST):
            images, prompts = piece(index, REQUEST)
            started = time.perf_counter()
            body = encode_request(["clip"], images, prompts, encoding)
            written = time.perf_counter()
            decode_request(body, Limits())
            write.append(1000 * (written - started) / REQUEST)
            read.append(1000 * (time.perf_counter() - written) / REQUEST)
        times = {"write_ms": statistics.median(write), "read_ms": statistics.median(read)}
        found[encoding] = {"kb": len(body) / REQUEST / 1000, **times}
    return found


def wrong(asked: list[Asked], expected: np.ndarray) -> list[str]:
    """What is wrong with answers: errors, and scores that are not the expected ones of IMAGES images."""
    found = []
    for index, answer in enumerate(asked):
        if answer.error:
            found.append(answer.error)
        else:
            start = index * len(answer.values) % IMAGES
            if not np.allclose(answer.values, expected[start : start + len(answer.values)], atol=1e-4):
                found.append(f"request {index} has the scores {answer.values}")
    return found


def figures(asked: list[Asked], size: int, batches: list[Batch]) -> dict[str, float]:
    """Of requests with `size` images, and of the two or more batches that one replica made of them.

    Rates count from the end of the first batch, when all is flowing. `busy` is the part of that time spent scoring.
    """
    first, rest = batches[0], batches[1:]
    wall, images = rest[-1].ended - first.ended, sum(batch.images for batch in rest)
    scoring = sum(batch.ended - batch.started for batch in rest)
    p50, p95 = np.percentile([1000 * answer.seconds for answer in asked], (50, 95))
    return {
        "requests_per_s": images / size / wall,
        "images_per_s": images / wall,
        "p50_ms": p50,
        "p95_ms": p95,
        "batch_fill": images / len(rest) / BATCH,
        "busy": scoring / wall,
        "model_ms": 1000 * scoring / images,
    }


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each way's figures; `ratio` is to the bare model of the same round."""
    for turn in rounds:
        for found in turn.values():
            found["ratio"] = found["images_per_s"] / turn["bare"]["images_per_s"]
    return {
        way: {name: statistics.median(turn[way][name] for turn in rounds) for name in rounds[0][way]}
        for way in rounds[0]
    }


def disturbance(asked: list[Asked], killed: float, lost: list[str]) -> dict[str, Any]:
    """How requests around the moment `killed` differ from those that had their answer before.

    `slow_s` is how long the p95 is above twice its normal value; `recovered` says that it no longer is at the end.
    """
    before = [answer for answer in asked if answer.due + answer.seconds < killed]
    after = [answer for answer in asked if answer.due + answer.seconds >= killed]
    p50, p95 = np.percentile([answer.seconds for answer in before], (50, 95))
    begin, end = asked[0].due + WINDOW_S, asked[-1].due
    return {
        "requests": len(asked),
        "lost": len(lost),
        "errors": lost[:5],
        "normal_p50_ms": 1000 * p50,
        "normal_p95_ms": 1000 * p95,
        "slowest_ms": 1000 * max(answer.seconds for answer in after),
        "slow_requests": sum(bool(answer.seconds > 2 * p95) for answer in after),
        "slow_s": slow_seconds(asked, 2 * p95, killed - WINDOW_S, end),
        "slow_before_s": slow_seconds(before, 2 * p95, begin, killed),
        "recovered": not slow_seconds(asked, 2 * p95, end, end + TICK_S),
    }


def slow_seconds(asked: list[Asked], limit: float, begin: float, end: float) -> float:
    """For how long the p95 of the requests of the last WINDOW_S is above `limit` seconds."""
    slow = 0
    for now in np.arange(begin, end, TICK_S):
        recent = [answer.seconds for answer in asked if now - WINDOW_S < answer.due <= now]
        slow += bool(recent) and np.percentile(recent, 95) > limit
    return TICK_S * slow
