"""What the package must never do: run code that it reads, listen to others unasked, write down a secret."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from align_cluster.cli import main
from align_cluster.config.load import load, loads
from align_cluster.errors import UserError
from align_cluster.serving.config import ServiceConfig
from align_cluster.settings import masked

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "align_cluster"
FORBIDDEN = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "makes code of text",
    "__import__": "imports what a text names",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "pickle.load": "unpickles",
    "pickle.loads": "unpickles",
    "pickle.Unpickler": "unpickles",
    "cloudpickle.load": "unpickles",
    "cloudpickle.loads": "unpickles",
    "dill.load": "unpickles",
    "joblib.load": "unpickles",
    "pandas.read_pickle": "unpickles",
    "marshal.loads": "makes code of bytes",
    "shelve.open": "unpickles",
    "yaml.load_all": "makes objects of text: use yaml.safe_load",
    "yaml.unsafe_load": "makes objects of text: use yaml.safe_load",
    "yaml.full_load": "makes objects of text: use yaml.safe_load",
    "tempfile.mktemp": "gives others time to take the name",
    "extractall": "writes wherever an archive says",
}
SWITCHES = {
    "shell": True,
    "allow_pickle": True,
    "trust_remote_code": True,
    "weights_only": False,
    "verify": False,
}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its dotted name, which begins with a dot for a method of an expression."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts, target = [], node.func
            while isinstance(target, ast.Attribute):
                parts.append(target.attr)
                target = target.value
            parts.append(target.id if isinstance(target, ast.Name) else "")
            yield ".".join(reversed(parts)), node


def findings(source: str, name: str = "module.py") -> list[str]:
    """What is dangerous in a module, one line each."""
    found = []
    for called, node in calls(ast.parse(source)):
        words = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        where = f"{name}:{node.lineno}: {called}"
        tail = ".".join(called.split(".")[-2:])
        names = {called, tail} | ({"extractall"} if called.endswith(".extractall") else set())
        found += [f"{where} {FORBIDDEN[name]}" for name in names & FORBIDDEN.keys()]
        found += [f"{where} with {word}={value}" for word, value in words.items() if value is SWITCHES.get(word, ...)]
        loads_weights = called == "torch.load" or called.endswith("load_state_dict_from_url")
        if loads_weights and words.get("weights_only") is not True:
            found.append(f"{where} without weights_only=True")
        if called in ("np.load", "numpy.load") and words.get("allow_pickle") is not False:
            found.append(f"{where} without allow_pickle=False")
        if called == "yaml.load" and not (len(node.args) == 2 and getattr(node.args[1], "id", "") == "_Loader"):
            found.append(f"{where} makes objects of text: use yaml.safe_load")
    return found


def test_nothing_in_the_package_can_run_code_that_it_reads():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert len(files) > 100
    found = [line for file in files for line in findings(file.read_text(), str(file.relative_to(ROOT)))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.hub.load_state_dict_from_url(url)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "pickle.loads(body)",
        "ray.cloudpickle.loads(body)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "tarfile.open(path).extractall()",
        "requests.get(url, verify=False)",
    ],
)
def test_each_dangerous_call_would_be_found(line):
    assert len(findings(line)) >= 1


def test_the_one_yaml_loader_makes_plain_values_only():
    from yaml import SafeLoader

    from align_cluster.plain import _Loader

    assert issubclass(_Loader, SafeLoader)
    with pytest.raises(UserError, match="could not determine a constructor for the tag"):
        loads("name: !!python/object/apply:os.system ['true']")


@pytest.mark.parametrize(
    "override",
    [
        "rewards.clip.pool.pip=[git+https://ghp_12345@example.org/repository]",
        "rewards.clip.pool.pip=[--extra-index-url https://me:hunter2@example.org/simple]",
        "backbone.path=https://me:hunter2@example.org/model",
        "out=ftp://me:hunter2@example.org/runs",
        "cluster.address=http://me:hunter2@example.org:8265",
    ],
)
def test_a_password_in_a_setting_is_refused_and_not_repeated(override, capsys):
    """What no config can hold, no config.yaml, summary, report or uploaded job shows."""
    assert main(["validate", str(ROOT / "tests/system/tiny.yaml"), "--set", override]) == 2
    said = capsys.readouterr().err
    assert "without a user or password" in said and "***" in said
    assert "hunter2" not in said and "ghp_12345" not in said


def test_addresses_without_a_password_are_taken():
    pip = "rewards.clip.pool.pip=[git+ssh://git@example.org/repository, mail-of-me@1.0]"
    assert load(ROOT / "tests/system/tiny.yaml", [pip]).rewards["clip"].pool.pip[0].startswith("git+ssh://git@")
    assert masked("see http://me:hunter2@a/b and http://c/d@e") == "see http://***@a/b and http://c/d@e"


def test_a_token_in_a_file_is_refused_and_not_repeated(capsys):
    http = "rewards.clip={kind: http, url: 'http://10.0.0.5:8000', reward: clip, token: sesame}"
    assert main(["validate", str(ROOT / "tests/system/tiny.yaml"), "--set", http]) == 2
    said = capsys.readouterr().err
    assert "rewards.clip.token must not stand in a file" in said and "sesame" not in said


def test_a_service_is_for_this_machine_only_unless_its_file_says_otherwise():
    text = (ROOT / "configs/rewards_service.yaml").read_text()
    assert ServiceConfig.model_fields["host"].default == "127.0.0.1"
    assert loads(text, model=ServiceConfig).host == "127.0.0.1"
