"""Published training recipes by family, each a function that changes a configuration."""

from configs.recipes.biformer import BIFORMER_DROP_PATH, biformer
from configs.recipes.davit import DAVIT_DROP_PATH, davit
from configs.recipes.digits import digits
from configs.recipes.halonet import HALONET_HYBRIDS, HALONET_PAPER, halonet, halonet_hybrid
from configs.recipes.maxvit import MAXVIT_21K_DROP_PATH, MAXVIT_DROP_PATH, maxvit, maxvit_finetune
from configs.recipes.nat import NAT_DROP_PATH, nat, nat_finetune
from configs.recipes.swin import SWIN_DROP_PATH, SWIN_FINETUNED, swin, swin_finetune
from configs.recipes.vit import big_vision, cifar, deit, imagenet
from configs.recipes.volo import VOLO_DROP_PATH, VOLO_FINETUNED, volo, volo_finetune

__all__ = [
    "BIFORMER_DROP_PATH",
    "DAVIT_DROP_PATH",
    "HALONET_HYBRIDS",
    "HALONET_PAPER",
    "MAXVIT_21K_DROP_PATH",
    "MAXVIT_DROP_PATH",
    "NAT_DROP_PATH",
    "SWIN_DROP_PATH",
    "SWIN_FINETUNED",
    "VOLO_DROP_PATH",
    "VOLO_FINETUNED",
    "biformer",
    "big_vision",
    "cifar",
    "davit",
    "deit",
    "digits",
    "halonet",
    "halonet_hybrid",
    "imagenet",
    "maxvit",
    "maxvit_finetune",
    "nat",
    "nat_finetune",
    "swin",
    "swin_finetune",
    "volo",
    "volo_finetune",
]
