"""flow_grpo's reward request, as its clients ask but for the pickles, against rewards that really score."""

import base64
import io
import json

import numpy as np
import pytest
import requests
from PIL import Image

from align_cluster.embedded import scene
from align_cluster.embedded.render import render
from align_cluster.rewards.geneval import GenEval
from align_cluster.rewards.jpeg import Jpeg
from align_cluster.rewards.worker import RewardWorker
from align_cluster.serving.config import Limits
from align_cluster.types import Prompt

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

RECORDS = [*scene.prompts("colors", "held_out")[:2], *scene.prompts("counting", "held_out")[:2]]
IMAGES = render(RECORDS, 1).permute(0, 2, 3, 1).numpy()[[0, 0, 2, 3]]  # the second one shows another's scene
PROMPTS = [Prompt(i, record["prompt"], record) for i, record in enumerate(RECORDS)]


class Backend:
    def __init__(self):
        self.worker = RewardWorker({"geneval": GenEval.Config(score="graded"), "jpeg": Jpeg.Config()})

    async def score(self, reward, images, prompts):
        if any(prompt.text == "break" for prompt in prompts):
            raise ConnectionError("lost the worker")
        scores = self.worker.score(images, prompts)
        return type(scores)({reward: scores.values[reward]}, {reward: scores.valid[reward]}, {}, scores.details)

    async def unready(self):
        return []


@pytest.fixture(scope="module")
def url(http_server):
    from align_cluster.serving.api import create_app

    described = [{"name": "geneval"}, {"name": "jpeg"}]
    with http_server(create_app(Backend(), described, limits=Limits(), token=None)) as url:
        yield f"{url}/v1/flow_grpo"


def files(format="png"):
    found = []
    for image in IMAGES:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format)
        found.append(buffer.getvalue())
    return found


def as_json(images, **fields):
    return {"json": {"images": [base64.b64encode(image).decode() for image in images], **fields}}


def as_form(images, **fields):
    parts = [("images", (f"{i}.jpg", image, "image/jpeg")) for i, image in enumerate(images)]
    records = [json.dumps(record) for record in fields.pop("meta_datas", [])]
    return {"files": parts, "data": {"meta_datas": records, **fields}}


def test_geneval_answers_as_flow_grpos_server_does(url):
    here = RewardWorker({"r": GenEval.Config(score="graded")}).score(IMAGES, PROMPTS)
    answer, again = (
        requests.post(f"{url}/geneval", **send(files(), meta_datas=RECORDS, only_strict=True)).json()
        for send in (as_json, as_form)
    )
    assert answer == again
    assert answer["scores"] == answer["outputs"] == here.values["r"].tolist()
    assert answer["rewards"] == here.details["r/accuracy"].tolist() and answer["failure"] is None
    assert answer["strict_rewards"] == here.details["r/strict"].tolist() == [1.0, 0.0, 1.0, 1.0]
    no = -10.0
    assert answer["group_strict_rewards"] == {
        "single_object": [no] * 4,
        "two_object": [no] * 4,
        "counting": [no, no, 1.0, 1.0],
        "colors": [1.0, 0.0, no, no],
        "position": [no] * 4,
        "color_attr": [no] * 4,
    }
    assert answer["group_rewards"]["colors"] == answer["rewards"][:2] + [no, no]


def test_other_rewards_answer_with_scores_alone(url):
    jpegs = files("jpeg")
    seen = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in jpegs])
    here = RewardWorker({"r": Jpeg.Config()}).score(seen, PROMPTS)
    for send in (as_json, as_form):
        answer = requests.post(f"{url}/jpeg", **send(jpegs, prompts=[prompt.text for prompt in PROMPTS])).json()
        assert answer["scores"] == answer["outputs"] == here.values["r"].tolist()
        assert all(answer[name] is None for name in ("rewards", "group_rewards", "group_strict_rewards", "failure"))


def test_a_prompt_that_is_not_judged_has_null_and_no_failure(url):
    records = [RECORDS[0], {"tag": "colors"}]
    answer = requests.post(f"{url}/geneval", **as_json(files()[:2], prompts=["a", "b"], meta_datas=records)).json()
    assert answer["scores"] == [1.0, None] and answer["rewards"] == [1.0, None] and answer["failure"] is None
    assert answer["group_rewards"]["colors"] == [1.0, None]


def test_scores_that_failed_are_null_with_the_reason_and_never_zero(url):
    answer = requests.post(f"{url}/jpeg", **as_json(files()[:2], prompts=["a", "break"]))
    assert answer.status_code == 200 and answer.json()["scores"] == answer.json()["outputs"] == [None, None]
    assert answer.json()["failure"] == {"kind": "unavailable", "message": "lost the worker", "rows": [0, 1]}


@pytest.mark.parametrize(
    ("clause", "named"),
    [
        ({"class": "circle"}, "include.0.count: field required"),
        ({"class": "circle", "count": 0}, "include.0.count: input should be greater than or equal to 1"),
        ({"class": "circle", "count": -1}, "include.0.count: input should be greater than or equal to 1"),
        ({"class": "circle", "count": 1, "position": ["above", 9]}, "include.0.position names clause 9"),
    ],
)
def test_a_record_that_breaks_the_format_is_refused_by_the_name_of_its_field(url, clause, named):
    records = [RECORDS[0], {"tag": "counting", "include": [clause], "prompt": "a circle"}]
    for send in (as_json, as_form):
        answer = requests.post(f"{url}/geneval", **send(files()[:2], meta_datas=records))
        assert answer.status_code == 422 and answer.json()["detail"].startswith(f"meta_datas.1.{named}")
