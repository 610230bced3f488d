"""Operators without weights, tied to reference files of their definitions."""

from collections.abc import Sequence
from typing import Any

from attn import merge_attention
from models.family import Config, Family, Values, arguments, register_family


def _no_options(config: Config) -> dict[str, Any]:
    if given := arguments(config):
        raise ValueError(f"an operator without arguments was given {', '.join(given)}")
    return {}


def _evaluate_merge(model: None, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    count = len(inputs) // 2
    outputs, logsumexps = ([inputs[f"{kind}{i}"] for i in range(count)] for kind in ("out", "lse"))
    merged, lse = merge_attention(outputs, logsumexps)
    return {"merged_out": merged, "merged_lse": lse}


register_family(
    Family(
        name="attn_merge",
        model=None,
        options=_no_options,
        golden=("attn_merge*",),
        inputs=("out[0-9]*", "lse[0-9]*"),
        evaluate=_evaluate_merge,
    )
)
