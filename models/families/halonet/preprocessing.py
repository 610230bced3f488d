"""What images of each variant of HaloNet go through. Of the paper's own models, `halonet_h*`, no weights are published;
theirs is what timm says of its untrained `halonet_h1`.
"""

from models.families.halonet.variants import VARIANTS
from models.weights.preprocessing import HALF, cropped

CROPPED_MORE = ("sehalonet33ts", "halonet50ts", "eca_halonext26ts")

PREPROCESSING = {
    name: cropped(options.get("image_size", 256), 0.94 if name in CROPPED_MORE else 0.95, source="timm")
    for name, options in VARIANTS.items()
} | {"haloregnetz_b": cropped(224, 0.94, mean=HALF, std=HALF, source="timm")}
