"""What the critic costs: its values computed by a learner's rank after a rollout or by a sampler in it, on the embedded
model, and the bytes that it adds to a learner of SD3.5-M. Run by critic.py."""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from common import free_port

from align_cluster.algorithms import ALGORITHMS
from align_cluster.backbones import BACKBONES
from align_cluster.backbones.adapters import active_adapter, add_adapters
from align_cluster.backbones.base import CRITIC
from align_cluster.backbones.critic import Critic
from align_cluster.config.load import load
from align_cluster.config.plan import derive
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import TrainingChunk
from align_cluster.learner.worker import Learner
from align_cluster.planner.fit import learner_memory
from align_cluster.planner.memory import measure
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.groups import plan_step
from align_cluster.rollouts.guidance import TextBatch
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.weights import adopt, publish

ROUNDS, CHUNKS, GROUP = 5, 4, 8
BATCHES = (1, 2, 8, 48)
MIB = 2**20


def cost() -> dict:
    torch.set_num_threads(1)
    config = load("configs/embedded_critic.yaml", [f"prompts_per_step={CHUNKS}", f"rollout.group_size={GROUP}"])
    return {"values": values(config), "batches": batches(config), "memory": memory()}


def values(config: RunConfig) -> dict:
    """Medians of paired rounds, one thread: seconds of a rollout, of its values by a learner and by a sampler, and of
    sending the critic to a sampler, which the second way takes at every step."""
    sampler, learner = Sampler(config.backbone), Learner(config.learner_setup, 0, 1, "127.0.0.1", free_port())
    with active_adapter(sampler.denoiser, "default"):
        add_adapters(sampler.backbone, sampler.denoiser, (CRITIC,))
    critic = Critic(sampler.backbone, sampler.denoiser, 1, config.algorithm.critic)
    prompts = PROMPTS[config.prompts.kind](config.prompts).load()
    chunks = plan_step(prompts, 0, 0, CHUNKS, GROUP, GROUP, 1, False)
    texts = list(dict.fromkeys(text for chunk in chunks for text in chunk.texts))
    conditions = dict(zip(texts, sampler.encode(texts), strict=True))
    steps, window = config.rollout.steps, config.window.plan(config.rollout.steps, 0, 0)
    request = DrawRequest(0, steps, config.step_kind, window=window, path=True)
    records, found = [], {"rollout": [], "learner": [], "sampler": [], "sending": []}

    def draw() -> None:
        records[:] = [sampler.draw(chunk, conditions, None, request)[2] for chunk in chunks]

    def on_learner() -> None:
        learner.values([TrainingChunk(record, conditions) for record in records])

    @torch.no_grad()
    def on_sampler() -> None:
        """What a sampler would add to its loop: each state is there as a tensor already."""
        for record, condition in zip(records, (conditions[chunk.texts[0]] for chunk in chunks), strict=True):
            text = TextBatch.build([condition] * GROUP, None, torch.device("cpu"))
            for k, x in enumerate(torch.tensor(record.before).unbind(1)):
                critic(x, torch.full((GROUP,), float(record.sigmas[k])), text.sequence, text.pooled)

    def weights() -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in learner.critic.critic.state().items()}

    def send() -> None:
        adopt(*publish(weights(), 1), critic.state())

    for _ in range(ROUNDS):
        for name, work in {"rollout": draw, "learner": on_learner, "sampler": on_sampler, "sending": send}.items():
            found[name].append(_seconds(work))
    seconds = {name: median(times) for name, times in found.items()}
    sent = sum(value.nbytes for value in weights().values())
    return {"images": CHUNKS * GROUP, "seconds": seconds, "critic_bytes": sent, "path_bytes": _path_bytes(records)}


def batches(config: RunConfig) -> list[dict]:
    """Medians of paired rounds, one thread: seconds a state of values and of training, by states read at once."""
    backbone = BACKBONES[config.backbone.kind](config.backbone)
    actor = add_adapters(backbone, backbone.load_denoiser(), ("default", CRITIC))
    critic, (tokens, width, pooled) = Critic(backbone, actor, 1, config.algorithm.critic), backbone.text_shape
    found = {size: {"values": [], "training": []} for size in BATCHES}
    for _ in range(ROUNDS):
        for size, times in found.items():
            texts = torch.randn(size, tokens, width), torch.randn(size, pooled)
            states = torch.randn(size, *backbone.latent_shape), torch.rand(size), *texts
            rounds = BATCHES[-1] // size

            @torch.no_grad()
            def read(states: tuple = states, rounds: int = rounds) -> None:
                for _ in range(rounds):
                    critic(*states)

            def learn(states: tuple = states, rounds: int = rounds) -> None:
                for _ in range(rounds):
                    critic(*states).sum().backward()

            times["values"].append(_seconds(read) / BATCHES[-1])
            times["training"].append(_seconds(learn) / BATCHES[-1])
    return [{"states": size} | {kind: median(t) for kind, t in times.items()} for size, times in found.items()]


def memory() -> list[dict]:
    """Bytes of a learner's rank for SD3.5-M with one image a micro-batch: the actor alone, and with each critic."""
    rows = []
    for features in (None, "frozen", "lora", "copy"):
        settings = ["learner.gradient_checkpointing=true", "rollout.group_size=1", "learner.micro_batch=1"]
        name = "sd35_medium_critic" if features else "sd35_medium_grpo"
        if features:
            settings.append(f"algorithm.critic.features={features}")
        else:
            settings += ["rollout.group_size=2", "rollout.chunk=1", "rollout.guidance=1"]
        config = load(f"configs/{name}.yaml", settings)
        assert features is None or ALGORITHMS["ppo"](config.algorithm).critic.features == features
        plan = derive(config, 16, 1)
        sizes = measure(plan.config, plan, "cuda")
        role = learner_memory(plan.config, plan, sizes)
        rows.append({"critic": features, "total": role.total, "trained": sizes.critic_trained})
    return rows


def cost_table(found: dict) -> str:
    values, memory = found["values"], found["memory"]
    seconds, images = values["seconds"], values["images"]
    lines = ["| values of a rollout's states | ms an image | of the rollout | beside it |", "|---|---|---|---|"]
    for name, beside in (
        ("learner", f"states travel for the update anyway ({values['path_bytes'] / images / 1024:.0f} KiB an image)"),
        (
            "sampler",
            f"the critic is sent each step ({values['critic_bytes'] / MIB:.1f} MiB, {1e3 * seconds['sending']:.0f} ms)",
        ),
    ):
        share = seconds[name] / seconds["rollout"]
        lines.append(f"| on the {name} | {1e3 * seconds[name] / images:.1f} | {share:.2f} | {beside} |")
    lines += ["", "| states at once | ms a state: values | training |", "|---|---|---|"]
    for row in found["batches"]:
        lines.append(f"| {row['states']} | {1e3 * row['values']:.1f} | {1e3 * row['training']:.1f} |")
    lines += ["", "| learner of SD3.5-M | GiB | more than the actor alone |", "|---|---|---|"]
    for row in memory:
        more = (row["total"] - memory[0]["total"]) / MIB
        label = f"critic: {row['critic']}" if row["critic"] else "actor alone"
        lines.append(f"| {label} | {row['total'] / 1024**3:.2f} | {f'{more:.0f} MiB' if row['critic'] else ''} |")
    return "\n".join(lines)


def _seconds(work: Callable[[], None]) -> float:
    """Processor time: other work on the machine does not count."""
    started = time.process_time()
    work()
    return time.process_time() - started


def _path_bytes(records: list) -> int:
    return sum(np.asarray(record.before).nbytes for record in records)
