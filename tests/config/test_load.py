import copy
import json
import os

import pytest
import yaml
from pydantic import ValidationError

from align_cluster.config.load import as_before, config_hash, differences, dump, load, loads
from align_cluster.config.messages import explain
from align_cluster.config.plan import settle
from align_cluster.config.reference import json_schema
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.serving.config import ServiceConfig


def complaint(text, *overrides):
    """The message of a run file that must be refused; one line for one mistake."""
    with pytest.raises(UserError) as caught:
        loads(text, "run.yaml", overrides)
    return str(caught.value)


def test_a_run_file_loads_with_defaults_and_numbers_in_every_notation(text):
    config = loads(text)
    assert config.optimizer.lr == 1e-4 and config.rollout.guidance == 1.0
    assert loads(text.replace("1e-4", "1.0E-04")) == config


# One mistake each: what to replace in the run file, by what, and what the sentence must say.
MISTAKES = [
    ("steps: 3\n", "stepz: 3\n", ["stepz is no setting", "did you mean steps?"]),
    ("group_size: 6", "grup_size: 6", ["rollout.grup_size is no setting", "did you mean rollout.group_size?"]),
    ("  steps: 4", "  group_size_: 4", ["rollout.group_size_", "did you mean rollout.group_size?"]),
    ("optimizer:\n  lr", "optimizer:\n  learning_rate", ["optimizer.learning_rate", "optimizer has lr, betas"]),
    ("name: test", "name: test\nlr: 3", ["lr is no setting", "did you mean optimizer.lr?"]),
    ("name: test", "name: test\ngroup_size: 3", ["group_size is no setting", "did you mean rollout.group_size?"]),
    (
        "name: test",
        "name: test\ncluster: {samplers: 4, max_samplers: 2}",
        ["cluster.max_samplers is 2", "at least samplers, 4"],
    ),
    (
        "group_size: 6",
        "embedded_guidance: 6",
        ["rollout.embedded_guidance is no setting", "it is called rollout.distilled_guidance now"],
    ),
    (
        "path: embedded",
        "path: embedded\n  embedded_guidance: 1",
        ["backbone.embedded_guidance is no setting", "it is called backbone.distilled_guidance now"],
    ),
    (
        "kind: geneval",
        "kind: geneval\n    hedge_s: 2",
        ["rewards.judge.hedge_s is no setting", "it is gone: requests", "sent once", "leave it out"],
    ),
    ("name: test", "name: test\nxyz: 3", ["xyz is no setting", "a run has name, out, seed"]),
    ("kind: nft", "kind: nfd", ["algorithm.kind is 'nfd'", "one of grpo, nft", "did you mean nft?"]),
    ("  kind: nft", "  beta: 1.0", ["algorithm.kind is missing", "one of grpo, nft"]),
    ("algorithm:\n  kind: nft", "algorithm: nft", ["algorithm is 'nft'", "write it as algorithm.kind: nft"]),
    (
        "algorithm:\n  kind: nft",
        "algorithm: [nft]",
        ["algorithm is ['nft']", "mapping of settings such as algorithm.kind"],
    ),
    ("algorithm:\n  kind: nft\n", "", ["algorithm is missing", "add algorithm.kind, one of grpo, nft"]),
    ("  kind: nft", "  kind: nft\n  kl_mode: no_dt", ["algorithm.kl_mode is no setting", "algorithm has kind, beta"]),
    ("  kind: nft", "  kind: nft\n  kl_betta: 1.0", ["algorithm.kl_betta", "did you mean algorithm.kl_beta?"]),
    ("  kind: nft", "  kind: nft\n  beta: 0", ["algorithm.beta is 0", "above 0"]),
    ("  kind: nft", "  kind: nft\n  old: sloww", ["algorithm.old is 'sloww'", "'slow'", "did you mean slow?"]),
    ("kind: geneval", "kind: gen_eval", ["rewards.judge.kind is 'gen_eval'", "did you mean geneval?"]),
    ("kind: geneval", "kind: geneval\n    wieght: 2", ["rewards.judge.wieght", "did you mean rewards.judge.weight?"]),
    (
        "kind: geneval",
        "kind: geneval\n    role: training",
        ["rewards.judge.role is 'training'", "'train' or 'monitor'"],
    ),
    (
        "kind: geneval",
        "kind: geneval\n    detector: mask2fromer",
        ["rewards.judge.detector.kind is 'mask2fromer'", "did you mean mask2former?"],
    ),
    (
        "kind: geneval",
        "kind: geneval\n    detector: {kind: detr, pth: a}",
        ["rewards.judge.detector.pth", "did you mean rewards.judge.detector.path?"],
    ),
    ("kind: geneval", "kind: geneval\n    detector: [detr]", ["rewards.judge.detector is ['detr']", "detector.kind"]),
    ("kind: geneval", "kind: geneval\n    threshold: 1.5", ["rewards.judge.threshold is 1.5", "below 1"]),
    ("rewards:\n  judge:\n    kind: geneval", "rewards: {}", ["rewards is {}", "at least 1 entry"]),
    ("rewards:\n  judge:\n    kind: geneval", "rewards:\n  judge: geneval", ["rewards.judge.kind: geneval"]),
    ("steps: 3\n", "", ["steps is missing", "add steps: a whole number"]),
    ("name: test\n", "", ["name is missing", "add name: text"]),
    ("steps: 3\n", "steps: 0\n", ["steps is 0", "above 0"]),
    ("steps: 3\n", "steps: 2.5\n", ["steps is 2.5", "a whole number"]),
    ("steps: 3\n", "steps: many\n", ["steps is 'many'", "a whole number"]),
    ("steps: 3\n", "steps: [3]\n", ["steps is [3]", "a whole number"]),
    ("steps: 3\n", "steps: null\n", ["steps is null", "a whole number"]),
    ("name: test", "name: 2024", ["name is 2024", "text", "quotes"]),
    ("name: test", "name: a/b", ["name is 'a/b'", "letters, digits"]),
    ("name: test", "name: ..", ["name is '..'", "letters, digits"]),
    ("name: test", "name: .x", ["name is '.x'", "inside of it, dots"]),
    ("name: test", f"name: {'a' * 101}", ["name is 'aaa", "at most 100 characters"]),
    ("name: test", "name: test\nout: ~nobodyhere/runs", ["out is '~nobodyhere/runs'", "write the path in full"]),
    ("name: test", 'name: test\nout: "a\\0b"', ["out is 'a\\x00b'", "a character that no file"]),
    ("name: test", 'name: test\nout: "a\\ud800"', ["out is 'a\\ud800'", "a character that no file"]),
    ("name: test", f"name: test\nout: runs/{'a' * 300}", ["out is 'runs/aaa", "too long for a path"]),
    ("steps: 3\n", "steps: true\n", ["steps is 'true'", "a whole number"]),
    ("steps: 3\n", "steps: 1:30:00\n", ["steps is '1:30:00'", "a whole number"]),
    ("steps: 3\n", "steps: 1_0_\n", ["steps is '1_0_'", "a whole number"]),
    ("steps: 3\n", "seed: 0x_\nsteps: 3\n", ["seed is '0x_'", "a whole number"]),
    ("name: test", f"name: test\nseed: {2**70}", ["seed is 11805", f"below {2**63}"]),
    ("steps: 3\n", f"steps: {2**70}\n", ["steps is 11805", f"below {2**63}"]),
    ("lr: 1e-4", "lr: yes", ["optimizer.lr is 'true'", "a number"]),
    ("lr: 1e-4", "betas: [0.9, true]", ["optimizer.betas.1 is 'true'", "a number"]),
    ("evaluate:\n", "learner:\n  zero_stage: true\nevaluate:\n", ["learner.zero_stage is 'true'", "0, 1, 2 or 3"]),
    ("path: embedded", "path: embedded\n  lora: {targets: []}", ["backbone.lora.targets is []", "at least 1 entry"]),
    ("lr: 1e-4", "lr: -1e-4", ["optimizer.lr is -0.0001", "above 0"]),
    ("lr: 1e-4", "lr: .nan", ["optimizer.lr is nan", "a finite number"]),
    ("lr: 1e-4", "lr: fast", ["optimizer.lr is 'fast'", "a number"]),
    ("lr: 1e-4", "betas: [0.9]", ["optimizer.betas.1 is missing", "the list is too short"]),
    ("lr: 1e-4", "betas: [0.9, 2]", ["optimizer.betas.1 is 2", "at most 1"]),
    ("lr: 1e-4", "betas: 0.9", ["optimizer.betas is 0.9", "a list in [brackets]"]),
    ("lr: 1e-4", "schedule: exponential", ["optimizer.schedule is 'exponential'", "'constant', 'linear' or 'cosine'"]),
    ("optimizer:\n  lr: 1e-4", "optimizer: 3", ["optimizer is 3", "a mapping of settings such as optimizer.lr"]),
    ("  steps: 4", "  step: {kind: sde}", ["rollout.step.kind is 'sde'", "euler, dpm2, flow_sde"]),
    (
        "  steps: 4",
        "  step: {kind: flow_sde, noise: 1}",
        ["rollout.step.noise is no", "did you mean rollout.step.noise_level?"],
    ),
    ("  steps: 4", "  guidance: 0.5", ["rollout.guidance is 0.5", "at least 1"]),
    ("path: embedded", "path: embedded\n  height: 500", ["backbone.height is 500", "a multiple of 16"]),
    ("path: embedded", "path: embedded\n  lora: {rank: 0}", ["backbone.lora.rank is 0", "above 0"]),
    ("kind: sd3", "kind: sdxl", ["backbone.kind is 'sdxl'", "sd3, flux"]),
    ("tasks: [colors]\nrollout", "tasks: [colours]\nrollout", ["prompts.tasks.0 is 'colours'", "did you mean colors?"]),
    ("tasks: [colors]\nrollout", "tasks: [colors, colors]\nrollout", ["prompts.tasks", "names 'colors' once"]),
    ("tasks: [colors]\nrollout", "tasks: []\nrollout", ["prompts.tasks is []", "at least 1 entry"]),
    ("split: held_out", "split: heldout", ["evaluate.prompts.split is 'heldout'", "did you mean held_out?"]),
    ("evaluate:\n", "learner:\n  zero_stage: 4\nevaluate:\n", ["learner.zero_stage is 4", "0, 1, 2 or 3"]),
    ("evaluate:\n", "learner:\n  ema: 1\nevaluate:\n", ["learner.ema is 1", "below 1"]),
    (
        "evaluate:\n",
        "cluster:\n  gpus: 1\nevaluate:\n",
        ["cluster.gpus is no setting", "cluster has address, nodes, samplers"],
    ),
    (
        "kind: embedded\n  tasks: [colors]\nrollout",
        "kind: geneval\n  ratios: {colours: 1}\nrollout",
        ["prompts.ratios.colours is no setting", "did you mean colors?"],
    ),
    ("evaluate:\n", "cluster:\n  1: 2\nevaluate:\n", ["run.yaml, line", "name must be text"]),
    ("name: test", "name: test\nname: again", ["run.yaml, line 2", "name is set twice"]),
    ("  steps: 4", "  steps: [4", ["run.yaml, line", "correct that line"]),
    ("  steps: 4", "\tsteps: 4", ["run.yaml, line 12", "correct that line"]),
]


@pytest.mark.parametrize(("old", "new", "parts"), MISTAKES, ids=[" ".join(m[2][0].split()) for m in MISTAKES])
def test_one_mistake_gives_one_sentence_with_place_and_remedy(text, old, new, parts):
    assert old in text
    message = complaint(text.replace(old, new, 1))
    assert "\n" not in message and message.startswith("run.yaml")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["run.yaml is empty", "configs/quickstart.yaml"]),
        ("# only a comment\n", ["run.yaml is empty"]),
        ("- a\n- b\n", ["holds a list", "a mapping"]),
        ("hello", ["holds a str", "a mapping"]),
        ("a: \x00", ["not YAML"]),
        ("a: !!python/object:os.system x", ["line 1", "could not determine a constructor"]),
        ("a: 1\nb: !!int abc", ["line 2", "'abc' cannot be read as int"]),
        ("a: !!float abc", ["'abc' cannot be read as float"]),
        ("a: !!bool abc", ["'abc' cannot be read as bool"]),
        ("a: !!timestamp x", ["could not determine a constructor"]),
        ("a: !!binary eA==", ["could not determine a constructor"]),
        ("a: !!set {x}", ["could not determine a constructor"]),
        ("!!str [a]: 1", ["a setting's name must be text"]),
        (f"a: {'1' * 5000}", ["line 1", "cannot be read as int"]),
        ('a: "\\UFFFFFFFF"', ["is not YAML"]),
        (f"%YAML {'1' * 5000}.1\n---\na: 1", ["is not YAML"]),
        (f"a: {'[' * 3000}", ["line 1", "nested more than 50 deep"]),
        (f"a: {'{b: ' * 3000}", ["nested more than 50 deep"]),
        ("".join(f"{' ' * depth}a:\n" for depth in range(300)), ["nested more than 50 deep"]),
        ('"a\\n\\nb": 1\n"a\\n\\nb": 2', ["line 2: a b is set twice"]),
        ("a: &a [*a]", ["the alias *a is inside of what it stands for"]),
        (f"a: [{'1,' * 30_000}]", ["more than 20000 values"]),
        (f"a: {'x' * 300_000}", ["has 300003 characters", "shorten it"]),
    ],
    ids=lambda given: given[:20] if isinstance(given, str) else given[-1],
)
def test_what_is_no_run_file_gives_one_sentence(text, parts):
    message = complaint(text)
    assert "\n" not in message and all(part in message for part in parts)


@pytest.mark.parametrize("doubled", ["[*a{0}, *a{0}]", "{{l: *a{0}, r: *a{0}}}", "{{<<: [*a{0}, *a{0}]}}"])
def test_aliases_that_stand_for_billions_are_counted_before_a_value_is_made(doubled):
    lines = [f"a{level + 1}: &a{level + 1} {doubled.format(level)}" for level in range(40)]
    lines.insert(0, "a0: &a0 {x: 1}")
    assert "more than 20000 values, with aliases written out" in complaint("\n".join(lines))


def test_an_unquoted_date_or_time_is_text_and_a_leading_zero_changes_nothing(text):
    assert loads(text.replace("name: test", "name: 2024-13-45")).name == "2024-13-45"
    assert loads(text.replace("steps: 3\n", "steps: 010\n")).steps == 10


def test_what_is_no_file_of_settings_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"name: \xe9")
    (tmp_path / "large").write_text(" " * 2**19)
    said = {tmp_path / "pipe": "is no file", "/dev/zero": "is no file", tmp_path / "latin": "cannot be read"}
    said |= {tmp_path / "large": "more than", "a\0b": "a character that no file", "~nobodyhere/x": "in full"}
    said |= {"a" * 300: "too long for a path", "\ud800": "a character that no file"}
    for path, words in said.items():
        with pytest.raises(UserError, match=words) as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path, text):
    (tmp_path / "quickstart.yaml").write_text(text)
    with pytest.raises(UserError, match="quikstart.yaml does not exist; did you mean .*quickstart.yaml"):
        load(tmp_path / "quikstart.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)


JUNK = [
    None,
    True,
    -1,
    0,
    1.5,
    "junk",
    "",
    [],
    {},
    [1, 2, 3],
    {"kind": "junk"},
    {"kind": None},
    {"kind": ["x"]},
    10**30,
]


def paths(block, above=()):
    for key, value in block.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def test_any_setting_may_hold_any_junk_and_is_accepted_or_named(run_config):
    resolved = yaml.safe_load(dump(run_config("algorithm.kind=grpo", "rollout.step.kind=flow_sde")))
    for path in paths(resolved):
        for junk in JUNK:
            data = copy.deepcopy(resolved)
            block = data
            for key in path[:-1]:
                block = block[key]
            block[path[-1]] = junk
            try:
                RunConfig.model_validate(data)
            except ValidationError as error:
                for line in explain(error, "run.yaml", set()):
                    assert line.startswith(f"run.yaml: {'.'.join(path)}"), line


def test_several_mistakes_are_listed_with_unknown_settings_first(text):
    lines = complaint(text.replace("steps: 3", "steps: x").replace("group_size", "grup_size")).splitlines()
    assert len(lines) == 2 and "grup_size" in lines[0] and "steps is 'x'" in lines[1]


def test_blocks_may_be_shared_by_yaml_anchors(text):
    shared = text.replace("prompts:\n  kind: embedded", "prompts: &words\n  kind: embedded", 1)
    start = shared.index("    kind: embedded\n    tasks")
    shared = shared[:start] + "    <<: *words\n    split: held_out\n"
    assert loads(shared).evaluate.prompts == loads(text).evaluate.prompts


def test_overrides_set_dotted_paths_to_yaml_values(run_config):
    config = run_config(
        "optimizer.betas=[0.8, 0.9]", "rollout.chunk=null", "name='7'", "rollout.step.kind=euler", "steps=9"
    )
    assert config.optimizer.betas == (0.8, 0.9) and config.rollout.chunk is None
    assert (config.name, config.rollout.step.kind, config.steps) == ("7", "euler", 9)


def test_the_last_override_of_a_setting_wins(run_config):
    assert run_config("steps=5", "steps=6").steps == 6


def test_a_new_kind_starts_its_block_anew_whatever_the_order(text):
    text = text.replace("kind: nft", "kind: nft\n  beta: 0.5\n  kl_beta: 0.2")
    for overrides in (["algorithm.kind=grpo", "algorithm.clip=1e-3"], ["algorithm.clip=1e-3", "algorithm.kind=grpo"]):
        algorithm = loads(text, "run.yaml", overrides).algorithm
        assert algorithm.kind == "grpo" and algorithm.clip == 1e-3
        assert algorithm.kl_beta == type(algorithm)().kl_beta, "nft's kl_beta must not leak into grpo"


def test_the_same_kind_keeps_its_block(text):
    text = text.replace("kind: nft", "kind: nft\n  beta: 0.5")
    assert loads(text, "run.yaml", ["algorithm.kind=nft"]).algorithm.beta == 0.5


def test_an_override_can_add_a_reward(run_config):
    config = run_config("rewards.clip.kind=clip_score", "rewards.clip.role=monitor")
    assert list(config.rewards) == ["judge", "clip"]


def test_null_removes_a_reward_and_overrides_apply_in_their_order(run_config):
    clip = ["rewards.clip.kind=clip_score", "rewards.clip.role=monitor"]
    assert list(run_config(*clip, "rewards.judge=null").rewards) == ["clip"]
    assert list(run_config(*clip, "rewards.clip=null").rewards) == ["judge"]
    again = run_config("rewards.judge.weight=3", "rewards.judge=null", "rewards.judge.kind=jpeg", *clip)
    assert (again.rewards["judge"].kind, again.rewards["judge"].weight) == ("jpeg", 1)
    assert again.rewards["clip"].role == "monitor"
    late = run_config("rewards.judge=null", "rewards.judge.weight=3", "steps=4", "rewards.judge.kind=jpeg")
    assert (late.rewards["judge"].weight, late.steps) == (3, 4)
    service = "rewards: {a: {kind: jpeg}, b: {kind: jpeg}}\ndeployments: {a: {cpus: 2}, b: {cpus: 2}}"
    left = loads(service, "service.yaml", ["rewards.a=null", "deployments.a=null"], ServiceConfig)
    assert list(left.rewards) == list(left.deployments) == ["b"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rewards.jugde=null", ["--set rewards.jugde=null: there is none to remove", "rewards has judge"]),
        ("rewards.judge=null", ["rewards is {}", "at least 1 entry"]),
        ("algorithm.beta=null", ["--set: algorithm.beta is null", "a number"]),
        ("steps", ["--set steps", "path=value"]),
        ("=3", ["--set =3", "path=value"]),
        ("a..b=3", ["--set a..b=3", "path=value"]),
        ("steps=[", ["--set steps=[", "correct that line"]),
        ("steps.more=3", ["--set steps.more", "steps is 3", "set steps itself"]),
        ("rollout.grup_size=3", ["--set: rollout.grup_size", "did you mean rollout.group_size?"]),
        ("steps.a\n\nb.c=3", ["--set steps.a b.c: steps is 3", "set steps itself"]),
        ("a\n\nb=3", ["--set: a b is no setting"]),
        ("\n\n", ["path=value"]),
        ("steps=many", ["--set: steps is 'many'", "a whole number"]),
        ("algorithm=grpo", ["--set: algorithm is 'grpo'", "algorithm.kind: grpo"]),
    ],
)
def test_a_bad_override_gives_one_sentence_that_names_it(text, override, parts):
    message = complaint(text, override)
    assert "\n" not in message and all(part in message for part in parts)


@pytest.mark.parametrize(
    "overrides", [(), ("algorithm.kind=grpo", "rollout.step.kind=flow_sde", "name='1e5'", "optimizer.lr=3e-7")]
)
def test_the_resolved_config_loads_back_equal(run_config, tmp_path, overrides):
    config = run_config(*overrides)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(path) == config and config_hash(load(path)) == config_hash(config)


def test_the_hash_follows_what_the_result_depends_on(run_config):
    later = ("rewards.judge.on_failure.stop_after=9",)
    same = {config_hash(run_config(*o)) for o in ((), ("name=other",), ("out=/x",), ("cluster.samplers=7",), later)}
    other = {config_hash(run_config(*o)) for o in (("seed=1",), ("optimizer.lr=2e-4",), ("rollout.chunk=3",))}
    assert len(same) == 1 and len(other) == 3 and not same & other


def test_a_resumed_run_goes_on_with_the_batches_that_were_chosen_when_it_began(run_config):
    began = settle(run_config(), 2, 0)
    old = began.model_dump(mode="json")
    assert differences(old, run_config()) == [] and as_before(old, run_config()) == began
    assert settle(as_before(old, run_config("rollout.chunk=12")), 64, 8) == began
    (odd,) = differences(old, run_config("rollout.chunk=3"))
    assert odd == "rollout.chunk: 12 there, 3 here"
    open_run = run_config("learner.updates_per_step=2")
    assert as_before(open_run.model_dump(mode="json"), open_run) == open_run, "an older run has none"


def test_the_schema_describes_every_block():
    schema = json_schema(RunConfig)
    assert set(schema["properties"]) == set(RunConfig.model_fields) and json.dumps(schema)


def test_settings_are_frozen(run_config):
    with pytest.raises(Exception, match="frozen"):
        run_config().steps = 5
