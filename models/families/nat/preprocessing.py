"""What images of each variant of NAT and DiNAT go through, by the settings of the official runs: timm's usual ones at
224 pixels, no crop at 384.
"""

from models.families.nat.variants import ISOTROPIC, VARIANTS
from models.weights.preprocessing import DEFAULT_CROP, cropped

PREPROCESSING = {
    name: cropped(size, DEFAULT_CROP if size == 224 else 1.0, source="SHI-Labs")
    for name, size in ((name, options.get("image_size", 224)) for name, options in {**VARIANTS, **ISOTROPIC}.items())
}
