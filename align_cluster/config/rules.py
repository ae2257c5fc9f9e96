"""Rules that refuse combinations of settings which cannot work. They read the settings alone; `check.py` applies them.

What a single kind or block refuses stands beside it, as `problems` of its settings. Here are rules about several
blocks, which ask the classes' flags and know no kind by name.

ADD A RULE HERE: a function that yields one sentence a problem (the path, what is wrong, the nearest valid choice), and
its name in RULES.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from align_cluster.algorithms import ALGORITHMS
from align_cluster.backbones import BACKBONES
from align_cluster.backbones.adapters import unmatched
from align_cluster.backbones.pipeline import PipelineBackbone
from align_cluster.config.run import RunConfig
from align_cluster.embedded import pipeline_path
from align_cluster.errors import UserError
from align_cluster.files import user_path
from align_cluster.plain import json_value
from align_cluster.prompts import PROMPTS
from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import DifferentiableReward
from align_cluster.rollouts.schedule import SCHEDULES
from align_cluster.rollouts.steps import STEPS
from align_cluster.settings import HUB_ID, Root

Problems = Iterator[str]
COMPILED = 1e-3  # |log ratio| a dimension by which compiled passes with and without gradient differ (measured: 4e-4)


def names(kinds: Mapping[str, type], when: Callable[[type], bool]) -> str:
    """List the kinds whose classes fit, for the end of a sentence."""
    return " or ".join(kind for kind, implementation in kinds.items() if when(implementation))


def settings_refuse(config: Root) -> Problems:
    """Ask every block of settings of a file, and so every kind that is chosen."""
    for where, block in config.blocks():
        yield from block.problems(where, config)
        yield from block.missing(where)


def work_can_be_cut(config: RunConfig) -> Problems:
    """Refuse batches that a step cannot be cut into."""
    chunk, learner, algorithm = config.rollout.chunk, config.learner, ALGORITHMS[config.algorithm.kind]
    if learner.updates_per_step > config.images_per_step:
        yield (
            f"learner.updates_per_step is {learner.updates_per_step}, and a step has {config.images_per_step} images "
            f"to share out; set it to at most {config.images_per_step}"
        )
    if chunk and learner.micro_batch and learner.micro_batch > chunk:
        yield (
            f"learner.micro_batch is {learner.micro_batch}, and images come in chunks of {chunk}; "
            f"set it to at most {chunk}, or leave it out"
        )
    if learner.fold and learner.fold > 1 and algorithm.needs_density:
        yield (
            f"learner.fold is {learner.fold}, and algorithm.kind {config.algorithm.kind} compares log-probs, which "
            "depend on the batch in their last bits; leave it out"
        )


def compiled_passes_round_alike(config: RunConfig) -> Problems:
    """Refuse compiled networks where log-probs are compared more closely than compiled passes agree."""
    algorithm, tolerance = config.algorithm.kind, config.learner.ratio_tolerance
    if config.backbone.compile and ALGORITHMS[algorithm].needs_density and tolerance < COMPILED:
        yield (
            f"backbone.compile is true, and algorithm.kind {algorithm} compares log-probs of the rollout with the "
            f"learner's: compiled passes with and without gradient differ by up to {COMPILED:g}, and "
            f"learner.ratio_tolerance is {tolerance:g}; set backbone.compile to false, or the tolerance to "
            f"{COMPILED:g} where the clip range is far larger"
        )


def groups_can_compare(config: RunConfig) -> Problems:
    """Refuse groups of one image where an advantage compares images."""
    algorithm = ALGORITHMS[config.algorithm.kind]
    if config.group_members == 1 and not (algorithm.needs_path or algorithm.reward_gradient):
        yield (
            "rollout.group_size is 1, and an advantage compares an image with others of its prompt; "
            "set it to 2 or more (12 is usual)"
        )


def noise_tells_members_apart(config: RunConfig) -> Problems:
    """Refuse groups whose images would all be the same."""
    kind, algorithm = config.step_kind.kind, ALGORITHMS[config.algorithm.kind]
    several = config.rollout.group_size > 1
    if config.rollout.same_noise and several and not STEPS[kind].has_density and not algorithm.needs_density:
        yield (
            f"rollout.same_noise starts a whole group from one noise, and rollout.step.kind {kind} adds none, so its "
            "images would repeat one another; set rollout.same_noise to false"
        )


def step_fits_algorithm(config: RunConfig) -> Problems:
    """Refuse step kinds without a density, or that cannot be repeated, where the algorithm needs it."""
    kind, algorithm = config.algorithm.kind, ALGORITHMS[config.algorithm.kind]
    step = STEPS[config.step_kind.kind]
    if algorithm.needs_density and not step.has_density:
        yield (
            f"rollout.step.kind is {config.step_kind.kind}, which has no density, and algorithm.kind {kind} needs one; "
            f"set it to {algorithm.default_step}, or leave rollout.step out"
        )
    if algorithm.needs_density and config.rollout.steps < 2:
        yield (
            f"rollout.steps is {config.rollout.steps}, and the last step of a rollout has no density for "
            f"algorithm.kind {kind}; set it to 2 or more (10 is usual)"
        )
    if algorithm.repeats_steps and (step.has_density or step.multistep):
        yield (
            f"rollout.step.kind is {config.step_kind.kind}, whose steps cannot be repeated from where one began; with "
            f"algorithm.kind {kind} leave rollout.step out"
        )


def step_fits_backbone(config: RunConfig) -> Problems:
    """Refuse step kinds and schedules that are for another prediction than the network's."""
    kind, backbone = config.step_kind.kind, config.backbone.kind
    if config.prediction not in STEPS[kind].predictions:
        dense = ALGORITHMS[config.algorithm.kind].needs_density
        able = [k for k, s in STEPS.items() if config.prediction in s.predictions and dense <= s.has_density]
        predicts = "a velocity" if BACKBONES[backbone].flow else "epsilon or v"
        yield (
            f"rollout.step.kind is {kind}, and backbone.kind {backbone} predicts {predicts}; "
            f"set it to one of {', '.join(able)}"
        )
    if not BACKBONES[backbone].flow and not SCHEDULES[config.rollout.schedule.kind].native:
        yield (
            f"rollout.schedule.kind is {config.rollout.schedule.kind}, which is for flow models, and backbone.kind "
            f"{backbone} is none; leave rollout.schedule out"
        )


def algorithm_fits_backbone(config: RunConfig) -> Problems:
    """Refuse algorithms that need a velocity, or a gradient through the decoder, that is not there."""
    kind, backbone = config.algorithm.kind, config.backbone.kind
    if ALGORITHMS[kind].needs_flow and not BACKBONES[backbone].flow:
        yield (
            f"algorithm.kind is {kind}, whose loss is on a flow's velocity, and backbone.kind {backbone} predicts "
            f"epsilon or v; set algorithm.kind to {names(ALGORITHMS, lambda one: not one.needs_flow)}, "
            f"or backbone.kind to {names(BACKBONES, lambda one: one.flow)}"
        )
    if ALGORITHMS[kind].reward_gradient and not hasattr(BACKBONES[backbone], "pixels"):
        yield (
            f"algorithm.kind {kind} sends gradients through the VAE, and backbone.kind {backbone} has no "
            "differentiable decoder; give it one (`pixels`), or choose another algorithm"
        )


def rewards_have_gradients(config: RunConfig) -> Problems:
    """Refuse rewards without a gradient where the algorithm follows it."""
    for name in config.trained if ALGORITHMS[config.algorithm.kind].reward_gradient else ():
        kind = config.rewards[name].kind
        if not issubclass(REWARDS[kind], DifferentiableReward):
            yield (
                f"rewards.{name} is of kind {kind}, which has no gradient, and algorithm.kind {config.algorithm.kind} "
                "follows gradients of rewards; train on "
                f"{names(REWARDS, lambda one: issubclass(one, DifferentiableReward))}"
            )


def exploration_fits_backbone(config: RunConfig) -> Problems:
    """Refuse exploration without a CLIP text encoder."""
    if config.exploration and not BACKBONES[config.backbone.kind].explorable:
        yield (
            f"exploration.kind is {config.exploration.kind}, which perturbs the token embeddings of a CLIP text "
            f"encoder, and backbone.kind {config.backbone.kind} has none; leave exploration out, or set backbone.kind "
            f"to {names(BACKBONES, lambda one: one.explorable)}"
        )
        return
    clips = BACKBONES[config.backbone.kind].clips
    if config.exploration and config.exploration.encoders == "both" and len(clips) < 2:
        yield (
            f"exploration.encoders is both, and backbone.kind {config.backbone.kind} has no second CLIP text encoder; "
            "set it to first"
        )


def exploration_fits_algorithm(config: RunConfig) -> Problems:
    """Refuse updates under perturbed conditions where log-probs are those of the original, or nothing is drawn."""
    algorithm = ALGORITHMS[config.algorithm.kind]
    if config.update_exploration and (algorithm.needs_density or algorithm.reward_gradient):
        able = names(ALGORITHMS, lambda one: not (one.needs_density or one.reward_gradient))
        yield (
            f"exploration.update is perturbed, and algorithm.kind {config.algorithm.kind} trains on the prompt's own "
            f"condition only; set it to original, or algorithm.kind to {able}"
        )


def images_are_there(config: RunConfig) -> Problems:
    """Refuse offline training without images, or of an algorithm that needs the model's own."""
    if not config.rollout.offline:
        return
    if not ALGORITHMS[config.algorithm.kind].offline:
        yield (
            f"rollout.offline trains on real images, and algorithm.kind {config.algorithm.kind} learns from images of "
            f"the model's own; set algorithm.kind to {names(ALGORITHMS, lambda one: one.offline)}, or rollout.offline "
            "to false"
        )
    if not PROMPTS[config.prompts.kind].has_images:
        yield (
            f"rollout.offline takes the prompts' own images, and prompts.kind {config.prompts.kind} has none; set it "
            f"to {names(PROMPTS, lambda one: one.has_images)}, with a folder"
        )


def distilled_guidance_fits(config: RunConfig) -> Problems:
    """Refuse distilled guidance that the network or the learner could not follow."""
    if config.rollout.distilled_guidance is None:
        return
    if not BACKBONES[config.backbone.kind].takes_distilled_guidance:
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
    """Refuse a window that nothing uses, or that does not fit the rollout."""
    if config.window is None:
        if config.rollout.window is not None:
            yield (
                f"rollout.window says which noisy steps are trained, and algorithm.kind {config.algorithm.kind} trains "
                "none; leave rollout.window out"
            )
    elif config.rollout.steps > 1 and (problem := config.window.problem(config.rollout.steps)):
        yield problem


def something_is_trained_on(config: RunConfig) -> Problems:
    """Refuse a run without a trained reward, or with weights that are all 0."""
    trained = config.trained
    if not trained:
        first = next(iter(config.rewards))
        yield f"rewards: all have role monitor, so there is nothing to train on; set rewards.{first}.role to train"
    elif all(config.rewards[name].weight == 0 for name in trained):
        yield f"rewards: every trained one has weight 0; set rewards.{trained[0]}.weight to 1, or another weight but 0"


def backbone_is_there(config: RunConfig) -> Problems:
    """Refuse a path that is no pipeline, or one of another family."""
    path, kind = config.backbone.path, config.backbone.kind
    taken = BACKBONES[kind].pipelines
    folder = pipeline_path() if path == "embedded" else user_path(path)
    index = folder / "model_index.json"
    if not taken:
        return
    if not folder.is_dir():
        if not re.fullmatch(HUB_ID, path):
            yield (
                f"backbone.path is {path}, which is no folder here and no hub id; give embedded, a folder, "
                "or an id such as stabilityai/stable-diffusion-3.5-medium"
            )
    elif not index.is_file():
        yield f"backbone.path is {path}, a folder without model_index.json; give the folder of a diffusers pipeline"
    else:
        try:
            name = json_value(index.read_bytes())["_class_name"]
        except (OSError, ValueError, LookupError, TypeError):
            yield f"backbone.path is {path}, whose model_index.json names no pipeline; give it as diffusers wrote it"
            return
        if name not in taken:
            able = names(BACKBONES, lambda backbone: name in backbone.pipelines)
            remedy = f"set backbone.kind to {able}, or give another path" if able else "give another path"
            yield f"backbone.path is {path}, a {name}, and backbone.kind {kind} takes a {' or '.join(taken)}; {remedy}"


def model_can_draw(config: RunConfig) -> Problems:
    """Refuse image sizes and numbers of steps that the model does not have, where its settings are on this machine."""
    if any(True for _ in backbone_is_there(config)):
        return
    steps = {config.evaluate.steps or config.rollout.steps}
    if SCHEDULES[config.rollout.schedule.kind].native:
        steps.add(config.rollout.steps)
    yield from dict.fromkeys(BACKBONES[config.backbone.kind](config.backbone).problems(sorted(steps)))


def targets_are_layers(config: RunConfig) -> Problems:
    """Refuse names of LoRA targets that the network on this disk has no layers for."""
    targets, path = config.backbone.lora.targets, config.backbone.path
    kind = BACKBONES[config.backbone.kind]
    here = path == "embedded" or user_path(path).is_dir()
    if targets and here and issubclass(kind, PipelineBackbone):  # of a hub id, the workers ask when they have it
        backbone = kind(config.backbone)
        with suppress(UserError):  # a folder that is none of this kind: `backbone_is_there` says so
            problem = unmatched(backbone.on_meta(backbone.network, backbone.part), targets)
            if problem:
                yield problem


RULES = (
    settings_refuse,
    work_can_be_cut,
    compiled_passes_round_alike,
    groups_can_compare,
    noise_tells_members_apart,
    step_fits_algorithm,
    step_fits_backbone,
    algorithm_fits_backbone,
    rewards_have_gradients,
    exploration_fits_backbone,
    exploration_fits_algorithm,
    images_are_there,
    distilled_guidance_fits,
    window_fits,
    something_is_trained_on,
    backbone_is_there,
    model_can_draw,
    targets_are_layers,
)
