from pathlib import Path

import pytest

from align_cluster.config.load import is_rather, load, loads
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.rewards.http import Token
from align_cluster.serving.config import ServiceConfig

EXAMPLE = Path(__file__).parents[2] / "configs/rewards_service.yaml"
TEXT = """\
rewards:
  clip:
    kind: clip_score
deployments:
  clip: {cpus: 0.5}
port: 8000
"""


def test_the_example_loads_with_its_replicas():
    config = load(EXAMPLE, ["port=9000"], ServiceConfig)
    assert config.port == 9000 and list(config.rewards) == ["geneval", "clip"]
    assert config.deployment("clip").max_replicas == 2 and config.deployment("geneval").max_replicas is None


# One mistake each: what to replace, by what, and what the sentence must say.
MISTAKES = [
    ("port: 8000", "prot: 8000", ["prot is no setting", "did you mean port?"]),
    ("port: 8000", "steps: 3", ["steps is no setting", "a service has rewards, deployments"]),
    ("port: 8000", "port: 70000", ["port is 70000", "at most 65535"]),
    ("port: 8000", "limits: {imagez: 3}", ["limits.imagez is no setting", "did you mean limits.images?"]),
    ("port: 8000", "images: 3", ["images is no setting", "did you mean limits.images?"]),
    ("port: 8000", "limits: {images: 0}", ["limits.images is 0", "above 0"]),
    ("port: 8000", "token: abc", ["token must not stand in a file", "token.env"]),
    ("port: 8000", "token: {}", ["token is {}", "either env"]),
    ("port: 8000", "token: {env: A, file: b}", ["token is", "either env"]),
    ("port: 8000", "host: 0.0.0.0", ["token is null", "host 0.0.0.0 lets other machines in"]),
    ("kind: clip_score", "kind: clip_scor", ["rewards.clip.kind is 'clip_scor'", "did you mean clip_score?"]),
    ("kind: clip_score", "kind: http", ["rewards.clip.kind is 'http'", "one of geneval"]),
    (
        "kind: clip_score",
        "kind: clip_score\n    weight: 2",
        ["rewards.clip is", "without weight", "belongs into the run"],
    ),
    ("kind: clip_score", "kind: clip_score\n    pool: {workers: 2}", ["rewards.clip is", "without pool"]),
    ("rewards:\n  clip:\n    kind: clip_score\n", "", ["rewards is missing", "as in configs/rewards_service.yaml"]),
    ("rewards:\n  clip:\n    kind: clip_score", "rewards: {}", ["rewards is {}", "at least 1 entry"]),
    ("  clip: {cpus", "  clap: {cpus", ["deployments is", "'clap' is none (did you mean clip?)"]),
    ("cpus: 0.5", "cpu: 0.5", ["deployments.clip.cpu is no setting", "did you mean deployments.clip.cpus?"]),
    (
        "cpus: 0.5",
        "min_replicas: 3, max_replicas: 2",
        ["deployments.clip.max_replicas is 2", "at least min_replicas, 3"],
    ),
]


def test_one_mistake_gives_one_sentence_with_place_and_remedy():
    for old, new, parts in MISTAKES:
        assert old in TEXT
        with pytest.raises(UserError) as caught:
            loads(TEXT.replace(old, new, 1), "service.yaml", (), ServiceConfig)
        message = str(caught.value)
        assert "\n" not in message and message.startswith("service.yaml: ")
        assert not [part for part in parts if part not in message], message


def test_a_token_is_one_word(tmp_path, monkeypatch):
    file = tmp_path / "token"
    with pytest.raises(UserError, match="cannot be read"):
        Token(file=str(file)).read()
    for text in ("", "two words", "käse", "a\tb"):
        monkeypatch.setenv("SERVICE_TOKEN", text)
        file.write_text(text)
        for token in (Token(env="SERVICE_TOKEN"), Token(file=str(file))):
            with pytest.raises(UserError, match="holds no token|is not set in the environment of this process"):
                token.read()
    file.write_text("secret\n")
    assert Token(file=str(file)).read() == "secret"


@pytest.mark.parametrize(
    ("text", "service"),
    [
        ("rewards: {a: {kind: jpg}}", True),  # all that a service needs, and too little for a run
        ("rewards: {a: {kind: jpeg}}\ndeployments: {b: {}}\nprot: 1", True),
        ("rewards: {a: {kind: jpeg}}\nsteps: 3\nport: 1", False),
        ("steps: 3\nname: x", False),
        ("", False),
        ("[1, 2]", False),
        ("rewards: [", False),
    ],
)
def test_a_service_file_is_told_from_a_run_file_by_its_first_level(tmp_path, text, service):
    (tmp_path / "file.yaml").write_text(text)
    assert is_rather(tmp_path / "file.yaml", ServiceConfig, RunConfig) == service
    assert not is_rather(tmp_path / "nowhere.yaml", ServiceConfig, RunConfig)
