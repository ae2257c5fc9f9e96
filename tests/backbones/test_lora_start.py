"""A run may start from a LoRA of any common format: new adapters have its weights, or the base has them."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.lora_file import lora_file, read_lora
from align_cluster.backbones.sd3 import SD3
from align_cluster.errors import UserError

from .contract import Case, random_state


def embedded(**lora):
    return SD3(SD3.Config(precision="fp32", lora=lora))


def deltas(denoiser, name="default"):
    """What an adapter adds to each layer."""
    layers = {path: layer for path, layer in denoiser.named_modules() if hasattr(layer, "base_layer")}
    return {path: layer.get_delta_weight(name).detach() for path, layer in layers.items()}


def assert_same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def merged(backbone):
    """What a merged LoRA has added to each layer of the base."""
    plain = type(backbone)(backbone.config.model_copy(update={"lora": type(backbone.config)(path="x").lora}))
    base, found = plain.load_denoiser().state_dict(), backbone.load_denoiser().state_dict()
    added = {name: found[name] - value for name, value in base.items()}
    return {name.removesuffix(".weight"): value for name, value in added.items() if value.abs().max() > 0}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The file of a LoRA of rank 4 and scale 2, and what it adds."""
    backbone = embedded(rank=4, alpha=8)
    denoiser = add_adapters(backbone, backbone.load_denoiser(), ("default",))
    return backbone.save_lora(random_state(denoiser, 0.1), tmp_path_factory.mktemp("run") / "lora"), deltas(denoiser)


@pytest.mark.parametrize("alpha", [None, 1, 16])
def test_adapters_begin_with_the_lora_whatever_their_own_scale_and_the_critics_is_new(written, alpha):
    file, expected = written
    backbone = embedded(path=str(file.parent.parent), **({"alpha": alpha} if alpha else {}))
    assert (backbone.config.lora.rank, backbone.config.lora.alpha) == (4, alpha or 4)
    denoiser = add_adapters(backbone, backbone.load_denoiser(), ("default", "old", "critic"))
    for name in ("default", "old"):
        assert_same(deltas(denoiser, name), expected)
    assert all(not value.any() for value in deltas(denoiser, "critic").values())


def test_a_merged_lora_is_part_of_the_base_and_new_adapters_of_another_rank_add_nothing(written):
    file, expected = written
    backbone = embedded(path=str(file), use="merge", rank=3, targets=["attn.to_q"])
    assert_same(merged(backbone), expected)
    denoiser = add_adapters(backbone, backbone.load_denoiser(), ("default",))
    assert all(not value.any() for value in deltas(denoiser).values())


def rename(file, out, change):
    tensors = {}
    for name, value in load_file(file).items():
        tensors |= change(name.removeprefix("transformer."), value)
    out.parent.mkdir(exist_ok=True)
    save_file(tensors, out)
    return out


def kohya(name, value):
    layer, matrix = name.removesuffix(".weight").split(".lora_")
    flat = f"lora_unet_{layer.replace('.', '_')}"
    half = 0.5 if matrix == "B" else 1.0
    return {
        f"{flat}.lora_{'up' if matrix == 'B' else 'down'}.weight": value * np.float32(half),
        f"{flat}.alpha": np.array(8.0, np.float32),
    }


def test_kohyas_names_and_alphas_are_read(written, tmp_path):
    file, expected = written
    path = rename(file, tmp_path / "kohya.safetensors", kohya)
    backbone = embedded(path=str(path))
    assert (backbone.config.lora.rank, backbone.config.lora.alpha) == (4, 8)
    assert_same(deltas(add_adapters(backbone, backbone.load_denoiser(), ("default",))), expected)
    assert_same(merged(embedded(path=str(path), use="merge")), expected)


def test_what_pefts_own_folders_hold_is_read(written, tmp_path):
    import peft

    file, expected = written
    network = embedded().load_denoiser()
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(SD3.lora_targets))
    model = peft.get_peft_model(network, config)
    state = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            own = name.removeprefix("base_model.model.").replace(".default", "")
            parameter.data = torch.from_numpy(state[own] / (3 if ".lora_B." in own else 1))
    model.save_pretrained(tmp_path / "peft")
    backbone = embedded(path=str(tmp_path / "peft"))
    assert (backbone.config.lora.rank, backbone.config.lora.alpha) == (4, 12)
    assert_same(deltas(add_adapters(backbone, backbone.load_denoiser(), ("default",))), expected)


def test_layers_with_ranks_and_scales_of_their_own_add_what_they_added(tmp_path):
    rng, layers, tensors, expected = np.random.default_rng(0), embedded().load_denoiser(), {}, {}
    for rank, (name, layer) in enumerate((n, m) for n, m in layers.named_modules() if n.endswith("attn.to_q")):
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank % 3 + 1, 128), (128, rank % 3 + 1)))
        assert layer.weight.shape == (128, 128)
        flat = f"lora_transformer_{name.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": np.float32([rank + 1])}
        expected[name] = torch.from_numpy(b @ a * np.float32((rank + 1) / (rank % 3 + 1)))
    save_file(tensors, tmp_path / "x.safetensors")
    trained = embedded(path=str(tmp_path / "x.safetensors"), targets=["attn.to_q"])
    assert (trained.config.lora.rank, trained.config.lora.alpha) == (3, 3)
    assert_same(deltas(add_adapters(trained, trained.load_denoiser(), ("default",))), expected, 1e-4)
    assert_same(merged(embedded(path=str(tmp_path / "x.safetensors"), use="merge")), expected, 1e-4)


def test_the_first_releases_names_of_flux_become_those_that_diffusers_gives_them(tiny_pipeline, tmp_path):
    case, rng = Case("flux", tiny_pipeline("flux")), np.random.default_rng(0)
    sizes = {"double_blocks_0_img_attn_qkv": (32, 96), "double_blocks_1_txt_attn_proj": (32, 32)}
    tensors = {}
    for name, (width, out) in sizes.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = rng.standard_normal((2, width)).astype(np.float32)
        tensors[f"lora_unet_{name}.lora_up.weight"] = rng.standard_normal((out, 2)).astype(np.float32)
        tensors[f"lora_unet_{name}.alpha"] = np.float32([1])
    save_file(tensors, tmp_path / "x.safetensors")
    pipe = case.pipe()
    base = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    added = {name: value - base[name] for name, value in pipe.transformer.state_dict().items()}
    expected = {name.removesuffix(".weight"): value for name, value in added.items() if value.any()}
    assert len(expected) == 4
    assert_same(merged(case.backbone(lora={"path": str(tmp_path / "x.safetensors"), "use": "merge"})), expected, 1e-5)


def test_the_file_is_found_in_each_kind_of_folder(written, tmp_path):
    file, _ = written
    assert lora_file(file) == lora_file(file.parent) == lora_file(file.parent.parent) == file
    assert lora_file(tmp_path) == tmp_path / "pytorch_lora_weights.safetensors"


def test_what_cannot_start_a_run_is_refused_in_one_sentence(written, tmp_path):
    file, _ = written
    (problem,) = embedded(path=str(file), rank=8).config.lora.problems("backbone.lora", None)
    assert problem == f"backbone.lora.rank is 8, and {file} has rank 4; leave rank out"
    (problem,) = embedded(use="merge").config.lora.problems("backbone.lora", None)
    assert "backbone.lora.path names no LoRA" in problem
    (problem,) = embedded(path=str(tmp_path / "gone")).config.lora.missing("backbone.lora")
    assert "which is no file or folder here; give the .safetensors file of a LoRA" in problem
    other = embedded(path=str(file), targets=["attn.to_q"])
    with pytest.raises(UserError, match=r"does not fit embedded \(its .* belongs to no adapted layer, and"):
        add_adapters(other, other.load_denoiser(), ("default",))
    for start, said in (
        (lambda name, value: {f"no.{name}": value}, "adapts no.* and embedded has no such layer"),
        (lambda name, value: {f"lora_unet_no_{name}": value}, "names its layers in a way that is not known"),
        (lambda name, value: {name: value[..., :1].repeat(5, -1)}, "no pair of matrices|has 128 x"),
    ):
        path = rename(file, tmp_path / "other.safetensors", start)
        with pytest.raises(UserError, match=said):
            embedded(path=str(path), use="merge", rank=4, alpha=4).load_denoiser()
    save_file({"lora_te_x.lora_down.weight": np.zeros((1, 2), np.float32)}, tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="no pair of matrices"):
        read_lora(tmp_path / "text.safetensors")


def test_parameters_of_a_start_are_fp32_and_only_the_first_adapter_is_trained(written):
    backbone = embedded(path=str(written[0]))
    denoiser = add_adapters(backbone, backbone.load_denoiser(), ("default", "old"))
    assert all(parameter.requires_grad for parameter in adapter_parameters(denoiser, "default").values())
    assert not any(parameter.requires_grad for parameter in adapter_parameters(denoiser, "old").values())
