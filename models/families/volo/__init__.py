"""VOLO (arXiv:2106.13112): outlook attention on a fine map, dense attention on a coarse one, class attention."""

from models.core.aliases import read_names
from models.families.volo.model import Volo
from models.families.volo.preprocessing import PREPROCESSING
from models.families.volo.variants import PUBLISHED, VARIANTS
from models.families.volo.weights import volo_table
from models.weights.family import Family

FAMILY = Family(
    "volo", Volo, VARIANTS, PUBLISHED, PREPROCESSING, layouts={"torch": volo_table}, names=read_names(__file__)
)
