"""NAT (arXiv:2204.07143), DiNAT, DiNAT_s and their isotropic twins (arXiv:2209.15001)."""

from models.core.aliases import read_names
from models.families.nat.isotropic import IsotropicTransformer
from models.families.nat.model import NeighborhoodTransformer
from models.families.nat.preprocessing import PREPROCESSING
from models.families.nat.variants import ISOTROPIC, PUBLISHED, VARIANTS
from models.families.nat.weights import isotropic_table, nat_table
from models.families.nat.weights_huggingface import CONFIGS, HUGGINGFACE, huggingface_table
from models.weights.family import Family

FAMILIES = (
    Family(
        "nat",
        NeighborhoodTransformer,
        VARIANTS,
        PUBLISHED,
        PREPROCESSING,
        layouts={"torch": nat_table, "huggingface": huggingface_table},
        dialects=(HUGGINGFACE,),
        configs=CONFIGS,
        names=read_names(__file__),
    ),
    Family("nat_isotropic", IsotropicTransformer, ISOTROPIC, {}, PREPROCESSING, layouts={"torch": isotropic_table}),
)
