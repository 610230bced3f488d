"""What images of each variant of ViT go through, as the published weights of that name want it."""

import re

from models.families.vit.variants import VARIANTS
from models.weights.preprocessing import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocessing, cropped

IMAGENET, CLIP = (IMAGENET_MEAN, IMAGENET_STD), (CLIP_MEAN, CLIP_STD)
# By the first pattern that matches: crop, (mean, deviation), and who says so. Of a size without published weights it is
# what its family has. CLIP's are those of its authors: timm's default weights of that name are others, fine-tuned.
_RULES = {
    r"deit3?_.*": (0.9, IMAGENET, "timm"),
    r"dinov2_.*": (1.0, IMAGENET, "timm"),
    r".*_clip": (1.0, CLIP, "openai/CLIP"),
    r".*_reg\d": (0.95, (HALF, HALF), "timm"),
    r"vit_s8": (0.9, IMAGENET, "timm"),  # DINO's
    r"vit_.*": (0.9, (HALF, HALF), "timm"),
}


def _preprocessing(name: str) -> Preprocessing:
    crop, (mean, std), source = next(rule for pattern, rule in _RULES.items() if re.fullmatch(pattern, name))
    return cropped(VARIANTS[name].get("image_size", 224), crop, mean=mean, std=std, source=source)


PREPROCESSING = {name: _preprocessing(name) for name in VARIANTS}
