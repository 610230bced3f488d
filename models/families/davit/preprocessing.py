"""What images of each variant of DaViT go through."""

from models.families.davit.variants import VARIANTS
from models.weights.preprocessing import cropped

PREPROCESSING = {
    name: cropped(options.get("image_size", 224), 0.95, source="timm") for name, options in VARIANTS.items()
}
