"""The settings reference: complete, and true to the models."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from align_cluster.cli import main
from align_cluster.cli.inspection import elsewhere
from align_cluster.cli.parser import PARTS
from align_cluster.config.reference import explain, json_schema, meanings, settings, topics
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.serving.config import ServiceConfig
from align_cluster.settings import Root, Section

CONFIGS = Path(__file__).parents[2] / "configs"


def explained() -> set[type[Section]]:
    """The blocks that `explain` knows."""
    return {*topics(RunConfig).values(), *topics(ServiceConfig).values(), *elsewhere().values()}


def leaves(section: type[Section]) -> Iterator[type[Section]]:
    """The classes of settings that no other class builds on."""
    below = section.__subclasses__()
    yield from (leaf for one in below for leaf in leaves(one))
    if not below and not issubclass(section, Root):
        yield section


def test_every_block_that_users_write_is_explained():
    messages = ("rewards.wire", "serving.flow_grpo", "serving.application")  # what programs say to each other
    ours = {leaf for leaf in leaves(Section) if leaf.__module__.startswith("align_cluster.")}
    unknown = {leaf for leaf in ours - explained() if not leaf.__module__.endswith(messages)}
    assert len(ours) > 50 and not unknown


def test_the_settings_of_a_mode_of_steering_are_explained(capsys):
    for topic in ("", "steer"):
        assert main(["explain", topic]) == 0
        assert all(f"    steer.{mode}\n" in f"{capsys.readouterr().out}\n" for mode in ["smc"])
    assert main(["explain", "steer.smc"]) == 0 and "resample_below  (" in capsys.readouterr().out
    assert main(["explain", "prompts.jsonl.include"]) == 0 and "class  (text; must be given)" in capsys.readouterr().out
    assert main(["explain", "steer.scm"]) == 2 and "did you mean steer.smc" in capsys.readouterr().err


def test_every_setting_of_every_block_says_what_it_means():
    missing = {
        f"{block.__module__}.{block.__qualname__}.{name}"
        for block in explained()
        for name in block.model_fields
        if name != "kind" and len(meanings(block).get(name, "")) < 10
    }
    assert not missing, "\n".join(sorted(missing))


def test_types_bounds_and_defaults_are_those_of_the_models():
    rows = {row.name: row for row in settings(topics(RunConfig)["cluster"])}
    assert (rows["samplers"].type, rows["samplers"].default) == ("whole number > 0 or null", "null")
    assert (rows["timeout_s"].type, rows["timeout_s"].default) == ("number > 0", "600.0")
    rows = {row.name: row for row in settings(RunConfig)}
    assert (rows["steps"].type, rows["steps"].default) == ("whole number > 0", None)
    assert rows["backbone"].type == "block" and rows["rewards"].type == "blocks by name"
    rows = {row.name: row for row in settings(topics(RunConfig)["algorithm.ppo"])}
    assert rows["kl_mode"].type == "no_dt | exact_mean | exact_sum" and rows["critic"].default == "its defaults"


def test_a_block_is_explained_by_its_path_with_what_is_below_it(capsys):
    assert main(["explain", "rewards.hps"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Configures HPS.") and '(text; default "xswu/HPSv2")' in said
    assert "    rewards.hps.pool" in said and "rewards.geneval.detector.detr" in explain("rewards.geneval", RunConfig)
    assert "algorithm.nft" in explain("algorithm", RunConfig) and "rewards.hps.pool" not in explain("", RunConfig)
    assert main(["explain", "--service"]) == 0 and "port  (" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no block of settings 'rewards.hsp'; did you mean .*rewards.hps"):
        explain("rewards.hsp", RunConfig)


def test_the_schema_for_editors_holds_the_meanings():
    schema = json_schema(RunConfig)
    assert schema["properties"]["steps"]["description"] == meanings(RunConfig)["steps"]
    cluster = schema["$defs"]["ClusterConfig"]["properties"]["timeout_s"]
    assert cluster["description"] == meanings(topics(RunConfig)["cluster"])["timeout_s"]


def test_every_part_lists_its_kinds_with_a_line_about_each(capsys):
    for part in PARTS:
        assert main(["list", part]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) >= 2 and all(len(line.split(maxsplit=1)) == 2 for line in lines), part


def test_the_schemas_beside_the_run_files_are_current_and_every_file_names_one():
    """`align-cluster schema > configs/run.schema.json`, and with --service for service files, writes them again."""
    for name, root in (("run", RunConfig), ("service", ServiceConfig)):
        assert json.loads((CONFIGS / f"{name}.schema.json").read_text()) == json_schema(root)
    for file in CONFIGS.glob("*.yaml"):
        name = "service" if file.stem == "rewards_service" else "run"
        assert file.read_text().startswith(f"# yaml-language-server: $schema={name}.schema.json\n"), file
