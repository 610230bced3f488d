"""Operators without weights, tied to reference files of their definitions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from official_config import Config, arguments
from references import Reference, Values

from attn import merge_attention, neighborhood_attention


def _no_options(config: Config) -> dict[str, Any]:
    if given := arguments(config):
        raise ValueError(f"an operator without arguments was given {', '.join(given)}")
    return {}


def _evaluate_merge(model: None, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    count = len(inputs) // 2
    outputs, logsumexps = ([inputs[f"{kind}{i}"] for i in range(count)] for kind in ("out", "lse"))
    merged, lse = merge_attention(outputs, logsumexps)
    return {"merged_out": merged, "merged_lse": lse}


def _cases_only(config: Config) -> dict[str, Any]:
    return _no_options({key: value for key, value in config.items() if key != "cases"})


def _evaluate_neighborhood(model: None, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """Outputs and gradients of every case: with `case0/q` and so on come `case0/out`, `case0/lse`, `case0/dq` ..."""
    values: Values = {}
    for case in config["cases"]:
        prefix = f"case{case['case']}/"
        given = {name.removeprefix(prefix): array for name, array in inputs.items() if name.startswith(prefix)}
        d_out = given.pop("do")
        options: dict[str, Any] = {name: tuple(case[name]) for name in ("stride", "dilation", "is_causal")}
        options |= {"window": tuple(case["kernel_size"]), "scale": case["scale"], "return_lse": True}

        def attend(arrays: Values, options: dict[str, Any] = options) -> Any:
            return neighborhood_attention(
                arrays["q"],
                arrays["k"],
                arrays["v"],
                bias=arrays.get("rpb"),
                extra_keys=arrays.get("add_k"),
                extra_values=arrays.get("add_v"),
                **options,
            )

        (out, lse), pullback = jax.vjp(attend, given)
        (gradients,) = pullback((d_out, jnp.zeros_like(lse)))
        found = {"out": out, "lse": lse} | {f"d{name}": gradient for name, gradient in gradients.items()}
        values |= {prefix + name: value for name, value in found.items()}
    return values


REFERENCES = (
    Reference(
        name="attn_merge",
        options=_no_options,
        golden=("attn_merge*",),
        inputs=("out[0-9]*", "lse[0-9]*"),
        evaluate=_evaluate_merge,
    ),
    Reference(
        name="na_ops",
        options=_cases_only,
        golden=("na_ops*",),
        inputs=tuple(f"case*/{name}" for name in ("q", "k", "v", "do", "rpb", "add_k", "add_v")),
        evaluate=_evaluate_neighborhood,
    ),
)
