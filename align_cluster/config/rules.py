"""Combinations of settings that cannot work: rules that need the settings alone. `check.py` applies them.

ADD A RULE HERE: a function that yields one sentence a problem (the path, what is wrong, the nearest valid choice), and
its name in RULES.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from align_cluster.algorithms import ALGORITHMS
from align_cluster.backbones import BACKBONES
from align_cluster.config.run import RunConfig
from align_cluster.embedded import pipeline_path
from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import DifferentiableReward, RewardSection
from align_cluster.rollouts.steps import STEPS

Problems = Iterator[str]

# Scores that ordinary images have, by kind and scale of a reward, where they are far from 0.
USUAL = {("pickscore", "raw"): 20, ("aesthetic", ""): 4, ("pickscore", "srpo"): 1, ("pickscore", "flow_grpo"): 0.8}


def chunk_divides_group(config: RunConfig) -> Problems:
    size, chunk = config.group_members, config.rollout.chunk
    if chunk and size % chunk:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - chunk))[:2]
        group = "rollout.group_size" if config.conditions == 1 else "rollout.group_size x exploration.conditions ="
        yield (
            f"rollout.chunk is {chunk}, which does not divide {group} {size}; "
            f"set it to {' or '.join(map(str, sorted(near)))}"
        )


def micro_batch_fits_chunk(config: RunConfig) -> Problems:
    chunk = config.rollout.chunk or config.rollout.group_size
    if (config.learner.micro_batch or 0) > chunk:
        yield (
            f"learner.micro_batch is {config.learner.micro_batch}, and images come in chunks of {chunk}; "
            f"set it to at most {chunk}, or leave it out"
        )


def updates_have_work(config: RunConfig) -> Problems:
    chunks = config.prompts_per_step * -(-config.group_members // (config.rollout.chunk or config.rollout.group_size))
    if config.learner.updates_per_step > chunks:
        yield (
            f"learner.updates_per_step is {config.learner.updates_per_step}, and a step has {chunks} chunks to share "
            f"out; set it to at most {chunks}"
        )


def groups_can_compare(config: RunConfig) -> Problems:
    algorithm = ALGORITHMS[config.algorithm.kind]
    if config.group_members == 1 and not (algorithm.needs_path or algorithm.reward_gradient):
        yield (
            "rollout.group_size is 1, and an advantage compares an image with others of its prompt; "
            "set it to 2 or more (12 is usual)"
        )


def exploration_fits_backbone(config: RunConfig) -> Problems:
    if config.exploration and not BACKBONES[config.backbone.kind].explorable:
        able = " or ".join(kind for kind, backbone in BACKBONES.items() if backbone.explorable)
        yield (
            f"exploration.kind is e2po, which perturbs the token embeddings of a CLIP text encoder, and backbone.kind "
            f"{config.backbone.kind} has none; leave exploration out, or set backbone.kind to {able}"
        )


def noise_tells_members_apart(config: RunConfig) -> Problems:
    kind, algorithm = config.step_kind.kind, ALGORITHMS[config.algorithm.kind]
    several = config.rollout.group_size > 1
    if config.rollout.same_noise and several and not STEPS[kind].has_density and not algorithm.needs_density:
        yield (
            f"rollout.same_noise starts a whole group from one noise, and rollout.step.kind {kind} adds none, so its "
            "images would repeat one another; set rollout.same_noise to false"
        )


def step_fits_backbone(config: RunConfig) -> Problems:
    kind, flow = config.step_kind.kind, BACKBONES[config.backbone.kind].flow
    able = [name for name, step in STEPS.items() if ("flow" if flow else "epsilon") in step.predictions]
    if kind not in able:
        dense = ALGORITHMS[config.algorithm.kind].needs_density
        predicts = "a velocity" if flow else "epsilon or v"
        yield (
            f"rollout.step.kind is {kind}, and backbone.kind {config.backbone.kind} predicts {predicts}; "
            f"set it to one of {', '.join(name for name in able if dense <= STEPS[name].has_density)}"
        )
    if not flow and config.rollout.schedule.kind != "native":
        yield (
            f"rollout.schedule.kind is {config.rollout.schedule.kind}, which is for flow models, and backbone.kind "
            f"{config.backbone.kind} is none; leave rollout.schedule out"
        )


def algorithm_fits_backbone(config: RunConfig) -> Problems:
    if ALGORITHMS[config.algorithm.kind].needs_flow and not BACKBONES[config.backbone.kind].flow:
        able = [kind for kind, algorithm in ALGORITHMS.items() if not algorithm.needs_flow]
        flows = [kind for kind, backbone in BACKBONES.items() if backbone.flow]
        yield (
            f"algorithm.kind is {config.algorithm.kind}, whose loss is on a flow's velocity, and backbone.kind "
            f"{config.backbone.kind} predicts epsilon or v; set algorithm.kind to {' or '.join(able)}, "
            f"or backbone.kind to {' or '.join(flows)}"
        )


def rewards_have_gradients(config: RunConfig) -> Problems:
    if not ALGORITHMS[config.algorithm.kind].reward_gradient:
        return
    able = [kind for kind, reward in REWARDS.items() if issubclass(reward, DifferentiableReward)]
    for name in config.trained:
        kind = config.rewards[name].kind
        if kind not in able:
            yield (
                f"rewards.{name} is of kind {kind}, which has no gradient, and algorithm.kind {config.algorithm.kind} "
                f"follows gradients of rewards; train on {', '.join(able[:-1])} or {able[-1]}"
            )
        elif not REWARDS[kind].reads_text and getattr(config.algorithm, "relative", "") == "words":
            yield (
                f"rewards.{name} is of kind {kind}, which reads no text, and algorithm.relative words compares an "
                "image under two texts; set algorithm.relative to noise or none"
            )
    margin = getattr(config.algorithm, "margin", None)
    typical = sum(config.rewards[name].weight * USUAL.get(_scale(config.rewards[name]), 0) for name in config.trained)
    if margin is not None and typical > margin and getattr(config.algorithm, "relative", "none") == "none":
        yield (
            f"algorithm.margin is {margin:g}, and trained rewards are usually about {typical:g}: gradients stop at the "
            "margin, so nothing would be learned; set it to null, or above what is to be reached"
        )


def _scale(reward: RewardSection) -> tuple[str, str]:
    return reward.kind, getattr(reward, "scale", "")


def direct_settings_fit(config: RunConfig) -> Problems:
    algorithm, steps = config.algorithm, config.rollout.steps
    if algorithm.kind == "srpo" and algorithm.relative == "none" and algorithm.branches != "denoise":
        yield (
            f"algorithm.branches is {algorithm.branches}, and without words or noise to compare with an inverting step "
            "would lower the reward; set it to denoise"
        )
    if algorithm.kind == "refl" and algorithm.steps[1] >= steps:
        yield (
            f"algorithm.steps is {list(algorithm.steps)}, and a rollout of {steps} steps ends with step {steps - 1}; "
            f"set it to [{steps * 3 // 4}, {steps - 1}], or rollout.steps to {algorithm.steps[1] + 1}"
        )
    if algorithm.kind == "draft":
        if algorithm.last > steps:
            yield f"algorithm.last is {algorithm.last}, and a rollout has {steps} steps; set it to at most {steps}"
        if algorithm.renoised and algorithm.last > 1:
            yield (
                f"algorithm.renoised is {algorithm.renoised}, which repeats the last step alone, and algorithm.last is "
                f"{algorithm.last}; set one of them: last to 1, or renoised to 0"
            )
    if ALGORITHMS[algorithm.kind].reward_gradient and config.step_kind.kind != "euler" and algorithm.kind != "srpo":
        yield (
            f"rollout.step.kind is {config.step_kind.kind}, whose steps cannot be repeated from where one began; with "
            f"algorithm.kind {algorithm.kind} leave rollout.step out"
        )
    if ALGORITHMS[algorithm.kind].reward_gradient and not hasattr(BACKBONES[config.backbone.kind], "pixels"):
        yield (
            f"algorithm.kind {algorithm.kind} sends gradients through the VAE, and backbone.kind "
            f"{config.backbone.kind} has no differentiable decoder; give it one (`pixels`), or choose another algorithm"
        )


def images_are_there(config: RunConfig) -> Problems:
    if not config.rollout.offline:
        return
    able = [kind for kind, algorithm in ALGORITHMS.items() if algorithm.offline]
    if config.algorithm.kind not in able:
        yield (
            f"rollout.offline trains on real images, and algorithm.kind {config.algorithm.kind} learns from images of "
            f"the model's own; set algorithm.kind to {' or '.join(able)}, or rollout.offline to false"
        )
    if config.prompts.kind != "images":
        yield (
            f"rollout.offline takes the prompts' own images, and prompts.kind {config.prompts.kind} has none; set it "
            "to images, with a folder"
        )


def told_guidance_fits(config: RunConfig) -> Problems:
    if config.rollout.distilled_guidance is None:
        return
    if config.backbone.kind != "flux":
        yield (
            f"rollout.distilled_guidance is for guidance-distilled networks, and backbone.kind {config.backbone.kind} "
            "has no such input; leave it out (rollout.guidance is classifier-free guidance)"
        )
    if ALGORITHMS[config.algorithm.kind].needs_density:
        yield (
            f"rollout.distilled_guidance makes samplers draw otherwise than the learner, whose log-probs "
            f"algorithm.kind {config.algorithm.kind} compares with theirs; set backbone.distilled_guidance instead"
        )


def window_fits(config: RunConfig) -> Problems:
    if config.window is None:
        if config.rollout.window is not None:
            yield (
                f"rollout.window says which noisy steps are trained, and algorithm.kind {config.algorithm.kind} trains "
                "none; leave rollout.window out"
            )
    elif config.rollout.steps > 1:
        problem = config.window.problem(config.rollout.steps)
        if problem:
            yield problem


def critic_fits(config: RunConfig) -> Problems:
    critic = getattr(config.algorithm, "critic", None)
    if critic is None:
        return
    if config.learner.zero_stage == 3:
        yield (
            "learner.zero_stage is 3, which cuts up the base that the critic reads too, outside of the engine; "
            "set it to 2 or less"
        )
    if critic.width % critic.heads:
        yield f"algorithm.critic.width is {critic.width}, which {critic.heads} heads cannot share; set heads to 8"
    if getattr(config.rollout.window, "choice", "") == "per_sample":
        yield (
            "rollout.window.choice is per_sample, and with a critic all samples of a step train the same denoising "
            "steps; set it to first or random"
        )


def guard_has_a_density(config: RunConfig) -> Problems:
    if getattr(config.algorithm, "ratio", "plain") == "guard" and config.step_kind.kind == "cps":
        yield (
            "algorithm.ratio is guard, which needs a normalised Gaussian density, and rollout.step.kind cps has none; "
            "set rollout.step.kind to flow_sde or dance_sde, or algorithm.ratio to plain"
        )


def batches_hold_whole_groups(config: RunConfig) -> Problems:
    chunk, updates = config.rollout.chunk or config.rollout.group_size, config.learner.updates_per_step
    pooled = (
        "std is batch" if config.advantage.std == "batch" else "mix is gdpo" if config.advantage.mix == "gdpo" else ""
    )
    if pooled and updates > 1 and chunk < config.group_members:
        remedy = "std to global" if config.advantage.std == "batch" else "mix to normalise_then_sum"
        yield (
            f"advantage.{pooled}, and learner.updates_per_step {updates} splits groups between batches, whose "
            f"deviations then say little; set rollout.chunk to {config.group_members}, or advantage.{remedy}"
        )


def shaping_has_its_scale(config: RunConfig) -> Problems:
    shaping = config.advantage.shaping
    if shaping is None:
        return
    if config.advantage.std in ("group", "none"):
        yield (
            f"advantage.shaping is slas, which takes the batch's deviation in place of the prompt's, and advantage.std "
            f"is {config.advantage.std}; set it to batch (or global)"
        )
    if shaping.gamma == "adaptive":
        if config.window is None:
            yield (
                f"advantage.shaping.gamma is adaptive, which needs log-probs, and algorithm.kind "
                f"{config.algorithm.kind} has none; set it to a number such as 0.5"
            )
        if shaping.order == "shape_then_norm":
            yield (
                "advantage.shaping.gamma is adaptive, and advantage.shaping.order shape_then_norm gives updates of one "
                "size whatever gamma is; set order to norm_then_shape"
            )
        if config.learner.zero_stage == 3:
            yield (
                "advantage.shaping.gamma is adaptive, which needs whole parameters on every rank, and "
                "learner.zero_stage is 3; set it to 2, or gamma to a number such as 0.5"
            )


def step_has_density(config: RunConfig) -> Problems:
    algorithm = ALGORITHMS[config.algorithm.kind]
    if not algorithm.needs_density:
        return
    if config.rollout.step and not STEPS[config.rollout.step.kind].has_density:
        yield (
            f"rollout.step.kind is {config.rollout.step.kind}, which has no density, and algorithm.kind "
            f"{config.algorithm.kind} needs one; set it to {algorithm.default_step}, or leave rollout.step out"
        )
    if config.rollout.steps < 2:
        yield (
            f"rollout.steps is {config.rollout.steps}, and the last step of a rollout has no density for "
            f"algorithm.kind {config.algorithm.kind}; set it to 2 or more (10 is usual)"
        )


def timesteps_exist(config: RunConfig) -> Problems:
    timesteps = getattr(config.algorithm, "timesteps", None)
    if timesteps and timesteps > config.rollout.steps:
        yield (
            f"algorithm.timesteps is {timesteps}, and a rollout has {config.rollout.steps} noise levels; "
            f"set it to at most {config.rollout.steps}, or leave it out"
        )


def something_is_trained_on(config: RunConfig) -> Problems:
    trained = config.trained
    first = next(iter(config.rewards))
    if not trained:
        yield f"rewards: all have role monitor, so there is nothing to train on; set rewards.{first}.role to train"
    elif all(config.rewards[name].weight == 0 for name in trained):
        yield f"rewards: every trained one has weight 0; set rewards.{trained[0]}.weight to 1, or another weight but 0"


def backbone_exists(config: RunConfig) -> Problems:
    path = config.backbone.path
    if path == "embedded":
        return
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            yield f"backbone.path is {path}, a folder without model_index.json; give the folder of a diffusers pipeline"
    elif not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        yield (
            f"backbone.path is {path}, which is no folder here and no hub id; give embedded, a folder, "
            "or an id such as stabilityai/stable-diffusion-3.5-medium"
        )


def pipeline_fits_backbone(config: RunConfig) -> Problems:
    path, kind = config.backbone.path, config.backbone.kind
    index = (pipeline_path() if path == "embedded" else Path(path).expanduser()) / "model_index.json"
    if not index.is_file():
        return
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (ValueError, LookupError, TypeError):
        yield f"backbone.path is {path}, whose model_index.json names no pipeline; give it as diffusers wrote it"
        return
    taken = BACKBONES[kind].pipelines
    if name not in taken:
        able = [other for other, backbone in BACKBONES.items() if name in backbone.pipelines]
        remedy = f"set backbone.kind to {' or '.join(able)}, or give another path" if able else "give another path"
        yield f"backbone.path is {path}, a {name}, and backbone.kind {kind} takes a {' or '.join(taken)}; {remedy}"


def embedded_knows_its_words(config: RunConfig) -> Problems:
    for where, source in (("prompts", config.prompts), ("evaluate.prompts", config.evaluate.prompts)):
        if config.backbone.path == "embedded" and source.kind == "geneval":
            yield (
                f"{where}.kind is geneval, whose objects the embedded model never saw; set it to embedded, "
                "or set backbone.path to a real model"
            )


RULES = (
    chunk_divides_group,
    micro_batch_fits_chunk,
    updates_have_work,
    groups_can_compare,
    step_has_density,
    step_fits_backbone,
    algorithm_fits_backbone,
    rewards_have_gradients,
    direct_settings_fit,
    images_are_there,
    told_guidance_fits,
    window_fits,
    critic_fits,
    guard_has_a_density,
    noise_tells_members_apart,
    exploration_fits_backbone,
    batches_hold_whole_groups,
    shaping_has_its_scale,
    timesteps_exist,
    something_is_trained_on,
    backbone_exists,
    pipeline_fits_backbone,
    embedded_knows_its_words,
)
