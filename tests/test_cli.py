import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align_cluster.cli import build_parser, main
from align_cluster.machine import cores

ROOT = Path(__file__).parents[1]
COMMANDS = "init train validate plan sample evaluate export submit serve-rewards score scale doctor report".split()
COMMANDS += ["schema", "explain", "list", "completion"]


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.chdir(ROOT)
    return "configs/quickstart.yaml"


def test_help_answers_at_once_and_imports_nothing_heavy():
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from align_cluster.cli import build_parser; build_parser().format_help()\n"
        "heavy = ('numpy', 'torch', 'pydantic', 'yaml', 'ray')\n"
        "print(time.perf_counter() - start, [name for name in heavy if name in sys.modules])"
    )
    seconds, modules = [], ""
    for _ in range(3):  # the best of three: other processes may have the cores
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        first, modules = done.stdout.split(maxsplit=1)
        seconds.append(float(first))
    assert modules.strip() == "[]" and min(seconds) < 0.5


def test_every_command_explains_itself_with_an_example(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            build_parser().parse_args([command, "--help"])
        assert caught.value.code == 0
        assert f"example:\n  align-cluster {command}" in capsys.readouterr().out
    assert set(COMMANDS) == set(re.findall(r"^    ([a-z-]+)", build_parser().format_help(), re.MULTILINE))


def test_validate_names_the_run_and_its_hash(quickstart, capsys):
    assert main(["validate", quickstart]) == 0
    out = capsys.readouterr().out
    assert out.startswith("configs/quickstart.yaml is valid: nft on embedded")


def test_validate_resolved_prints_yaml_that_loads(quickstart, capsys, tmp_path):
    assert main(["validate", quickstart, "--resolved", "--set", "steps=7"]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    assert main(["validate", str(tmp_path / "resolved.yaml")]) == 0
    assert "7 steps" in capsys.readouterr().out


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(quickstart, capsys):
    assert main(["validate", quickstart, "--set", "rollout.grup_size=3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: --set: rollout.grup_size is no setting; did you mean rollout.group_size?\n"


def test_several_mistakes_are_one_line_each(quickstart, capsys):
    assert main(["validate", quickstart, "--set", "learner.updates_per_step=1000", "rewards.geneval.role=monitor"]) == 2
    assert [line[:6] for line in capsys.readouterr().err.splitlines()] == ["error:"] * 2


def test_set_takes_several_values_and_may_be_repeated(quickstart, capsys):
    assert (
        main(["validate", quickstart, "--set", "steps=2", "seed=3", "--set", "prompts_per_step=6", "--resolved"]) == 0
    )
    out = capsys.readouterr().out
    assert "steps: 2\n" in out and "seed: 3\n" in out and "prompts_per_step: 6\n" in out


def test_notes_go_to_stderr(quickstart, capsys):
    assert main(["validate", quickstart, "--set", "rollout.step.kind=flow_sde"]) == 0
    assert capsys.readouterr().err.startswith("note: rollout.step.kind is flow_sde")


def test_plan_for_this_machine_and_for_another(quickstart, capsys):
    assert main(["plan", quickstart]) == 0
    out = capsys.readouterr().out
    assert "samplers" in out and "MiB a worker" in out and "all workers hold" in out
    another = ["--cores", "16", "--gpus", "4", "--gpu-memory", "80", "--json", "--set", "learner.updates_per_step=1"]
    assert main(["plan", quickstart, *another]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["samplers"], plan["learners"], plan["sampler_gpus"]) == (4, 4, 0.5)
    assert plan["estimate"]["parameters"]["lora"] == 319488
    assert plan["estimate"]["fits"] is True and plan["estimate"]["seconds"]["update"] > 0


def test_plan_says_what_to_change_where_a_run_does_not_fit(quickstart, capsys):
    large = ["rollout.chunk=48", "learner.micro_batch=24", "learner.fold=2"]
    assert main(["plan", quickstart, "--gpu-memory", "1.1", "--set", *large]) == 0
    out = capsys.readouterr().out
    assert "seconds a step" in out and "of 1.1 GiB with 0.5 for each process's CUDA: it does not fit" in out
    assert "these settings save most, each alone: learner.gradient_checkpointing: true (55.9 MiB), " in out
    assert "learner.fold: 1 (39.0 MiB)" in out


def test_plan_needs_no_model_to_plan_pools(quickstart, capsys):
    assert main(["plan", quickstart, "--set", "backbone.path=nobody/nothing"]) == 0
    captured = capsys.readouterr()
    assert "samplers" in captured.out and "MiB" not in captured.out
    assert "note: memory and FLOPs are not known: backbone.path: 'nobody/nothing'" in captured.err
    assert main(["plan", quickstart, "--gpu-memory", "80", "--set", "backbone.path=nobody/nothing"]) == 0
    assert "note: memory and FLOPs are not known: backbone.path: 'nobody/nothing'" in capsys.readouterr().err


def test_schema_is_json(capsys):
    assert main(["schema"]) == 0
    assert "rollout" in json.loads(capsys.readouterr().out)["properties"]


def test_resume_is_refused_with_one_sentence(quickstart, capsys):
    assert main(["train", quickstart, "--resume", "runs/x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


CONFIG, SERVICE = "configs/quickstart.yaml", "configs/rewards_service.yaml"
REFUSED = [
    (["train", "missing.yaml"], "missing.yaml does not exist"),
    (["sample", "configs/quickstart.yaml"], "sample needs prompts"),
    (["sample", "configs/quickstart.yaml", "--prompt", "x", "--lora", "nowhere"], "nowhere holds no LoRA"),
    (["sample", "configs/quickstart.yaml", "--prompts", "nowhere.txt"], "nowhere.txt does not exist"),
    (["sample", "configs/quickstart.yaml", "--prompt", "x", "--count", "0"], "'0' is no whole number of at least 1"),
    (["evaluate", "runs/nowhere"], "runs/nowhere does not exist"),
    *((["plan", CONFIG, "--gpu-memory", text], "--gpu-memory: ") for text in ("0", "-1", "nan", "inf", "much")),
    *((["plan", CONFIG, "--gpus", text], "--gpus: ") for text in ("-1", "1.5", "many", "9" * 30, "9" * 5000)),
    *(
        (["plan", CONFIG, "--cores", text], f"--cores: '{text}' is no whole number of at least 1")
        for text in ("0", "-1")
    ),
    *((["sample", CONFIG, "--prompt", "x", "--guidance", text], "--guidance: ") for text in ("nan", "inf", "0.5", "x")),
    *((["sample", CONFIG, "--prompt", "x", "--steps", text], "--steps: ") for text in ("0", "-1", "x")),
    *((["sample", CONFIG, "--prompt", "x", "--seed", text], "--seed: ") for text in ("-1", str(2**70), "x")),
    (["sample", CONFIG, "--prompt", "\udcff"], "bytes that are no UTF-8"),
    (["validate", "a\0b"], "holds NUL"),
    (["validate", "~nobodyhere/run.yaml"], "~nobodyhere/run.yaml begins with the home of a user who is not here"),
    (["validate", "a" * 300], "too long for a path"),
    (["evaluate", "a" * 300], "too long for a path"),
    *(
        (
            [*command, SERVICE],
            f"{SERVICE} describes a service, and this command takes the file of a run, such as {CONFIG}; ",
        )
        for command in (["validate"], ["train"], ["evaluate"], ["sample", "--prompt", "a star", "--config"])
    ),
    (["validate", SERVICE, "--set", "port=9000"], f"; `align-cluster serve-rewards {SERVICE}` checks and serves it"),
    (
        ["serve-rewards", CONFIG],
        f"{CONFIG} describes a run, and this command takes the file of a service, such as {SERVICE}; ",
    ),
    (["serve-rewards", CONFIG, "--set", "steps=x"], f"; `align-cluster validate {CONFIG}` checks it"),
    (["doctor", "runs/x", "--address", "auto"], "doctor RUN looks at what runs/x does; leave --address out"),
    (["doctor", "runs/x", "--config", CONFIG], "doctor RUN looks at what runs/x does; leave --config out"),
    (["evaluate", CONFIG, "--out", "nowhere/scores.json"], "nowhere/scores.json cannot be written (No such file"),
    (["evaluate", CONFIG, "--out", "configs"], "configs cannot be written (it is a folder)"),
    (["evaluate", "~nobodyhere"], "the home of a user who is not here"),
    (["sample", CONFIG, "--prompt", "x", "--lora", "a" * 300], "too long for a path"),
    (["sample", CONFIG, "--prompt", "x", "--out", "a" * 300], "too long for a path"),
    (["export", "~nobodyhere", "--to", "lora", "--out", "x"], "the home of a user who is not here"),
    (["export", CONFIG, "--to", "lora", "--out", "/dev/null/x"], "--out /dev/null/x cannot be made"),
    (["train", CONFIG, "--name", ".."], "name is '..'"),
    (["train", CONFIG, "--name", "a" * 300], "at most 100 characters"),
    (["train", CONFIG, "--out", "~nobodyhere/runs"], "the home of a user who is not here"),
    (["validate", CONFIG, "--set", f"{'a.' * 5000}a=1"], "write it as path=value"),
    (["validate", CONFIG, "--set", "seed=!!int x"], "--set seed=!!int x, line 1: 'x' cannot be read as int"),
    *(
        (
            ["score", "--url", "http://127.0.0.1:9", "--reward", "x", "--prompt", "x", "--metadata", text, "x.png"],
            "--metadata",
        )
        for text in ('{"a": NaN}', "[" * 5000, '{"a": ' * 200 + "1" + "}" * 200, "3", "[1]", f'{{"a": {"1" * 5000}}}')
    ),
    (["score", "--url", "x", "--reward", "x", "--prompt", "x", "--timeout", "nan", "x.png"], "--timeout: "),
    ([], "the following arguments are required: COMMAND"),
    (["plan"], "the following arguments are required: CONFIG"),
    (["plna"], "invalid choice: 'plna'"),
    (["submit", "configs/quickstart.yaml", "--address", "http://127.0.0.1:1"], "give --out an absolute path"),
    (["submit", "configs/quickstart.yaml", "--out", "/x"], "give --address"),
    (["submit", "configs/quickstart.yaml", "--out", "/x", "--address", "ray://h:1"], "is no dashboard"),
    (
        ["submit", "configs/quickstart.yaml", "--out", "/x", "--address", "http://127.0.0.1:1"],
        "no Ray dashboard answers",
    ),
]


def test_what_cannot_work_is_one_sentence_and_exit_code_2(quickstart, capsys, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    for arguments, words in REFUSED:
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_an_interrupt_exits_with_130(quickstart, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("align_cluster.config.load.load", interrupted)
    assert main(["validate", quickstart]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_other_errors_keep_their_trace(quickstart, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("align_cluster.config.load.load", broken)
    with pytest.raises(ZeroDivisionError):
        main(["validate", quickstart])


def test_doctor_reports_what_is_there(capsys):
    assert main(["doctor", "--quick", "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["state"] == "ok" and findings["cores"]["value"] == str(cores())
    assert findings["embedded model"]["state"] == "ok"


def test_the_module_runs_as_a_script():
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "align_cluster.cli", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("align-cluster ") and time.perf_counter() - started < 5


def test_a_misspelt_command_is_told_with_the_one_that_was_meant(capsys):
    for words, meant in ({"tran x.yaml": "train", "list reward": "rewards", "completion bahs": "bash"}).items():
        assert main(words.split()) == 2
        assert f"did you mean {meant}?" in capsys.readouterr().err


def test_shells_complete_commands_options_and_files(capsys):
    for shell in ("bash", "zsh", "tcsh"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert "serve-rewards" in script and "gpu-memory" in script and "align-cluster" in script
    assert main(["completion", "bash"]) == 0
    assert "_train_pos_0_COMPGEN=_shtab_compgen_files" in capsys.readouterr().out
