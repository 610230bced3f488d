"""DaViT (arXiv:2204.03645): attention between places and between channels in turn."""

from models.core.aliases import read_names
from models.families.davit.model import DualAttentionTransformer
from models.families.davit.preprocessing import PREPROCESSING
from models.families.davit.variants import PUBLISHED, VARIANTS
from models.families.davit.weights import DAVIT_DIALECTS, davit_table
from models.weights.family import Family

FAMILY = Family(
    "davit",
    DualAttentionTransformer,
    VARIANTS,
    PUBLISHED,
    PREPROCESSING,
    layouts={"torch": davit_table},
    dialects=DAVIT_DIALECTS,
    names=read_names(__file__),
)
