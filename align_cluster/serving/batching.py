"""Makes full batches for one worker from the requests of many callers."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from align_cluster.rewards.mix import concatenate
from align_cluster.rewards.worker import RewardWorker, score_together
from align_cluster.types import Prompt, Scores


@dataclass(frozen=True, eq=False)
class _Job:
    images: np.ndarray
    prompts: list[Prompt]
    done: asyncio.Future


class MicroBatcher:
    """Scores up to `batch` images at a time, of as many requests as wait. No request waits for others to come.

    The worker is made, and always used, in one thread of its own: torch's number of threads belongs to the thread that
    sets it. Only images of one size are scored together. A failure belongs to the images that the worker names, so no
    request pays for another; where the worker itself raises, each request is scored again alone.
    """

    def __init__(self, make_worker: Callable[[], RewardWorker], batch: int) -> None:
        """Make the worker in its thread. Its errors rise here."""
        self.thread = ThreadPoolExecutor(1)
        self.worker = self.thread.submit(make_worker).result()
        self.batch = batch
        self.waiting: list[_Job] = []
        self.task: asyncio.Task | None = None

    async def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] with one prompt each. It raises what the worker raises."""
        loop = asyncio.get_running_loop()
        rows = [slice(start, start + self.batch) for start in range(0, len(images), self.batch)]
        jobs = [_Job(images[part], prompts[part], loop.create_future()) for part in rows]
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
                    continue  # Its caller has gone.
                if isinstance(result, Exception):
                    job.done.set_exception(result)
                else:
                    job.done.set_result(result)

    def _next(self) -> list[_Job]:
        """Take the oldest job, and others of its image size that fit beside it. Drop those whose caller has gone."""
        self.waiting = [job for job in self.waiting if not job.done.done()]
        chosen, count = [], 0
        for job in self.waiting:
            same = job.images.shape[1:] == self.waiting[0].images.shape[1:]
            if same and count + len(job.images) <= self.batch:
                chosen.append(job)
                count += len(job.images)
        self.waiting = [job for job in self.waiting if job not in chosen]
        return chosen

    def _score(self, jobs: list[_Job]) -> list[Scores | Exception]:
        parts = [(job.images, job.prompts) for job in jobs]
        try:
            return score_together(self.worker.score, parts)
        except Exception as error:
            return [error] if len(jobs) == 1 else [result for job in jobs for result in self._score([job])]
