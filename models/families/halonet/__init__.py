"""HaloNet (arXiv:2103.12731) and timm's hybrids with halo attention: bottleneck blocks in four stages."""

from models.core.aliases import read_names
from models.families.halonet.model import HaloNet
from models.families.halonet.preprocessing import PREPROCESSING
from models.families.halonet.variants import PUBLISHED, VARIANTS
from models.families.halonet.weights import halonet_table
from models.weights.family import Family

FAMILY = Family(
    "halonet",
    HaloNet,
    VARIANTS,
    PUBLISHED,
    PREPROCESSING,
    layouts={"torch": halonet_table},
    names=read_names(__file__),
)
