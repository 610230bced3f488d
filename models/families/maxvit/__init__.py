"""MaxViT (arXiv:2204.01697): convolutions, attention within blocks and over grids in every layer."""

from models.core.aliases import read_names
from models.families.maxvit.model import MaxViT
from models.families.maxvit.preprocessing import PREPROCESSING
from models.families.maxvit.variants import PUBLISHED, VARIANTS
from models.families.maxvit.weights import TENSORFLOW, maxvit_table, tensorflow_table
from models.weights.family import Family

FAMILY = Family(
    "maxvit",
    MaxViT,
    VARIANTS,
    PUBLISHED,
    PREPROCESSING,
    layouts={"torch": maxvit_table, "tensorflow": tensorflow_table},
    dialects=(TENSORFLOW,),
    names=read_names(__file__),
)
