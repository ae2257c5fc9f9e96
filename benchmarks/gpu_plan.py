"""The cases that gpu.py measures, and what the planner says of them. It needs no card."""

import tempfile
from pathlib import Path
from typing import Any

import gpu_networks as networks
from gpu_bench import Bench

from align_cluster.config.plan import derive
from align_cluster.config.run import RunConfig
from align_cluster.planner.fit import GIB, changed, learner_memory, sampler_memory
from align_cluster.planner.memory import measure

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
VARIANTS = [(checkpointing, stage) for checkpointing in (False, True) for stage in (2, 0)]


def variant(checkpointing: bool, stage: int) -> str:
    """Name a learner's settings."""
    return f"{'checkpointed' if checkpointing else 'plain'}, ZeRO {stage}"


def rollout_rows(name: str, tiny: bool) -> tuple[int, ...]:
    """Return the numbers of images that a case draws at once."""
    return TINY_ROWS if tiny else ROWS[CASES[name][0]]


def case(name: str, folder: Path, tiny: bool, *overrides: str) -> RunConfig:
    """Return the settings of a case, on a pipeline that is written into `folder`."""
    model, file, changes = CASES[name]
    pipeline = networks.write_pipeline(model, folder / model, tiny)
    changes = (*(() if tiny else changes), "learner.updates_per_step=1", *overrides)
    config = networks.config_of(file, pipeline, tiny, *changes)
    if "hps" not in config.rewards:
        return config
    hps = config.rewards["hps"].model_copy(update=networks.hps_settings(folder, tiny))
    return config.model_copy(update={"rewards": {"hps": hps}})


def learner_case(name: str, folder: Path, tiny: bool, checkpointing: bool = False, stage: int = 2) -> RunConfig:
    """Return the settings of a learner's figure."""
    rows = 2 if tiny else MICRO_BATCH[CASES[name][0]]
    levels = (f"algorithm.timesteps={LEVELS}",) if "nft" in name else ()
    engine = (f"learner.gradient_checkpointing={str(checkpointing).lower()}", f"learner.zero_stage={stage}")
    return case(name, folder, tiny, f"rollout.group_size={rows}", f"rollout.chunk={rows}", *levels, *engine)


def plan(bench: Bench) -> None:
    """Ask the planner for the bytes and FLOPs of all cases. This takes two minutes of a CPU core."""
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            bench.row(name, lambda name=name: _planned(name, Path(folder), bench.tiny))


def _planned(name: str, folder: Path, tiny: bool) -> dict[str, Any]:
    srpo = "srpo" in name
    config = case(name, folder, tiny) if srpo else learner_case(name, folder, tiny)
    made = derive(config, 16, 1)
    sizes = measure(config, made, "cuda")
    drawn = {*rollout_rows(name, tiny), config.chunk}
    rows = {size: changed(config, "rollout", chunk=size) for size in sorted(drawn)}
    drawing = {str(size): sampler_memory(one, made, sizes).total / GIB for size, one in rows.items()}
    learning = {}
    for checkpointing, stage in VARIANTS:
        one = changed(config, "learner", gradient_checkpointing=checkpointing, zero_stage=stage)
        learning[variant(checkpointing, stage)] = learner_memory(one, made, sizes).total / GIB
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
