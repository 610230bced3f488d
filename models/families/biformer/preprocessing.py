"""What images of each variant of BiFormer go through, as in the official evaluation: 256 pixels, and 224 of them."""

from models.families.biformer.variants import VARIANTS
from models.weights.preprocessing import DEFAULT_CROP, cropped

PREPROCESSING = {name: cropped(224, DEFAULT_CROP, source="rayleizhu/BiFormer") for name in VARIANTS}
