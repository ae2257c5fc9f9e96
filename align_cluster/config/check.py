"""What no single setting shows: combinations that cannot work, and prompts that do not fit. No model is loaded.

Rules on settings alone are in `rules.py`; here are those that read the loaded prompts too.
ADD A RULE HERE: a function that yields one sentence a problem (the path, what is wrong, the nearest valid choice), and
its name in PROMPT_RULES, or in NOTES, which never refuses.
"""

from difflib import get_close_matches

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.advantage import AdvantageConfig
from align_cluster.algorithms.srpo import NEGATIVE, POSITIVE
from align_cluster.config.rules import RULES, Problems
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.files import quoted
from align_cluster.prompts.images import left_out
from align_cluster.rewards.detectors import DETECTORS, geneval_name
from align_cluster.rewards.words import split, vocabulary
from align_cluster.rollouts.steps import STEPS
from align_cluster.types import Prompt


def check(config: RunConfig) -> list[str]:
    """Raise UserError with every problem, one a line; return notes on what is allowed but probably not meant."""
    _refuse(sentence for rule in RULES for sentence in rule(config))
    train, held_out = (PROMPTS[source.kind](source).load() for source in (config.prompts, config.evaluate.prompts))
    return check_prompts(config, train, held_out)


def check_prompts(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> list[str]:
    """The part of `check` that follows once the prompts are loaded."""
    _refuse(sentence for rule in PROMPT_RULES for sentence in rule(config, train, held_out))
    return [sentence for rule in NOTES for sentence in rule(config, train, held_out)]


def _refuse(problems: Problems) -> None:
    sentences = list(problems)
    if sentences:
        raise UserError("\n".join(sentences))


def enough_prompts(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    asked = (
        ("prompts_per_step", config.prompts_per_step, "prompts", train),
        ("evaluate.count", config.evaluate.count, "evaluate.prompts", held_out),
        ("evaluate.grid_prompts", config.evaluate.grid_prompts, "evaluate.prompts", held_out),
    )
    for key, count, source, prompts in asked:
        there = len({prompt.text for prompt in prompts})
        if count > there:
            yield f"{key} is {count}, and {source} has {there} different ones; set it to at most {there}"


def held_out_is_held_out(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    trained = {prompt.text for prompt in train}
    leaks = sorted({prompt.text for prompt in held_out} & trained)
    if leaks:
        fields = type(config.evaluate.prompts).model_fields
        remedy = "set evaluate.prompts.split to held_out" if "split" in fields else "evaluate on another file"
        if {config.prompts.kind, config.evaluate.prompts.kind} == {"geneval", "jsonl"}:
            remedy = "name the evaluation file in prompts.exclude"
        yield f"evaluate.prompts: {len(leaks)} prompts are trained on as well, such as {leaks[0]!r}; {remedy}"


def rewards_can_judge(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    for name, reward in config.rewards.items():
        if reward.role == "train" and not any(judges(reward.kind, prompt) for prompt in train):
            yield (
                f"rewards.{name} judges none of the training prompts: {NEEDS[reward.kind]}; "
                f"choose other prompts, or set rewards.{name}.role to monitor"
            )


def detector_knows_the_objects(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    asked = {clause["class"] for prompt in [*train, *held_out] for clause in prompt.metadata.get("include", ())}
    for name, reward in config.rewards.items():
        if reward.kind != "geneval":
            continue
        known = DETECTORS[reward.detector.kind].classes
        for unknown in sorted(asked - set(known))[:1]:
            vocabulary = ", ".join(known) if len(known) < 10 else f"{len(known)} classes of COCO by GenEval's names"
            remedy = "use clip_score for these prompts"
            if reward.detector.kind == "embedded":
                remedy = "use the detector mask2former, or clip_score, for these prompts"
            elif geneval_name(unknown) in known:
                remedy = f"write {geneval_name(unknown)!r}"
            yield (
                f"rewards.{name}: the {reward.detector.kind} detector knows {vocabulary}, "
                f"and prompts ask for {unknown!r}; {remedy}"
            )


def density_without_use(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    algorithm = ALGORITHMS[config.algorithm.kind]
    if config.rollout.step and STEPS[config.rollout.step.kind].has_density and not algorithm.needs_density:
        yield (
            f"rollout.step.kind is {config.rollout.step.kind}, whose noise {config.algorithm.kind} has no use for; "
            f"{algorithm.default_step} draws cleaner images"
        )


def settings_without_effect(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    if config.learner.guidance_gradient == "both" and config.rollout.guidance == 1:
        yield "learner.guidance_gradient is both, and rollout.guidance 1 has no second branch: it changes nothing"
    if config.exploration and config.exploration.conditions == 1:
        yield "exploration.conditions is 1, the original prompt alone: nothing is explored"
    if ALGORITHMS[config.algorithm.kind].reward_gradient and config.advantage != AdvantageConfig():
        yield f"advantage: algorithm.kind {config.algorithm.kind} follows rewards' gradients and has no advantages"
    late = config.algorithm.kind == "draft" and config.rollout.schedule.kind in ("native", "sd3")
    if late and config.backbone.kind == "sd3" and config.algorithm.last == 1:
        yield (
            "algorithm.last is 1, and the last step of SD3's schedule begins at noise .009: its gradient does next to "
            "nothing; rollout.schedule.kind linear has a last step that counts"
        )
    if config.algorithm.kind == "srpo" and config.algorithm.levels[0] > 0.99:
        yield f"algorithm.levels begins at {config.algorithm.levels[0]:g}: above .99 the authors saw distorted images"


def merging_rounds(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    if config.rollout.merge_lora and ALGORITHMS[config.algorithm.kind].needs_density:
        yield (
            "rollout.merge_lora rounds the base's weights, so the learner's log-probs differ from the rollout's before "
            "any update; the self-check passes only with a larger learner.ratio_tolerance"
        )


def vanishing_noise(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    plain = getattr(config.algorithm, "ratio", "guard") == "plain"
    if config.step_kind.kind == "flow_ddim" and plain and config.rollout.schedule.kind in ("native", "sd3"):
        yield (
            "rollout.step.kind is flow_ddim, whose noise vanishes at the small last levels of SD3's schedule, and the "
            "gradient is largest there; rollout.schedule.kind linear or algorithm.ratio guard learns better"
        )


def unknown_control_words(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    if getattr(config.algorithm, "relative", "") != "words":
        return
    published = {word for phrase in (*POSITIVE, *NEGATIVE) for word in split(phrase)}
    for name in config.trained:
        known = vocabulary(config.rewards[name])
        for setting in ("positive", "negative"):
            for phrase in getattr(config.algorithm, setting):
                words = split(phrase)
                strange = [word for word in words if not (known.knows(word) if known else word in published)]
                if not strange:
                    continue
                where = f"algorithm.{setting}: {phrase!r}: the tokenizer of rewards.{name}"
                near = known.nearest(strange[0]) if known else nearest(strange[0], published)
                hint = f"; the nearest that {'it knows' if known else 'is published'} is {near!r}" if near else ""
                if known:
                    count = len(words) - len(strange)
                    yield f"{where} knows {count} of {len(words)} words, and not {strange[0]!r}{hint}"
                else:
                    yield f"{where} is not on this machine, so whether it knows {strange[0]!r} is not known{hint}"


def nearest(word: str, words: set[str]) -> str | None:
    return next(iter(get_close_matches(word, sorted(words), n=1)), None)


def images_left_out(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    for source in (config.prompts, config.evaluate.prompts):
        if source.kind == "images" and (sentence := left_out(source.folder)):
            yield sentence


def prompts_without_reward(config: RunConfig, train: list[Prompt], held_out: list[Prompt]) -> Problems:
    kinds = [config.rewards[name].kind for name in config.trained]
    lost = [prompt.text for prompt in train if not any(judges(kind, prompt) for kind in kinds)]
    if lost:
        yield f"{len(lost)} of {len(train)} training prompts have no reward and teach nothing, such as {lost[0]!r}"
    for name, reward in config.rewards.items():
        if not any(judges(reward.kind, prompt) for prompt in held_out):
            yield f"rewards.{name} judges none of the held-out prompts: {NEEDS[reward.kind]}"


PROMPT_RULES = (enough_prompts, held_out_is_held_out, rewards_can_judge, detector_knows_the_objects)
NOTES = (
    density_without_use,
    settings_without_effect,
    merging_rounds,
    vanishing_noise,
    prompts_without_reward,
    unknown_control_words,
    images_left_out,
)

# Rewards that need more than a prompt's text, and what.
NEEDS = {
    "geneval": "it needs metadata with include clauses, as prompts of kind embedded, geneval and jsonl have",
    "ocr": "it needs prompts that quote text, as the embedded task ocr does",
}


def judges(kind: str, prompt: Prompt) -> bool:
    """Whether a reward of this kind has a value for the prompt."""
    if kind == "geneval":
        return bool(prompt.metadata.get("include"))
    if kind == "ocr":
        return bool(prompt.metadata.get("text") or quoted(prompt.text))
    return True
