"""MaxViT tied to timm's MaxxVit and to google-research/maxvit."""

from collections.abc import Sequence

from families.maxvit.config import maxvit_options
from official_config import Config
from references import Reference, Values

from models.families.maxvit.model import MaxViT


def evaluate_maxvit(model: MaxViT, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """Logits (features without classes) as `y`, and the outputs of the official modules, maps `[B, C, Y, X]`."""
    outputs = model.features(inputs["x"].transpose(0, 2, 3, 1), layers=range(model.depth))
    named = {"stem": outputs["embedded"]}
    for number, stage in enumerate(model.stages):
        name = f"stages.{number}"
        named[name] = named[f"{name}.blocks"] = named["stages"] = outputs[name]
        for block in range(stage.depth):
            ours = f"{name}.blocks.{block - 1}" if block else f"{name}.first"
            named[f"{name}.blocks.{block}"] = outputs[ours].reshape(outputs[name].shape)
    # With a dense layer before the head the norm is part of timm's head.
    last = outputs["tokens"].reshape(named["stages"].shape)
    named["norm"] = last
    named = {module: value.transpose(0, 3, 1, 2) for module, value in named.items()}
    named["head.pre_logits"] = named["head.drop"] = outputs["pooled"]
    named["head"] = outputs["logits" if "logits" in outputs else "pooled"]
    return {"y": named["head"]} | {module: named[module] for module in stages}


REFERENCES = (
    Reference(
        name="maxvit",
        options=maxvit_options,
        golden=("maxvit", "maxvit[0-9]*", "maxvit_*"),
        evaluate=evaluate_maxvit,
        stacked=True,
    ),
)
