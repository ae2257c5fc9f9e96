"""What reward models take. Their sizes are known for the published ones; a folder's is that of its weight files."""

from dataclasses import dataclass
from pathlib import Path

from align_cluster.embedded import pipeline_path
from align_cluster.rewards.aesthetic import VERSIONS
from align_cluster.rewards.base import RewardSection


@dataclass(frozen=True)
class Model:
    """Parameters of a reward model, kept in fp32, FLOPs of one image, and bytes that a gradient to its pixels keeps;
    None where nobody counted them."""

    parameters: float
    flops: float | None = None
    activations: float | None = None


# Counted on the meta device as transformers builds them; CLIPs agree with open_clip's model_profile.csv. Detectors see
# images of 800 x 800 (Mask2Former) and 640 x 640 pixels, as their processors scale square ones. Activations are those
# of the image's tower in fp32, by `count.py`.
CLIP_L = Model(427.6e6, 162.0e9, 369e6)
CLIP_H = Model(986.1e6, 334.6e9, 435e6)
MODELS = {
    "openai/clip-vit-large-patch14": CLIP_L,
    "yuvalkirstain/PickScore_v1": CLIP_H,
    "ViT-H-14": CLIP_H,
    "apple/DFN5B-CLIP-ViT-H-14-378": Model(986.7e6, 1007.0e9, 1729e6),
    "google/siglip-so400m-patch14-384": Model(428.2e6, 670.3e9, 913e6),
    "THUDM/ImageReward": Model(446.0e6, 137.8e9, 241e6),
    "facebook/mask2former-swin-small-coco-instance": Model(68.7e6, 448.7e9),
    "PekingU/rtdetr_r50vd_coco_o365": Model(42.7e6, 137.4e9),
}
NOTHING = Model(0, 0, 0)  # of rewards that name no model: rules, a small OCR, a service


def models(reward: RewardSection) -> list[Model | None]:
    """The models that a reward loads; None stands for one that is not known here."""
    if reward.kind == "geneval":
        if reward.detector.kind == "embedded":
            return [NOTHING]
        return [_find(reward.detector.path), CLIP_L if reward.color_clip is None else _find(reward.color_clip)]
    if reward.kind == "sgp":
        return models(reward.of)
    if reward.kind == "aesthetic":
        return [_find(reward.encoder or VERSIONS[reward.version].encoder)]
    source = reward.model if reward.kind == "hps" else getattr(reward, "path", None)
    return [NOTHING if source is None else _find(source)]


def _find(source: str) -> Model | None:
    if source in MODELS:
        return MODELS[source]
    folder = pipeline_path() / "clip" if source == "embedded" else Path(source).expanduser()
    files = [path for end in ("safetensors", "bin", "pt", "pth") for path in folder.glob(f"*.{end}")]
    return Model(sum(path.stat().st_size for path in files) / 4) if files else None
