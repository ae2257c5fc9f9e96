import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

TINY = "--images 128 --clip-steps 2 --vae-steps 2 --batch 8 --workers 1".split()


def pretrain(out, *more):
    command = [sys.executable, "-m", "align_cluster.pretraining.pretrain", "--out", str(out), *TINY, *more]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_pretraining_goes_through_all_stages_and_continues_where_it_stopped(tmp_path):
    first = pretrain(tmp_path, "--dit-steps", "2")
    assert first.returncode == 0, first.stderr
    assert json.loads((tmp_path / "seen.json").read_text()) == {"steps": 2, "images": 16}
    vae = (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()

    second = pretrain(tmp_path, "--dit-steps", "3")
    assert second.returncode == 0, second.stderr
    assert json.loads((tmp_path / "seen.json").read_text()) == {"steps": 3, "images": 24}
    assert vae == (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()

    packed = tmp_path / "pipeline"
    assert (packed / "model_index.json").exists()
    reward = load_file(packed / "clip" / "model.safetensors")
    slot = load_file(packed / "text_encoder" / "model.safetensors")
    name = "embeddings.token_embedding.weight"
    (in_reward,) = [value for key, value in reward.items() if key.endswith(name)]
    (in_slot,) = [value for key, value in slot.items() if key.endswith(name)]
    assert in_reward.equal(in_slot)
