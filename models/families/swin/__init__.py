"""Swin Transformer (arXiv:2103.14030): attention within windows, shifted in every other layer."""

from models.core.aliases import read_names
from models.families.swin.model import SwinTransformer
from models.families.swin.preprocessing import PREPROCESSING
from models.families.swin.variants import PUBLISHED, VARIANTS
from models.families.swin.weights import SWIN_DIALECTS, swin_table
from models.families.swin.weights_huggingface import CONFIGS, HUGGINGFACE, huggingface_table
from models.families.swin.weights_torchvision import TORCHVISION, torchvision_table
from models.weights.family import Family

FAMILY = Family(
    "swin",
    SwinTransformer,
    VARIANTS,
    PUBLISHED,
    PREPROCESSING,
    layouts={"torch": swin_table, "huggingface": huggingface_table, "torchvision": torchvision_table},
    dialects=(*SWIN_DIALECTS, HUGGINGFACE, TORCHVISION),
    configs=CONFIGS,
    names=read_names(__file__),
)
