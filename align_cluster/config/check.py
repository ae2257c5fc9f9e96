"""Checks what no single setting shows: combinations that cannot work, and prompts that do not fit. It loads no model.

Rules on settings alone are in `rules.py`; here are those that read the loaded prompts too.
ADD A RULE HERE: a function that yields one sentence a problem (the path, what is wrong, the nearest valid choice), and
its name in PROMPT_RULES, or in NOTES, which never refuses.
"""

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.advantage import AdvantageConfig
from align_cluster.backbones import BACKBONES
from align_cluster.config.rules import RULES, Problems, settings_refuse
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.prompts import PROMPTS
from align_cluster.rewards import REWARDS
from align_cluster.rollouts.steps import STEPS
from align_cluster.settings import Root
from align_cluster.types import Prompt


def check(config: RunConfig) -> list[str]:
    """Raise UserError with every problem, one a line; return notes on what is allowed but probably not meant."""
    _refuse(sentence for rule in RULES for sentence in rule(config))
    train, held_out = (PROMPTS[source.kind](source).load() for source in (config.prompts, config.evaluate.prompts))
    return check_prompts(config, train, held_out)


def check_settings(config: Root) -> None:
    """Raise UserError with every problem of a file's settings alone, one a line; of a run, `check` finds more."""
    _refuse(settings_refuse(config))


def check_prompts(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> list[str]:
    """Do the part of `check` that reads the loaded prompts."""
    _refuse(sentence for rule in PROMPT_RULES for sentence in rule(config, train, held_out))
    return [sentence for rule in NOTES for sentence in rule(config, train, held_out)]


def _refuse(problems: Problems) -> None:
    sentences = list(problems)
    if sentences:
        raise UserError("\n".join(sentences))


def enough_prompts(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    """Refuse a step or an evaluation of more prompts than there are."""
    asked = (
        ("prompts_per_step", config.prompts_per_step, "prompts", train),
        ("evaluate.count", config.evaluate.count, "evaluate.prompts", held_out),
    )
    for key, count, source, prompts in asked:
        there = len({prompt.text for prompt in prompts})
        if count > there:
            yield f"{key} is {count}, and {source} has {there} different ones; set it to at most {there}"


def held_out_is_held_out(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    """Refuse an evaluation on prompts that are trained on."""
    trained = {prompt.text for prompt in train}
    leaks = sorted({prompt.text for prompt in held_out} & trained)
    if leaks:
        excludes = "exclude" in type(config.prompts).model_fields
        splits = "split" in type(config.evaluate.prompts).model_fields
        remedy = "set evaluate.prompts.split to held_out" if splits else "evaluate on another file"
        if excludes and PROMPTS[config.evaluate.prompts.kind].has_records:
            remedy = "name the evaluation file in prompts.exclude"
        yield f"evaluate.prompts: {len(leaks)} prompts are trained on as well, such as {leaks[0]!r}; {remedy}"


def rewards_can_judge(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    """Refuse trained rewards that judge no prompt, and prompts that a reward cannot work with."""
    for name, reward in config.rewards.items():
        kind = REWARDS[reward.kind]
        if reward.role == "train" and not any(map(kind.judges, train)):
            yield (
                f"rewards.{name} judges none of the training prompts: {kind.needs}; "
                f"choose other prompts, or set rewards.{name}.role to monitor"
            )
        yield from kind(reward).prompt_problems(f"rewards.{name}", [*train, *held_out])


def settings_note(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    """Collect the notes of every block of settings, and so of every kind that is chosen."""
    for where, block in config.blocks():
        yield from block.notes(where, config)


def density_without_use(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    """Note a noisy step kind of a flow under an algorithm that needs none; DDIM's noise is many UNets' own sampler."""
    algorithm, step = ALGORITHMS[config.algorithm.kind], config.rollout.step
    noisy = step and STEPS[step.kind].has_density and config.prediction == "flow"
    if noisy and not algorithm.needs_density:
        yield (
            f"rollout.step.kind is {config.rollout.step.kind}, whose noise {config.algorithm.kind} has no use for; "
            f"{algorithm.default_step} draws cleaner images"
        )


def settings_without_effect(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    """Note settings that change nothing in this run."""
    if config.learner.guidance_gradient == "both" and config.rollout.guidance == 1:
        yield "learner.guidance_gradient is both, and rollout.guidance 1 has no second branch: it changes nothing"
    if config.exploration and config.exploration.conditions == 1:
        yield "exploration.conditions is 1, the original prompt alone: nothing is explored"
    if ALGORITHMS[config.algorithm.kind].reward_gradient and config.advantage != AdvantageConfig():
        yield f"advantage: algorithm.kind {config.algorithm.kind} follows rewards' gradients and has no advantages"


def merging_rounds(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    """Note merged weights where log-probs are compared."""
    if config.rollout.merge_lora and ALGORITHMS[config.algorithm.kind].needs_density:
        yield (
            "rollout.merge_lora rounds the base's weights, so the learner's log-probs differ from the rollout's before "
            "any update; the self-check passes only with a larger learner.ratio_tolerance"
        )


def prompts_without_reward(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    """Note prompts that no reward judges."""
    kinds = {name: REWARDS[reward.kind] for name, reward in config.rewards.items()}
    lost = [prompt.text for prompt in train if not any(kinds[name].judges(prompt) for name in config.trained)]
    if lost:
        yield f"{len(lost)} of {len(train)} training prompts have no reward and teach nothing, such as {lost[0]!r}"
    for name, kind in kinds.items():
        if not any(map(kind.judges, held_out)):
            yield f"rewards.{name} judges none of the held-out prompts: {kind.needs}"


def prompts_longer_than_read(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    """Note prompts that no text encoder reads to their end."""
    backbone = BACKBONES[config.backbone.kind](config.backbone)
    yield from backbone.text_notes([prompt.text for prompt in (*train, *held_out)])


PROMPT_RULES = (enough_prompts, held_out_is_held_out, rewards_can_judge)
NOTES = (
    settings_note,
    density_without_use,
    settings_without_effect,
    merging_rounds,
    prompts_without_reward,
    prompts_longer_than_read,
)
