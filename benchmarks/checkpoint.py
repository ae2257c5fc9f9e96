"""What a checkpoint of Stable Diffusion 3.5 Medium's LoRA costs the driver:  python benchmarks/checkpoint.py

19 million weights (rank 32) in fp32, of the trained adapter, the lagged one and the average, and Adam's two moments:
380 MB. Timed are what an update pays for its state (one rank's DeepSpeed engine, ZeRO-2; a lost rank is rebuilt from
it), the call that a step waits for, how long a second of a busy driver's own work takes meanwhile, the write, and
reading it back with every checksum.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import free_port

from align_cluster.checkpoint import CheckpointConfig
from align_cluster.checkpoint.store import Store
from align_cluster.checkpoint.writer import Job, Writer
from align_cluster.learner.engine import Engine, join
from align_cluster.learner.settings import OptimizerConfig
from align_cluster.learner.state import Snapshot
from align_cluster.loop.state import State

WEIGHTS, TENSORS = 19_000_000, 382


def snapshot() -> Snapshot:
    """Random numbers in the shape of a learner's state."""
    rng, size = np.random.default_rng(0), WEIGHTS // TENSORS
    kinds = ("adapter/default", "adapter/old", "ema", "exp_avg", "exp_avg_sq")
    arrays = {f"{kind}/{i}": rng.standard_normal(size, dtype=np.float32) for kind in kinds for i in range(TENSORS)}
    return Snapshot.of({"updates": 1, "steps": 1}, arrays)


class Adapters(torch.nn.Module):
    """Weights of an adapter, without the model."""

    def __init__(self) -> None:
        super().__init__()
        size = WEIGHTS // TENSORS
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(size)) for _ in range(TENSORS)])

    def forward(self) -> torch.Tensor:
        return torch.stack([weight.sum() for weight in self.weights]).sum()


def gather(repeat: int) -> list[float]:
    """Seconds from the end of an update to its state in one buffer."""
    port = free_port()
    join(0, 1, "127.0.0.1", port, "cpu")
    engine, seconds = Engine(Adapters(), OptimizerConfig(), 2), []
    for _ in range(repeat):
        engine.backward(engine.deepspeed(), last=True)
        engine.step(1e-4)
        began = time.perf_counter()
        _, moments = engine.moments()
        kinds = {"default": engine.trainable, "old": engine.trainable, "ema": engine.trainable} | moments
        found = {f"{kind}/{i}": value for kind, values in kinds.items() for i, value in enumerate(values)}
        Snapshot.of({"updates": 1}, {name: value.detach().numpy() for name, value in found.items()})
        seconds.append(round(time.perf_counter() - began, 2))
    return seconds


def busy(seconds: float = 0.0, rounds: int = 0) -> tuple[float, int]:
    """Python work like the driver's, for some time or so many rounds: (seconds, rounds)."""
    began, done = time.perf_counter(), 0
    while (done < rounds) if rounds else (time.perf_counter() - began < seconds):
        json.loads(json.dumps({"values": list(range(200))}))
        done += 1
    return time.perf_counter() - began, done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as a learner rank
    print(json.dumps({"state_s": gather(args.repeat)}))
    state = State(10, {}, snapshot())
    results = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = Store(folder)
        writer = Writer(store, CheckpointConfig(), print)
        for number in range(args.repeat):
            quiet, rounds = busy(seconds=1.0)
            began = time.perf_counter()
            writer.save(Job(10 + number, state.files))
            call = time.perf_counter() - began
            beside, _ = busy(rounds=rounds)
            writer.wait()
            written = time.perf_counter() - began
            began = time.perf_counter()
            found = store.newest(print)
            State.of(*found)
            read = time.perf_counter() - began
            results.append(
                {
                    "megabytes": round(state.learner.buffer.nbytes / 1e6),
                    "call_s": round(call, 4),
                    "one_second_of_work_takes_s": round(beside / quiet, 2),
                    "write_s": round(written, 2),
                    "read_s": round(read, 2),
                }
            )
            print(json.dumps(results[-1]))


if __name__ == "__main__":
    main()
