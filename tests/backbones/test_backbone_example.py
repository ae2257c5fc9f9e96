import re
from pathlib import Path

import numpy as np
import torch

import align_cluster.backbones
from align_cluster.backbones.adapters import adapter_parameters, add_adapters

README = Path(align_cluster.backbones.__file__).with_name("README.md")


def example() -> tuple[type, str]:
    """The class that the README tells a newcomer to write, and its text."""
    (text,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(text, str(README), "exec"), names)
    return names["SD3Wide"], text


def test_the_readmes_backbone_has_fewer_than_20_lines_and_runs():
    kind, text = example()
    assert sum(bool(line.strip()) for line in text.splitlines()) < 20
    backbone = kind(kind.Config(kind="sd3_wide:SD3Wide", path="embedded", precision="fp32", lora={"rank": 2}))
    np.testing.assert_allclose(backbone.sigmas(4), [1, 0.75, 0.5, 0.25, 0])
    denoiser = add_adapters(backbone, backbone.load_denoiser(), ("default",))
    assert any(".ff.net.2." in name for name in adapter_parameters(denoiser, "default"))
    (condition,) = backbone.encode(["a photo of a red circle"])
    x = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    text_batch = (torch.tensor(condition.sequence)[None], torch.tensor(condition.pooled)[None])
    v = backbone.velocity(denoiser, x, torch.ones(1), *text_batch)
    assert v.shape == x.shape and v.requires_grad
