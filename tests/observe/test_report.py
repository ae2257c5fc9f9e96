import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from align_cluster.cli import main
from align_cluster.errors import UserError
from align_cluster.files import write_json, write_text
from align_cluster.observe.report import GRIDS, write_report
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter, append_jsonl

VOID = {"meta", "img", "input"}


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
        self.words.append(" " if tag in ("td", "th", "label") else "")

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def report(run: RunDir) -> tuple[str, Page]:
    html = write_report(run.path).read_text()
    return html, Page(html)


def without_curves(run: RunDir) -> RunDir:
    """The run without the numbers of its steps, whose charts take most of a page's time."""
    run.metrics.unlink()
    return run


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
    assert "group/reward_std_mean" in page.text and "Spread of the combined reward inside a group" in page.text
    assert "geneval: mean over the step's training images" in page.text
    rewards, time = (page.text.split(part)[1] for part in (" Reward thin", " Time "))
    assert "reward/geneval/images_per_s" in time and "images_per_s" not in rewards.split(" Groups and updates ")[0]
    assert "time/learner" not in page.text  # it lies inside the update: not one more stage
    charts = sum(tag == "svg" for tag, _ in page.tags)
    assert charts == 2 + 4 + 1 + 7 + 1 + 3  # rewards and held-out, tasks, clip, updates, stages, speeds and sync


def test_a_change_inside_of_its_noise_is_no_finding(make_run):
    """Two tasks get better in the fixture's run, and two stay where they were, but for noise."""
    run = without_curves(make_run(steps=20))
    records = [json.loads(line) for line in run.evaluations.read_text().splitlines()]
    summary = json.loads(run.summary.read_text())
    rng, column = np.random.default_rng(0), "reward/geneval/graded"
    for record in records[1:]:
        for task in ("two_object", "counting"):
            old = records[0]["by_prompt"][task][column]
            new = {prompt: score + rng.normal(-0.01, 0.1) for prompt, score in old.items()}
            record["by_prompt"][task][column], record["tasks"][task][column] = new, float(np.mean(list(new.values())))
    run.evaluations.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_json(run.summary, summary | {"after": {k: v for k, v in records[-1].items() if k != "by_prompt"}})
    html, page = report(run)
    for task in ("two_object", "counting"):
        assert re.search(rf"{task} 0\.\d+ 0\.\d+ [+-]0\.\d+ within the noise", page.text)
    for task in ("single_object", "colors"):
        assert re.search(rf"{task} 0\.\d+ 0\.\d+ \+0\.\d+ (?!within)", page.text)
    assert "95 % interval of the change +0." in page.text and "95 % interval, paired by prompt: +0." in html
    before = html.count('class="good"')
    run.evaluations.unlink()  # as of a run that did not write scores by prompt: no claims
    assert before > 4 and 'class="good"' not in report(run)[0] and "within the noise" not in report(run)[1].text


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
    run.evaluations.unlink()
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
    assert "There are 13 training steps, 2 held-out evaluations (the last after step 10), 2 sample grids" in page.text
    assert "(the last after step 10), and no LoRA yet." in page.text and "goes on" not in page.text
    (run.checkpoints / "step_000012").mkdir(parents=True)
    (run.checkpoints / "step_000012" / "manifest.json").write_text("{}")
    (run.checkpoints / ".half").mkdir()
    write_json(run.state, {"error": "interrupted"})
    text = report(run)[1].text
    assert "1 checkpoint (the last after step 12), and no LoRA yet. It ended with: interrupted. `align-cluster" in text
    assert "goes on from its last checkpoint" in text
    assert "held-out geneval/graded, up to step 10" in page.text and "Time" in page.text and "Provenance" in page.text


def test_each_file_may_be_missing_and_takes_only_its_own_part_along(make_run):
    run = make_run(steps=20)
    parts = {
        "config": ["Resolved configuration", "8 prompts × 12 images"],
        "metrics": ["Groups and updates", "reward/geneval/mean", "seconds a step, by stage"],
        "evaluations": [
            "with the 95 % interval over prompts of each evaluation alone",
            "95 % interval of the change",
        ],
        "summary": ["finished", "xxh3:9f2c41d07be5a813", "Versions", "4,800"],
        "grid_prompts": ["The 8 prompts"],
    }
    everything = {text for texts in parts.values() for text in texts} | {"geneval/graded", "step 20"}
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
    assert "step 20" not in report(run)[1].text


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


def test_grids_of_every_stage_are_in_a_strip_without_a_script(make_run):
    run = without_curves(make_run(steps=30))
    html, page = report(run)
    assert "before base model after step 10 step 20 step 30" in page.text
    chosen = [attributes for tag, attributes in page.tags if tag == "input"]
    assert [one["type"] for one in chosen] == ["radio"] * 4 and len({one["id"] for one in chosen}) == 4
    assert [one["name"] for one in chosen if "checked" in one] == ["strip-1", "strip-2"]  # the base, and the last
    labels = [attributes["for"] for tag, attributes in page.tags if tag == "label"]
    assert labels == [one["id"] for one in chosen] and html.count("data:image/png") == 4


def test_a_long_run_shows_some_grids_from_the_first_to_the_last(make_run):
    run = without_curves(make_run(steps=2))
    for step in range(1, 40):
        run.grid(step).write_bytes(run.grid(0).read_bytes())
    html, page = report(run)
    assert html.count("data:image/png") == GRIDS and "base model after step 5" in page.text and "step 39" in page.text


def test_two_runs_stand_side_by_side(make_run, tmp_path, capsys):
    runs = [make_run("one", steps=20), make_run("two", steps=30)]
    assert main(["report", *(str(run.path) for run in runs)]) == 0
    file = runs[0].path / "report-two.html"
    assert capsys.readouterr().out == f"{file}\n"
    html = file.read_text()
    page = Page(html)
    assert "<title>one and two · align-cluster</title>" in html and page.text.count("finished") == 2
    assert "steps 20 30" in page.text.split("Settings that differ")[1] and "runs" not in page.text.split("Held-out")[0]
    assert re.search(r"overall 0\.\d+ 0\.\d+ [+-]0\.\d+", page.text)
    assert "one base model step 10 step 20 two base model step 10 step 20 step 30" in page.text
    assert "one: seconds a step" in page.text and "two: seconds a step" in page.text
    curve = html.split("<code>train/loss</code>")[1].split("</svg>")[0]
    assert "var(--accent)" in curve and "var(--stage-1)" in curve  # both runs in one chart
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}


def test_runs_on_other_held_out_prompts_are_not_paired(make_run):
    runs = [without_curves(make_run(name, steps=20)) for name in ("one", "two")]
    out = runs[0].path / "both.html"
    assert "within the noise" in write_report(*(run.path for run in runs), out=out).read_text()  # the same scores
    write_text(runs[1].config, runs[1].config.read_text() + "evaluate: {prompts: {kind: txt, path: other.txt}}\n")
    page = write_report(*(run.path for run in runs), out=out).read_text()
    assert "within the noise</span>" not in page and "other.txt" in page


def test_two_runs_of_one_name_are_told_apart_by_their_folders(make_run, tmp_path):
    first, second = (without_curves(make_run(name, steps=3)) for name in ("one", "two"))
    (tmp_path / "b").mkdir()
    second.path.rename(tmp_path / "b" / "one")
    text = write_report(first.path, tmp_path / "b" / "one", out=tmp_path / "both.html").read_text()
    assert f"<title>{first.path} and {tmp_path / 'b' / 'one'} · align-cluster</title>" in text


def test_a_page_that_cannot_be_written_is_one_sentence(make_run, capsys):
    run = make_run(steps=2)
    assert main(["report", str(run.path), "--out", "/nowhere/page.html"]) == 2
    assert "/nowhere/page.html cannot be written (No such file" in capsys.readouterr().err
