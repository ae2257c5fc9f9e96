"""Requests of many callers as full batches for one worker."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from align_cluster.rewards.mix import concatenate
from align_cluster.types import Prompt, Scores

Part = tuple[np.ndarray, list[Prompt]]  # images and one prompt each
Score = Callable[[np.ndarray, list[Prompt]], Scores]


class Scorer(Protocol):
    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores: ...


@dataclass(frozen=True)
class _Job:
    images: np.ndarray
    prompts: list[Prompt]
    done: asyncio.Future


class MicroBatcher:
    """Scores up to `batch` images at a time, of as many requests as wait. Nobody waits for others to come.

    The worker is made, and always used, in one thread of its own: torch's number of threads belongs to the thread that
    sets it. Only images of one size are scored together. Where a batch of several requests has a failure, each request
    is scored again alone, so that none pays for another.
    """

    def __init__(self, make_worker: Callable[[], Scorer], batch: int) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.worker = self.thread.submit(make_worker).result()
        self.batch = batch
        self.waiting: deque[_Job] = deque()
        self.task: asyncio.Task | None = None

    async def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        loop = asyncio.get_running_loop()
        starts = range(0, len(images), self.batch)
        jobs = [
            _Job(images[start : start + self.batch], prompts[start : start + self.batch], loop.create_future())
            for start in starts
        ]
        self.waiting += jobs
        if self.task is None or self.task.done():
            self.task = loop.create_task(self._work())
        return concatenate(await asyncio.gather(*(job.done for job in jobs)))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while jobs := self._next():
            results = await loop.run_in_executor(self.thread, self._score, jobs)
            for job, result in zip(jobs, results, strict=True):
                if job.done.done():
                    continue  # its caller has gone
                if isinstance(result, Exception):
                    job.done.set_exception(result)
                else:
                    job.done.set_result(result)

    def _next(self) -> list[_Job]:
        """The oldest job and others of its image size that fit beside it."""
        chosen: list[_Job] = []
        left: deque[_Job] = deque()
        count = 0
        for job in self.waiting:
            if job.done.done():
                continue
            same = not chosen or job.images.shape[1:] == chosen[0].images.shape[1:]
            if same and count + len(job.images) <= self.batch:
                chosen.append(job)
                count += len(job.images)
            else:
                left.append(job)
        self.waiting = left
        return chosen

    def _score(self, jobs: list[_Job]) -> list[Scores | Exception]:
        """What comes of each job."""
        parts = [(job.images, job.prompts) for job in jobs]
        try:
            return score_together(self.worker.score, parts)
        except Exception as error:
            return [error] if len(jobs) == 1 else [result for job in jobs for result in self._score([job])]


def score_together(score: Score, parts: Sequence[Part]) -> list[Scores]:
    """Scores of each part, from one batch of them all. If something in it fails, each part is scored again alone, so
    that none pays for another."""
    if len(parts) == 1:
        return [score(*parts[0])]
    together = score(np.concatenate([images for images, _ in parts]), [p for _, prompts in parts for p in prompts])
    if together.failures:
        return [score(images, prompts) for images, prompts in parts]
    ends = np.cumsum([len(images) for images, _ in parts])
    return [_rows(together, end - len(images), end) for (images, _), end in zip(parts, ends, strict=True)]


def _rows(scores: Scores, start: int, end: int) -> Scores:
    columns = {
        part: {name: column[start:end] for name, column in getattr(scores, part).items()}
        for part in ("values", "valid", "details")
    }
    share = (end - start) / len(next(iter(scores.valid.values())))
    return replace(scores, **columns, seconds={name: share * spent for name, spent in scores.seconds.items()})
