"""Vision Transformers: ViT, DeiT, DeiT-III, DINOv2, SigLIP and CLIP towers. The model is the isotropic host itself."""

from models.core.aliases import read_names
from models.families.vit.dialects import VIT_DIALECTS
from models.families.vit.huggingface import CONFIGS
from models.families.vit.preprocessing import PREPROCESSING
from models.families.vit.variants import PUBLISHED, VARIANTS
from models.families.vit.weights import big_vision_table, torch_table
from models.families.vit.weights_huggingface import HUGGINGFACE, huggingface_table
from models.families.vit.weights_torchvision import TORCHVISION, torchvision_table
from models.hosts.isotropic import VisionTransformer
from models.weights.family import Family

FAMILY = Family(
    "vit",
    VisionTransformer,
    VARIANTS,
    PUBLISHED,
    PREPROCESSING,
    layouts={
        "torch": torch_table,
        "big_vision": big_vision_table,
        "huggingface": huggingface_table,
        "torchvision": torchvision_table,
    },
    dialects=(*VIT_DIALECTS, HUGGINGFACE, TORCHVISION),
    configs=CONFIGS,
    names=read_names(__file__),
)
