"""What `export` writes, read back with stock diffusers and the hub's own reader of cards."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from safetensors import safe_open

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.adapters import add_adapters
from align_cluster.backbones.attention import shorten_attention
from align_cluster.backbones.lora_file import read_lora
from align_cluster.cli import main
from align_cluster.config.load import config_hash, dump, load
from align_cluster.errors import UserError
from align_cluster.evaluate.card import NEEDS
from align_cluster.evaluate.export import ADAPTERS, export
from align_cluster.evaluate.result import public
from align_cluster.evaluate.sample import SampleRequest, sample
from align_cluster.files import write_json, write_text
from align_cluster.observe.charts import PALETTE
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import append_jsonl
from align_cluster.observe.table import by_prompt, summarise
from align_cluster.streams import stream
from align_cluster.types import Prompt

from ..backbones.contract import TEXT, noise_of
from .conftest import TINY, record

FORMS = ("lora", "peft", "merged", "diffusers")


@pytest.fixture(scope="module", params=BACKBONES)
def run(request, finished):
    return finished(request.param)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Folder form -> what the command made of the run."""
    folder = tmp_path_factory.mktemp("exported")
    for form in FORMS:
        assert main(["export", str(run.path), "--to", form, "--out", str(folder / form)]) == 0
    return folder


def drawn(run, pipe, denoiser=None) -> np.ndarray:
    """One image of the stock pipeline, with another denoiser in place of its own if one is given."""
    own = getattr(pipe, run.backbone.part)
    setattr(pipe, run.backbone.part, denoiser or own)
    image = run.case.tiny.draw(pipe, [TEXT], noise_of(run.backbone, (1,)), 3, 2.0, "np")
    setattr(pipe, run.backbone.part, own)
    return image


@pytest.fixture(scope="module")
def images(run):
    """What the stock pipeline draws with the base's denoiser, and with the run's."""
    pipe = run.case.pipe()
    return drawn(run, pipe), drawn(run, pipe, run.denoiser)


def tensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(file, "np") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def test_a_lora_in_the_stock_pipeline_draws_exactly_the_runs_network(run, exported, images):
    pipe, (base, expected) = run.case.pipe(), images
    shorten_attention(getattr(pipe, run.backbone.part))  # as the run's network has it on a CPU; its rounding differs
    pipe.load_lora_weights(exported / "lora")
    assert np.array_equal(drawn(run, pipe), expected)
    assert np.abs(expected - base).max() > 1e-3


def test_a_lora_says_where_it_comes_from(run, exported):
    _, facts = tensors(exported / "lora" / "pytorch_lora_weights.safetensors")
    config = load(run.path / "config.yaml")
    assert (facts["rank"], facts["alpha"], facts["base_model"]) == ("3", "3", Path(config.backbone.path).name)
    assert facts["config_hash"] == json.loads((run.path / "summary.json").read_text())["config_hash"]
    assert json.loads(facts["reward_before"]) == {"reward/size": -1.5}
    assert json.loads(facts["reward_after"]) == {"reward/size": -0.75}


def test_the_file_for_comfyui_adds_the_same_to_every_layer_at_strength_1_without_any_alpha(run, exported):
    """As ComfyUI's loader does: a layer's weight plus up @ down, under the names that it looks for."""
    held, _ = tensors(exported / "lora" / f"tiny-{run.case.kind}_comfyui.safetensors")
    layers = {name: layer for name, layer in run.denoiser.named_modules() if hasattr(layer, "base_layer")}
    for name, layer in layers.items():
        if run.backbone.part == "unet":
            key = f"lora_unet_{name.replace('.', '_')}"
            up, down = held.pop(f"{key}.lora_up.weight"), held.pop(f"{key}.lora_down.weight")
        else:
            up, down = held.pop(f"transformer.{name}.lora_B.weight"), held.pop(f"transformer.{name}.lora_A.weight")
        np.testing.assert_allclose(up @ down, layer.get_delta_weight("default").detach(), atol=1e-6)
    assert layers and not held


def test_stock_diffusers_reads_the_file_for_comfyui_too(run, exported, images):
    pipe = run.case.pipe()
    pipe.load_lora_weights(exported / "lora", weight_name=f"tiny-{run.case.kind}_comfyui.safetensors")
    assert np.abs(drawn(run, pipe) - images[1]).max() < 1e-5


def test_peft_reads_its_form_and_draws_exactly_the_runs_network(run, exported, images):
    pipe = run.case.pipe()
    network = getattr(pipe, run.backbone.part)
    shorten_attention(network)
    assert np.array_equal(drawn(run, pipe, peft.PeftModel.from_pretrained(network, exported / "peft")), images[1])


def test_a_run_may_start_from_every_form_of_a_lora(run, exported):
    layers = {name: layer for name, layer in run.denoiser.named_modules() if hasattr(layer, "base_layer")}
    for file in ("lora", f"lora/tiny-{run.case.kind}_comfyui.safetensors", "peft"):
        backbone = run.case.backbone(lora={"path": str(exported / file)})
        denoiser = add_adapters(backbone, backbone.load_denoiser(), ("default",))
        for name, layer in layers.items():
            found = denoiser.get_submodule(name).get_delta_weight("default")
            torch.testing.assert_close(found, layer.get_delta_weight("default"), rtol=0, atol=1e-6)


def test_a_merged_denoiser_differs_by_the_rounding_of_its_sums(run, exported, images):
    import diffusers

    network = getattr(diffusers, run.backbone.network).from_pretrained(exported / "merged")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    base = {name.replace(".base_layer", ""): value for name, value in run.denoiser.state_dict().items()}
    assert network.state_dict().keys() == {name for name in base if ".lora_" not in name}
    assert np.abs(drawn(run, run.case.pipe(), network) - images[1]).max() < 1e-5


def test_a_whole_pipeline_loads_as_one_and_its_other_parts_are_the_bases(run, exported, images):
    pipe = run.case.tiny.stock(exported / "diffusers")
    pipe.set_progress_bar_config(disable=True)
    assert np.abs(drawn(run, pipe) - images[1]).max() < 1e-5
    for file in run.case.folder.rglob("*"):
        name = file.relative_to(run.case.folder)
        if file.is_file() and name.parts[0] != run.backbone.part:
            assert (exported / "diffusers" / name).read_bytes() == file.read_bytes()


def test_the_card_is_the_hubs_and_has_what_the_run_has(run, exported):
    from huggingface_hub import ModelCard

    svg = "{http://www.w3.org/2000/svg}"
    for form in FORMS:
        folder = exported / form
        card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
        assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
        assert ("lora" in card.data.tags) == (form in ADAPTERS) and card.data.license == "other"
        assert "base_model" not in card.data.to_dict()  # a folder, which the hub does not know
        assert "| `size` | -1.500 | -0.750 | +0.750 |" in card.content
        assert "| `size, a/b` | -1.000 | -0.500 | +0.500 |" in card.content
        assert re.findall(r"!\[.*?\]\((.*?)\)", card.content) == ["before.png", "after.png", "reward.svg"]
        assert Image.open(folder / "after.png").tobytes() == Image.open(RunDir(run.path).grid(2)).tobytes()
        picture = ElementTree.parse(folder / "reward.svg").getroot()
        assert picture.tag == f"{svg}svg"
        assert {"reward", "step"} <= {text.strip() for text in picture.itertext()}
        assert any(PALETTE["accent"] in path.get("style", "") for path in picture.iter(f"{svg}path"))
        assert load(folder / "config.yaml") == public(load(run.path / "config.yaml"))


def test_nothing_that_is_exported_names_a_folder_of_this_machine(run, exported):
    folders = (str(run.case.folder.parents[1]), str(Path(__file__).parents[2]), str(Path.home()))
    files = [file for file in exported.rglob("*") if file.is_file()]
    assert run.case.folder.parents[1] == exported.parent and len(files) > 20
    for file in files:
        assert not any(folder.encode() in file.read_bytes() for folder in folders), file


def test_who_may_read_the_card_may_read_all_weights_that_were_written(run, exported):
    weights = [RunDir(run.path).lora_weights]
    weights += [file for form in ADAPTERS for file in (exported / form).glob("*.safetensors")]
    weights += [
        *(exported / "merged").glob("*.safetensors"),
        *(exported / "diffusers" / run.backbone.part).glob("*.saf*"),
    ]
    mode = (exported / "lora" / "README.md").stat().st_mode
    assert len(weights) == 6 and all(file.stat().st_mode == mode for file in weights)


def test_settings_for_others_hold_no_path_but_its_last_name():
    settings = [
        "prompts={kind: txt, path: /home/me/prompts.txt}",
        "out: ~/runs",
        "checkpoint.path=file:///home/me/kept",
    ]
    config = load(TINY, [setting.replace("out: ", "out=") for setting in settings])
    shown = public(config)
    assert (shown.prompts.path, shown.out, shown.checkpoint.path) == ("prompts.txt", "runs", "kept")
    assert shown.backbone == config.backbone and public(config, "acme/tiny").backbone.path == "acme/tiny"


def test_a_local_base_gets_the_names_that_are_given_for_it(finished, tmp_path, capsys):
    run = finished("sd3")
    command = ["export", str(run.path), "--to", "lora"]
    assert main([*command, "--out", str(tmp_path / "plain")]) == 0
    notes = capsys.readouterr().err
    assert "note: the card calls the base model pipeline, as its folder here; add --base-model" in notes
    assert "note: the card does not name the base model's licence; add --license" in notes
    named = ["--base-model", "acme/tiny", "--license", "cc-by-nc-sa-4.0", "--out", str(tmp_path / "named")]
    assert main([*command, *named]) == 0 and capsys.readouterr().err == ""
    text = (tmp_path / "named" / "README.md").read_text()
    assert "base_model: acme/tiny\nbase_model_relation: adapter\n" in text and "license: cc-by-nc-sa-4.0\n" in text
    assert main([*command, "--license", "other", "--out", str(tmp_path / "other")]) == 0
    assert "licence" not in capsys.readouterr().err
    assert "under its licence: `cc-by-nc-sa-4.0`" in text and 'base = "acme/tiny"  # its id on the hub' in text
    assert tensors(tmp_path / "named" / "pytorch_lora_weights.safetensors")[1]["base_model"] == "acme/tiny"


@pytest.fixture
def embedded_run(lora, tmp_path):
    """A finished run on the embedded model."""
    run = RunDir.create(tmp_path / "runs", "shapes")
    config = load(TINY, ["backbone.lora={rank: 4, alpha: 8}"])
    write_text(run.config, dump(config))
    shutil.copytree(lora[0].parent, run.lora)
    record(run, config_hash(config))
    return run


@pytest.mark.slow
def test_the_code_of_each_card_runs_as_it_stands_where_align_cluster_is_installed(embedded_run, tmp_path):
    codes = []
    for form in FORMS:
        assert export(embedded_run.path, form, tmp_path / form) == []
        text = (tmp_path / form / "README.md").read_text()
        codes.append(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
        assert ("ships in align-cluster" in text) == (form != "diffusers")
    lines = (f"exec({code!r}, scope := {{}}); scope['image'].save('{i}.png')" for i, code in enumerate(codes))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", "\n".join(lines)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    drawn = [np.asarray(Image.open(tmp_path / f"{i}.png"), dtype=int) for i in range(len(codes))]
    assert all(one.shape == (48, 48, 3) and one.std() > 5 for one in drawn)
    assert np.abs(drawn[2] - drawn[3]).max() == 0  # the merged denoiser is the pipeline's


def test_a_card_says_which_change_is_within_the_noise(finished, tmp_path):
    run = RunDir(shutil.copytree(finished("sd3").path, tmp_path / "run"))
    run.evaluations.unlink()
    columns = [("task", "prompt_id", "reward/size", "reward/clip")] * 10
    sides = [
        [dict(zip(names, ("a", p, p / 9 + side, (-1) ** (p + side)), strict=True)) for p, names in enumerate(columns)]
        for side in (0, 1)
    ]
    for step, rows in enumerate(sides):
        append_jsonl(run.evaluations, {"step": step, **summarise(rows), "by_prompt": by_prompt(rows)})
    before, after = map(summarise, sides)
    write_json(run.summary, json.loads(run.summary.read_text()) | {"before": before, "after": after})
    export(run.path, "lora", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| `size` | 0.500 | 1.500 | +1.000 |" in text
    assert "| `clip` | 0.000 | 0.000 | +0.000 within the noise |" in text


HOSTILE = (
    "<img src=x onerror=alert(1)> ![a](http://a/b.png) [c](http://d) `e` ``f`` </details>\n# G\r\n- h | i www.j.k",
    "```\n<script>l</script>\n```",
    "` <b>m</b> `",
    "\u202en\0o\x1b[31m",
    " \n ",
)


def test_what_others_wrote_means_nothing_in_a_card(finished, tmp_path):
    base = finished("sd3")
    run = RunDir(shutil.copytree(base.path, tmp_path / "run"))
    (base_card := tmp_path / "base" / "README.md").parent.mkdir()
    shutil.copytree(base.case.folder, base_card.parent, dirs_exist_ok=True)
    base_card.write_text(f"---\nlicense: {json.dumps(HOSTILE[0])}\n---\n")
    write_json(run.grid_prompts, list(HOSTILE))
    summary = json.loads(run.summary.read_text())
    scores = {"overall": {"reward/size": 1.0}, "tasks": {text: {"reward/size": 1.0} for text in HOSTILE[:3]}}
    facts = {"name": f"../{HOSTILE[0]}", "versions": {HOSTILE[1]: HOSTILE[2]}, "config_hash": HOSTILE[0]}
    write_json(run.summary, summary | facts | {"before": scores, "after": scores})
    export(run.path, "lora", tmp_path / "out", overrides=[f"backbone.path={base_card.parent}"])
    text = (tmp_path / "out" / "README.md").read_text()
    page = MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])
    assert set(re.findall(r"<(\w+)", page)) <= set(
        "h1 h2 p table thead tbody tr th td ul li code pre img strong em details summary".split()
    )
    assert re.findall(r"<img[^>]*>", page) == [f'<img src="{n}" alt="{a}" />' for n, a in PICTURES]
    assert all(char.isprintable() or char == "\n" for char in text)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2 and not list(tmp_path.glob("*.safetensors"))
    for line in page.splitlines():
        assert line.count("<td") in (0, 1)


PICTURES = [("before.png", "before"), ("after.png", "after"), ("reward.svg", "Reward over the steps")]


def test_the_same_result_gets_the_same_files(finished, tmp_path):
    run = finished("sd3")
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        export(run.path, "lora", folder)
    files = sorted(file.name for file in folders[0].glob("*.safetensors"))
    assert len(files) == 2
    for name in files:
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
        content = (folders[0] / name).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    peft = json.loads(tensors(RunDir(run.path).lora_weights)[1]["lora_adapter_metadata"])
    targets = peft[f"{run.backbone.part}.target_modules"]
    assert targets == sorted(targets)


def test_a_card_names_the_packages_that_this_one_needs(run, exported):
    tested = (Path(__file__).parents[2] / "constraints" / "tested.txt").read_text().split()
    assert set(NEEDS) <= set(tested)
    for form in FORMS:
        (line,) = re.findall(r"^pip install (.*)$", (exported / form / "README.md").read_text(), re.MULTILINE)
        assert shlex.split(line) == list(NEEDS)


def test_the_cards_code_draws_what_sample_draws(run, tmp_path, monkeypatch):
    guided = ["evaluate.guidance=1.5"]
    config, lora = load(run.path / "config.yaml", guided), read_lora(RunDir(run.path).lora_weights)
    request = SampleRequest(prompts=[Prompt(0, TEXT)], count=1, seed=3, score=False)
    facts = sample(config, lora, request, tmp_path / "drawn")
    ours = np.asarray(Image.open(tmp_path / "drawn" / "000_00.png"), dtype=int)
    monkeypatch.chdir(tmp_path)
    (tmp_path / run.case.folder.name).symlink_to(run.case.folder)  # what the code calls the base model
    for form in FORMS:
        export(run.path, form, tmp_path / form, overrides=guided)
        code = re.search(r"```python\n(.*?)```", (tmp_path / form / "README.md").read_text(), re.DOTALL)[1]
        seed = facts["images"][0]["seed"]
        code = code.replace("bfloat16", "float32").replace("torch.Generator().manual_seed(0)", f"stream({seed})")
        if run.case.kind == "sd1":  # its safety checker blacks random images out
            code = re.sub(r"(pipe = .*)\)", r"\1, safety_checker=None)", code)
        scope: dict = {"stream": stream}
        exec(code, scope)
        assert np.abs(ours - np.asarray(scope["image"], dtype=int)).max() <= 1 and ours.std() > 5


def test_a_licence_of_the_base_is_named_in_the_card(finished, tmp_path):
    run = finished("sd3")
    base = shutil.copytree(run.case.folder, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: acme\nlicense_link: LICENSE\n---\n# Base\n")
    export(run.path, "lora", tmp_path / "out", overrides=[f"backbone.path={base}"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license_name: acme" in text and "under its licence: `other`, `acme`, `LICENSE`" in text


def test_a_base_of_the_hub_is_named_by_its_id_and_its_parts_come_from_the_hubs_cache(finished, tmp_path, monkeypatch):
    run = finished("sd3")
    cached = tmp_path / "models--acme--tiny"
    commit = "0" * 40
    shutil.copytree(run.case.folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    export(run.path, "diffusers", tmp_path / "out", overrides=["backbone.path=acme/tiny"])
    assert "base_model: acme/tiny\nbase_model_relation: finetune\n" in (tmp_path / "out" / "README.md").read_text()
    assert load(tmp_path / "out" / "config.yaml").backbone.path == "acme/tiny"
    part = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / part).read_bytes() == (run.case.folder / part).read_bytes()


def test_merged_weights_are_rounded_after_the_sum(finished, tmp_path):
    import diffusers

    run = finished("sd3")
    layer, name = run.denoiser.transformer_blocks[0].attn.to_q, "transformer_blocks.0.attn.to_q.weight"
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        export(run.path, "merged", tmp_path / precision, precision=precision)
        network = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / precision, dtype=dtype)
        expected = (layer.base_layer.weight + layer.get_delta_weight("default")).to(dtype)
        assert torch.equal(network.state_dict()[name], expected)


def test_a_run_that_cannot_be_exported_says_why_and_leaves_nothing(finished, tmp_path, capsys):
    def settings(pattern, replacement):
        config = run / "config.yaml"
        config.write_text(re.sub(pattern, replacement, config.read_text()))

    damages = {
        r"has not finished \(2 of 2 steps are there\)": lambda: (run / "summary.json").unlink(),
        "has lost its lora/pytorch_lora_weights.safetensors": lambda: shutil.rmtree(run / "lora"),
        "has rank 3, and the run's config.yaml says rank 8": lambda: settings("rank: 3", "rank: 8"),
        r"its transformer_blocks.0.attn.add_k_proj.lora_A.weight is 3 x \d+, and that base's is 3 x 128": lambda: (
            settings("path: .*pipeline.*", "path: embedded")
        ),
        "'/nowhere' has no readable 'model_index.json' part": lambda: settings("path: .*pipeline.*", "path: /nowhere"),
    }
    for words, damage in damages.items():
        run = shutil.copytree(finished("sd3").path, tmp_path / "run")
        damage()
        assert main(["export", str(run), "--to", "lora", "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert re.search(words, error) and error.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        shutil.rmtree(run)


def test_a_folder_that_is_there_is_not_overwritten(finished, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already, and nothing is overwritten"):
        export(finished("sd3").path, "lora", tmp_path / "out")


def test_what_breaks_half_way_leaves_nothing(finished, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("align_cluster.evaluate.export.write_card", full)
    with pytest.raises(OSError, match="no space left"):
        export(finished("sd3").path, "lora", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_not_there_is_refused_in_one_sentence(tmp_path, capsys):
    refused = {
        "--to gguf is no form of a result; choose lora, peft, merged, diffusers": ["--to", "gguf"],
        "--precision int8 is not there; choose fp32, bf16, fp16": ["--to", "merged", "--precision", "int8"],
        "a LoRA file is always fp32": ["--to", "lora", "--precision", "bf16"],
        "--base-model 'tiny' is no id of the hub; write it as OWNER/NAME": ["--to", "lora", "--base-model", "tiny"],
        "--license 'MIT licence' is no id of the hub": ["--to", "lora", "--license", "MIT licence"],
    }
    for words, arguments in refused.items():
        assert main(["export", str(tmp_path), *arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
