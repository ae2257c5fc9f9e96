import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from align_cluster.cli import main
from align_cluster.errors import UserError
from align_cluster.files import write_json, write_text
from align_cluster.observe.report import write_report
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter, append_jsonl

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and collects them with the text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def report(run: RunDir) -> tuple[str, Page]:
    html = write_report(run.path).read_text()
    return html, Page(html)


def test_a_finished_run_shows_its_figures(make_run):
    html, page = report(make_run(steps=20))
    for part in ("quickstart", "finished", "5:04", "4,800", "15.8", "xxh3:9f2c41d07be5a813", "self-check", "2.13.0"):
        assert part in page.text
    for section in ("Held-out scores", "Samples", "Reward", "Groups and updates", "Time", "Provenance"):
        assert section in page.text
    for task in ("single_object", "colors", "two_object", "counting", "overall"):
        assert task in page.text
    assert "not finite in 1 step" in page.text
    assert "reward/geneval/mean" in page.text and "mean of the last 3 steps" in page.text
    assert "group/reward_std_mean" in page.text and "spread of the combined reward inside a group" in page.text
    assert "time/learner" not in page.text  # it lies inside the update: not one more stage
    charts = sum(tag == "svg" for tag, _ in page.tags)
    assert charts == 2 + 4 + 1 + 7 + 1 + 2  # rewards and held-out, tasks, clip, updates, stages, speed and sync


def test_the_page_is_self_contained_and_the_same_each_time(make_run):
    run = make_run(steps=10)
    html, page = report(run)
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html
    assert report(run)[0] == html


def test_everything_a_user_wrote_is_escaped(make_run):
    evil = "<script>alert('x')</script> & \"quotes\" </pre></style>"
    run = make_run(steps=3)
    write_json(run.grid_prompts, [evil])
    write_text(run.config, yaml.safe_dump({"steps": evil, "seed": evil, "algorithm": {"kind": evil}}))
    summary = {"name": evil, "headline": evil, "versions": {evil: evil}, "lora_path": evil, "lora_checksum": evil}
    scores = {"overall": {evil: 0.5}, "tasks": {evil: {evil: 0.5}}, "count": 1}
    for step in (1, 2, 3):
        append_jsonl(run.evaluations, {"step": step, **scores})
    write_json(run.summary, summary | {"config_hash": evil, "before": scores, "after": scores})
    with MetricWriter(run.path) as writer:
        writer.write(4, {"time/<img src=x onerror=y>": 1.0, "reward/<b>/mean": 0.5})
    html, page = report(run)
    assert sum(tag in ("script", "pre", "style") for tag, _ in page.tags) == 2 + sum(
        tag == "svg" for tag, _ in page.tags
    )
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert page.text.count("<script>alert('x')</script>") >= 12


def test_a_run_without_steps_says_so(tmp_path):
    html, page = report(RunDir.create(tmp_path, "new"))
    assert "new" in page.text and "unfinished: 0 of ? steps" in page.text and "No step" in page.text


def test_a_run_that_stopped_half_way_has_a_report(make_run):
    run = make_run(steps=40, done=13, finished=False)
    with run.metrics.open("a") as file:
        file.write('{"step": 14, "train/lo')
    html, page = report(run)
    assert "unfinished: 13 of 40 steps" in page.text
    assert "up to step 10" in page.text and "Time" in page.text and "Provenance" in page.text


def test_each_file_may_be_missing_and_takes_only_its_own_part_along(make_run):
    run = make_run(steps=20)
    parts = {
        "config": ["Resolved configuration", "8 prompts × 12 images"],
        "metrics": ["Groups and updates", "reward/geneval/mean", "seconds a step, by stage"],
        "evaluations": ["overall with its 95 % interval, and each task"],
        "summary": ["finished", "xxh3:9f2c41d07be5a813", "Versions", "4,800"],
        "grid_prompts": ["The 8 prompts"],
    }
    everything = {text for texts in parts.values() for text in texts} | {"geneval/graded", "after step 20"}
    text = report(run)[1].text
    assert all(part in text for part in everything)
    for name, lost in parts.items():
        file = getattr(run, name)
        file.rename(file.with_suffix(".away"))
        text = report(run)[1].text.replace("unfinished", "")
        assert {part for part in everything if part not in text} == set(lost), name
        file.with_suffix(".away").rename(file)
    for step in run.grid_steps():
        run.grid(step).unlink()
    assert "after step 20" not in report(run)[1].text


def test_before_alone_is_shown_without_a_change(make_run):
    html, page = report(make_run(steps=5, done=0, finished=False))
    assert "not evaluated after" in page.text and "–" in page.text


def test_steps_repeated_by_a_resumed_run_count_once(tmp_path):
    run = RunDir.create(tmp_path, "resumed")
    for step, value in ((1, 0.1), (2, 0.2), (2, 0.75)):
        append_jsonl(run.metrics, {"step": step, "seconds": 1.0, "train/loss": value})
    html, page = report(run)
    assert "2 of ? steps" in page.text and "0.1 → 0.75" in page.text


def test_metrics_that_the_page_does_not_know_are_drawn_too(tmp_path):
    """One that another version wrote has no unit; one of a kind's own has a prefix of its own."""
    run = RunDir.create(tmp_path, "old")
    append_jsonl(run.metrics, {"step": 1, "seconds": 1.0, "train/forgotten": 0.5, "value/actor": 1.0, "mine/own": 2.0})
    assert all(name in report(run)[1].text for name in ("train/forgotten", "value/actor", "mine/own"))


def test_a_huge_grid_is_embedded_smaller(make_run):
    run = make_run(steps=2)
    noise = np.random.default_rng(0).integers(0, 256, (800, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run.grid(2))
    html, page = report(run)
    assert run.grid(2).stat().st_size > 3_000_000
    assert "data:image/jpeg" in html and len(html) < 2_500_000


def test_a_folder_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path / "nothing")


def test_a_folder_without_a_run_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("name: export\n")  # as an export holds it
    (tmp_path / "notes.txt").write_text("mine")
    before = sorted(tmp_path.iterdir())
    for folder in (tmp_path, tmp_path / "notes.txt"):
        assert main(["report", str(folder)]) == 2
        assert f"{folder} is not a run directory" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
