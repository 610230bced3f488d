"""Every operator of `attn` at a small size, for what all of them have to do alike (`attn/test_operators.py`)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attn

BATCH = 2
GRID = attn.Grid((4, 6), prefix=1)
SPOTS = np.array([[0, 0], [2, 5], [3, 1]])
"""Queries on a map of 4 by 6, of which maps are asked for."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator and its arrays.

    Attributes:
      attend: `attend(*arrays, **options)`.
      shapes: of the arrays, by name; those with a batch have it first.
      whole: names of arrays without a batch.
      grouped: names of arrays whose heads may be fewer, and are.
      fixed: arrays that are no numbers to differentiate, by keyword, for a batch.
      maps: `maps(lse, *arrays)`, the maps of chosen queries, and `chosen(probs)`, the same of what an edit sees.
      heads: axis of heads.
      takes: what the operator takes besides an edit and dropout.
      kernel: an implementation that has no edits, and its platform.
    """

    attend: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    maps: Callable[..., Any]
    chosen: Callable[[Any], Any]
    whole: tuple[str, ...] = ()
    grouped: tuple[str, ...] = ()
    fixed: Callable[[int], dict[str, Any]] = lambda batch: {}
    takes: tuple[str, ...] = ()
    kernel: tuple[str, str] | None = None

    def arrays(self, *, batch: int = BATCH, dtype: Any = jnp.float32, seed: int = 0) -> list[jax.Array]:
        """Random numbers that bfloat16 has, so that all types compute with the same ones."""
        rng = np.random.default_rng(seed)
        made = []
        for name, shape in self.shapes.items():
            numbers = rng.normal(size=shape if name in self.whole else (batch, *shape))
            made.append(jnp.asarray(numbers, jnp.bfloat16).astype(jnp.float32 if name in self.whole else dtype))
        return made

    def bound(self, batch: int = BATCH, **options: Any) -> Callable[..., Any]:
        """The operator as a function of its arrays."""

        def run(*arrays: Any) -> Any:
            return self.attend(*arrays, **self.fixed(batch), **options)

        return run


def _neighborhood(q: Any, k: Any, v: Any, bias: Any, **options: Any) -> Any:
    return attn.neighborhood_attention(q, k, v, bias=bias, **{"window": 3, **options})


def _tokens(q: Any, k: Any, v: Any, bias: Any, **options: Any) -> Any:
    return attn.token_neighborhood_attention(q, k, v, grid=GRID, bias=bias, **{"window": 3, **options})


def _maps_of_tokens(lse: Any, q: Any, k: Any, v: Any, bias: Any) -> Any:
    """Of the prefix and of chosen places, over all tokens."""
    prefix = attn.dense_maps(q[:, :1], k, lse[:, :1])
    on_map = [x[:, 1:].reshape(x.shape[0], *GRID.shape, *x.shape[2:]) for x in (q, k, lse)]
    near, extra = attn.neighborhood_maps(*on_map, queries=SPOTS, window=3, bias=bias, extra_keys=k[:, :1])
    near = jnp.concatenate([extra, near.reshape(*near.shape[:3], -1)], -1)
    return jnp.concatenate([prefix, jnp.swapaxes(near, 1, 2)], 2)


WINDOW: dict[str, Any] = {"window": (2, 3), "shift": (1, 1)}


def _window(q: Any, k: Any, v: Any, bias: Any, **options: Any) -> Any:
    return attn.window_attention(q, k, v, bias=bias, **{**WINDOW, **options})


HALO: dict[str, Any] = {"block_size": 2, "halo_size": 1, "scale_positions": True}


def _halo(q: Any, k: Any, v: Any, height_rel: Any, width_rel: Any, **options: Any) -> Any:
    return attn.halo_attention(q, k, v, height_rel=height_rel, width_rel=width_rel, **{**HALO, **options})


def _bottleneck(q: Any, k: Any, v: Any, height_rel: Any, width_rel: Any, **options: Any) -> Any:
    return attn.bottleneck_attention(q, k, v, height_rel=height_rel, width_rel=width_rel, **options)


def _outlook(logits: Any, v: Any, **options: Any) -> Any:
    return attn.outlook_attention(logits, v, **{"scale": 0.3, **options})


_ROUTED: dict[str, Any] = {"regions": (2, 3)}
_OF_REGIONS = [0, 5, 3]  # the regions that SPOTS lie in


def _indices(batch: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {"indices": np.stack([[rng.permutation(6)[:2] for _ in range(6)] for _ in range(BATCH)])[:batch]}


def _routed(q: Any, k: Any, v: Any, *, indices: Any, **options: Any) -> Any:
    return attn.routed_attention(q, k, v, indices, **{**_ROUTED, "scale": 0.3, **options})


def _bilevel(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return attn.bilevel_routing_attention(q, k, v, **{**_ROUTED, "topk": 2, **options})


def _of_regions(maps: Any, indices: Any) -> Any:
    """A map over all places `[B, Q, H, Y, X]` as one over the places of the routed regions `[B, Q, H, K * S]`."""
    batch, count, heads = maps.shape[:3]
    regions = maps.reshape(batch, count, heads, 2, 2, 3, 2).transpose(0, 1, 3, 5, 2, 4, 6)
    regions = regions.reshape(batch, count, 6, heads, 4)
    own = indices[:, np.array(_OF_REGIONS)]
    picked = jnp.take_along_axis(regions, own[..., None, None], axis=2)
    return jnp.moveaxis(picked, 3, 2).reshape(batch, count, heads, -1)


def _chosen_of_regions(probs: Any) -> Any:
    """Of `[B, R, H, T, K * S]`, the rows of SPOTS in their regions of two by two places."""
    inside = [0, 1, 3]
    return jnp.stack([probs[:, region, :, place] for region, place in zip(_OF_REGIONS, inside, strict=True)], 1)


def _maps_of_bilevel(lse: Any, q: Any, k: Any, v: Any) -> Any:
    indices = attn.routed.route(q, k, topk=2, **_ROUTED)
    scale = (q.shape[-2] * q.shape[-1]) ** -0.5
    maps = attn.routed_maps(q, k, lse, indices, scale=scale, queries=SPOTS, **_ROUTED)
    return _of_regions(maps, indices)


def _spots(probs: Any, before: int = 0) -> Any:
    """Rows of SPOTS of maps `[B, H, N, M]` over a map of 4 by 6, and of what stands before it."""
    rows = np.concatenate([np.arange(before), before + SPOTS @ (6, 1)])
    return probs[:, :, rows]


_MAP, _KEYS = (4, 6, 4, 8), (4, 6, 2, 8)
_QKV = {"q": _MAP, "k": _KEYS, "v": _KEYS}
_SAME = {"q": _KEYS, "k": _KEYS, "v": _KEYS}

CASES = {
    "dense": Case(
        attn.dense_attention,
        {"q": (7, 4, 8), "k": (9, 2, 8), "v": (9, 2, 8)},
        grouped=("k", "v"),
        maps=lambda lse, q, k, v: attn.dense_maps(q[:, 2:5], k, lse[:, 2:5]),
        chosen=lambda probs: probs[:, :, 2:5],
        takes=("mask",),
        kernel=("cudnn", "cuda"),
    ),
    "neighborhood": Case(
        _neighborhood,
        {**_QKV, "bias": (4, 5, 5)},
        whole=("bias",),
        grouped=("k", "v"),
        maps=lambda lse, q, k, v, bias: attn.neighborhood_maps(q, k, lse, queries=SPOTS, window=3, bias=bias),
        chosen=lambda probs: jnp.swapaxes(_spots(probs), 1, 2).reshape(-1, 3, 4, 4, 6),
        kernel=("tpu", "tpu"),
    ),
    "token_neighborhood": Case(
        _tokens,
        {"q": (25, 4, 8), "k": (25, 2, 8), "v": (25, 2, 8), "bias": (4, 5, 5)},
        whole=("bias",),
        grouped=("k", "v"),
        maps=_maps_of_tokens,
        chosen=lambda probs: _spots(probs, 1),
        takes=("mask",),
        kernel=("tpu", "tpu"),
    ),
    "window": Case(
        _window,
        {**_QKV, "bias": (4, 3, 5)},
        whole=("bias",),
        grouped=("k", "v"),
        maps=lambda lse, q, k, v, bias: attn.window_maps(q, k, lse, [3, 0], bias=bias, **WINDOW),
        chosen=lambda probs: probs[:, np.array([3, 0])],
        kernel=("tpu", "tpu"),
    ),
    "halo": Case(
        _halo,
        {**_QKV, "height_rel": (7, 8), "width_rel": (7, 8)},
        whole=("height_rel", "width_rel"),
        grouped=("k", "v"),
        maps=lambda lse, q, k, v, *rel: attn.halo_maps(q, k, lse, [5, 1], height_rel=rel[0], width_rel=rel[1], **HALO),
        chosen=lambda probs: probs[:, np.array([5, 1])],
        kernel=("cudnn", "cuda"),
    ),
    "channel": Case(
        attn.channel_attention,
        dict.fromkeys("qkv", (6, 3, 8)),
        maps=lambda lse, q, k, v: attn.channel_maps(q, k, lse, [7, 2]),
        chosen=lambda probs: probs[:, :, np.array([7, 2])],
    ),
    "bottleneck": Case(
        _bottleneck,
        {**_QKV, "height_rel": (7, 8), "width_rel": (11, 8)},
        whole=("height_rel", "width_rel"),
        grouped=("k", "v"),
        maps=lambda lse, q, k, v, *rel: attn.bottleneck_maps(
            q, k, lse, queries=SPOTS, height_rel=rel[0], width_rel=rel[1]
        ),
        chosen=lambda probs: jnp.swapaxes(_spots(probs), 1, 2).reshape(-1, 3, 4, 4, 6),
        kernel=("cudnn", "cuda"),
    ),
    "outlook": Case(
        _outlook,
        {"logits": (2, 3, 2, 9, 9), "v": (4, 6, 2, 16)},
        maps=lambda lse, logits, v: attn.outlook_maps(logits[:, 1:], lse[:, 1:], scale=0.3),
        chosen=lambda probs: probs[:, 1:],
        kernel=("tpu", "tpu"),
    ),
    "routed": Case(
        _routed,
        _SAME,
        fixed=_indices,
        maps=lambda lse, q, k, v: _of_regions(
            attn.routed_maps(q, k, lse, scale=0.3, queries=SPOTS, **_ROUTED, **_indices(BATCH)),
            jnp.asarray(_indices(BATCH)["indices"]),
        ),
        chosen=_chosen_of_regions,
        takes=("weights",),
        kernel=("dense", "tpu"),
    ),
    "bilevel_routing": Case(
        _bilevel,
        _SAME,
        maps=_maps_of_bilevel,
        chosen=_chosen_of_regions,
        kernel=("dense", "tpu"),
    ),
}
"""By name of the function, without `_attention`."""
