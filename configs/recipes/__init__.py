"""Published training recipes by family, each a function that changes a configuration."""

from configs.recipes.digits import digits
from configs.recipes.nat import NAT_DROP_PATH, nat, nat_finetune
from configs.recipes.vit import big_vision, cifar, deit, imagenet

__all__ = ["NAT_DROP_PATH", "big_vision", "cifar", "deit", "digits", "imagenet", "nat", "nat_finetune"]
