"""What images of each variant of Swin go through."""

from models.families.swin.variants import VARIANTS
from models.weights.preprocessing import cropped

PREPROCESSING = {
    name: cropped(384, 1.0, source="timm") if name.endswith("_384") else cropped(224, 0.9, source="timm")
    for name in VARIANTS
}
