"""The cases that gpu.py measures, and what the planner says of them. It needs no card."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import gpu_networks as networks
from gpu_bench import Bench

from align_cluster.config.plan import derive, settle
from align_cluster.config.run import RunConfig
from align_cluster.planner.fit import GIB, changed, learner_memory, sampler_memory
from align_cluster.planner.memory import measure

MACHINE = 16, 1  # cores and GPUs of the planned machine
CASES = {  # case -> model, run file, and what is changed of it
    "sd35 nft": ("sd35", "sd35_medium_nft", ()),
    "sd35 grpo": ("sd35", "sd35_medium_grpo", ()),
    "flux nft": ("flux", "flux_dev_nft", ("backbone.height=512", "backbone.width=512")),
    "flux srpo": ("flux", "flux_dev_srpo_hps", ()),
}
ROWS = {"sd35": (32, 8, 64, 16), "flux": (4, 8)}  # images of a rollout, the most telling first
TINY_ROWS = (3, 2)
MICRO_BATCH = {"sd35": 8, "flux": 4}  # images that a learner's figure reads at once
LEVELS = 2  # noise levels that it trains at


class Variant(NamedTuple):
    """Settings of a learner's figure: gradient checkpointing, ZeRO stage, noise levels in one pass."""

    checkpointing: bool = False
    stage: int = 2
    fold: int = 1

    @property
    def activations(self) -> str:
        """Say what becomes of activations."""
        return "checkpointed" if self.checkpointing else "plain"

    def __str__(self) -> str:
        return f"{self.activations}, ZeRO {self.stage}" + (f", {self.fold} levels at once" if self.fold > 1 else "")


VARIANTS = [Variant(checkpointing, stage) for checkpointing in (False, True) for stage in (2, 0)]
FOLDED = Variant(fold=LEVELS)  # only for algorithms without densities


def rollout_rows(name: str, tiny: bool) -> tuple[int, ...]:
    """Return the numbers of images that a case draws at once."""
    return TINY_ROWS if tiny else ROWS[CASES[name][0]]


def case(name: str, folder: Path, tiny: bool, *overrides: str) -> RunConfig:
    """Return the settings of a case, on a pipeline that is written into `folder`, with a number for each batch."""
    model, file, changes = CASES[name]
    pipeline = networks.write_pipeline(model, folder / model, tiny)
    changes = (*(() if tiny else changes), "learner.updates_per_step=1", *overrides)
    config = networks.config_of(file, pipeline, tiny, *changes)
    if "hps" in config.rewards:
        hps = config.rewards["hps"].model_copy(update=networks.hps_settings(folder, tiny))
        config = config.model_copy(update={"rewards": {"hps": hps}})
    return settle(config, *MACHINE)


def learner_case(name: str, folder: Path, tiny: bool, variant: Variant) -> RunConfig:
    """Return the settings of a learner's figure."""
    rows = 2 if tiny else MICRO_BATCH[CASES[name][0]]
    levels = (f"algorithm.timesteps={LEVELS}",) if "nft" in name else ()
    checkpointing = f"learner.gradient_checkpointing={str(variant.checkpointing).lower()}"
    engine = (checkpointing, f"learner.zero_stage={variant.stage}", f"learner.fold={variant.fold}")
    return case(name, folder, tiny, *batches(rows), *levels, *engine)


def srpo_case(folder: Path, tiny: bool) -> RunConfig:
    """Return the settings of SRPO at 720 px, which trains on one image at a time."""
    return case("flux srpo", folder, tiny, *batches(1), "learner.fold=1")


def batches(rows: int) -> tuple[str, ...]:
    """Return the settings of a step that is one micro-batch of so many images."""
    return "prompts_per_step=1", f"rollout.group_size={rows}", f"rollout.chunk={rows}", f"learner.micro_batch={rows}"


def plan(bench: Bench) -> None:
    """Ask the planner for the bytes and FLOPs of all cases. This takes two minutes of a CPU core."""
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            bench.row(name, lambda name=name: _planned(name, Path(folder), bench.tiny))


def _planned(name: str, folder: Path, tiny: bool) -> dict[str, Any]:
    config = srpo_case(folder, tiny) if "srpo" in name else learner_case(name, folder, tiny, Variant())
    made = derive(config, *MACHINE)
    sizes = measure(config, made, "cuda")
    drawn = {*rollout_rows(name, tiny), config.rollout.chunk}
    rows = {size: changed(config, "rollout", chunk=size) for size in sorted(drawn)}
    drawing = {str(size): sampler_memory(one, made, sizes).total / GIB for size, one in rows.items()}
    learning = {}
    for one in (*VARIANTS, FOLDED):
        engine = {"gradient_checkpointing": one.checkpointing, "zero_stage": one.stage, "fold": one.fold}
        learning[str(one)] = learner_memory(changed(config, "learner", **engine), made, sizes).total / GIB
    kinds = {"plain": sizes.plain.update, "checkpointed": sizes.checkpointed.update}
    return {
        "draw_tflop": sizes.draw.flops / made.chunk / 1e12,
        "decode_tflop": sizes.decode.flops / made.chunk / 1e12,
        "update_tflop": {kind: used.flops / made.micro_batch / 1e12 for kind, used in kinds.items()},
        "decode_gib": {str(size): sizes.decode.bytes * size / made.chunk / GIB for size in rows},
        "sampler_gib": drawing,
        "learner_gib": learning,
        "lora_mb": sizes.adapter / 1e6,
    }
