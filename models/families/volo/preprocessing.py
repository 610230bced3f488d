"""What images of each variant of VOLO go through. A crop of more than 1 has a black border."""

from models.families.volo.variants import VARIANTS
from models.weights.preprocessing import Preprocessing, cropped

WITH_BORDER = ("volo_d4_448", "volo_d5_448", "volo_d5_512")


def _preprocessing(name: str) -> Preprocessing:
    size = VARIANTS[name].get("image_size", 224)
    return cropped(size, 1.15 if name in WITH_BORDER else 0.96 if size == 224 else 1.0, source="timm")


PREPROCESSING = {name: _preprocessing(name) for name in VARIANTS}
