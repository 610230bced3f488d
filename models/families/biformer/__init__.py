"""BiFormer (arXiv:2303.08810): bi-level routing attention in stages, dense attention in the last."""

from models.families.biformer.model import BiFormer
from models.families.biformer.preprocessing import PREPROCESSING
from models.families.biformer.variants import PUBLISHED, VARIANTS
from models.families.biformer.weights import biformer_table
from models.weights.family import Family

FAMILY = Family("biformer", BiFormer, VARIANTS, PUBLISHED, PREPROCESSING, layouts={"torch": biformer_table})
