"""What images of each variant of MaxViT go through: the larger ones see all of an image, squeezed to a square."""

from models.families.maxvit.variants import VARIANTS
from models.weights.preprocessing import HALF, Preprocessing, cropped


def _preprocessing(name: str) -> Preprocessing:
    size = VARIANTS[name].get("image_size", 224)
    if size != 224:
        return cropped(size, 1.0, mean=HALF, std=HALF, mode="squash", source="timm")
    if name == "maxvit_xlarge":  # of ImageNet-21k alone
        return cropped(224, 0.95, mean=HALF, std=HALF, source="timm")
    return cropped(224, 0.95, source="timm")


PREPROCESSING = {name: _preprocessing(name) for name in VARIANTS}
