"""Bi-level routing attention by its definition, in NumPy, with loops over regions and tokens; float64 throughout."""

import numpy as np


def region_of(shape, regions):
    """For each region, in row-major order, the places of a map of `shape` that lie in it, as (row, column)."""
    sizes = [side // count for side, count in zip(shape, regions, strict=True)]
    places = [[] for _ in range(regions[0] * regions[1])]
    for row in range(shape[0]):
        for column in range(shape[1]):
            places[row // sizes[0] * regions[1] + column // sizes[1]].append((row, column))
    return places


def means(x, regions, shape=None):
    """`[B, R, C]`; places behind `shape` are not counted."""
    found = []
    for places in region_of(x.shape[1:3], regions):
        inside = [at for at in places if shape is None or (at[0] < shape[0] and at[1] < shape[1])]
        found.append(sum(x[:, row, column].reshape(len(x), -1) for row, column in inside) / len(inside))
    return np.stack(found, 1)


def route(queries, keys, topk):
    """`[B, R, K]` by means of regions: largest products first, of equal ones the smaller region."""
    affinities = np.einsum("brc,bsc->brs", queries, keys)
    return np.argsort(-affinities, axis=-1, kind="stable")[..., :topk], affinities


def attend(q, k, v, indices, *, regions, scale, weights=None, d_out=None):
    """The output, and with a cotangent `(out, dq, dk, dv, d_weights)`. Weights multiply keys and values."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    weights = np.ones(indices.shape) if weights is None else np.asarray(weights, np.float64)
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    gradients = [np.zeros(x.shape) for x in (q, k, v, weights)]
    dq, dk, dv, dw = gradients
    of_queries, of_keys = region_of(q.shape[1:3], regions), region_of(k.shape[1:3], regions)
    for b in range(len(q)):
        for region, places in enumerate(of_queries):
            seen = [(n, at) for n, other in enumerate(indices[b, region]) for at in of_keys[other]]
            for head in range(q.shape[3]):
                w = np.array([weights[b, region, n] for n, _ in seen])
                keys = np.stack([k[b, *at, head] for _, at in seen])
                values = np.stack([v[b, *at, head] for _, at in seen])
                for place in places:
                    query = q[b, *place, head]
                    logits = scale * w * (keys @ query)
                    p = np.exp(logits - logits.max())
                    p /= p.sum()
                    out[b, *place, head] = p * w @ values
                    if d_out is None:
                        continue
                    d = np.asarray(d_out, np.float64)[b, *place, head]
                    dp = w * (values @ d)
                    dl = p * (dp - p @ dp)
                    dq[b, *place, head] += scale * (dl * w) @ keys
                    for i, (n, at) in enumerate(seen):
                        dk[b, *at, head] += scale * dl[i] * w[i] * query
                        dv[b, *at, head] += p[i] * w[i] * d
                        dw[b, region, n] += scale * dl[i] * keys[i] @ query + p[i] * values[i] @ d
    return out if d_out is None else (out, *gradients)


def pool(x, regions, *, kind, size):
    """Keys of every region pooled; see `attn.routed.region_pool`."""
    reduce = np.max if kind.endswith("max") else np.mean
    batch, *shape = x.shape[:3]
    sizes = [side // count for side, count in zip(shape, regions, strict=True)]
    if kind.startswith("adaptive"):
        cuts = [[(i * n // size, -(-(i + 1) * n // size)) for i in range(size)] for n in sizes]
    else:
        cuts = [[(i * size, i * size + size) for i in range(n // size)] for n in sizes]
    rows, columns = cuts
    out = np.zeros((batch, regions[0] * len(rows), regions[1] * len(columns), *x.shape[3:]))
    for j in range(regions[0]):
        for i in range(regions[1]):
            for a, (top, bottom) in enumerate(rows):
                for c, (left, right) in enumerate(columns):
                    y, z = j * sizes[0], i * sizes[1]
                    part = x[:, y + top : y + bottom, z + left : z + right]
                    out[:, j * len(rows) + a, i * len(columns) + c] = reduce(part, axis=(1, 2))
    return out


def depthwise(x, kernel, bias):
    """Sum over a square of neighbours of each channel, zeros outside; kernel `[C, 1, k, k]` as in PyTorch."""
    side = kernel.shape[-1]
    wide = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    total = np.zeros(x.shape) + bias
    for row in range(side):
        for column in range(side):
            total += wide[:, row : row + x.shape[1], column : column + x.shape[2]] * kernel[:, 0, row, column]
    return total


def legacy(weights, x, *, dim, num_heads, n_win, topk, **options):
    """The official BiLevelRoutingAttention (ops/bra_legacy.py), as docs/families/biformer.md describes it; x `[B, Y, X,
    C]`."""
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    batch, rows, columns, _ = x.shape
    if options.get("auto_pad"):
        x = np.pad(x, ((0, 0), (0, -rows % n_win), (0, -columns % n_win), (0, 0)))
    shape, regions = x.shape[1:3], (n_win, n_win)
    qk_dim = options.get("qk_dim") or dim
    scale = options.get("qk_scale") or qk_dim**-0.5
    q, k, v = np.split(x @ weights["qkv.qkv.weight"].T + weights["qkv.qkv.bias"], (qk_dim, 2 * qk_dim), axis=-1)
    queries, keys = means(q, regions), means(k, regions)
    if options.get("param_routing"):
        queries, keys = (m @ weights["router.emb.weight"].T + weights["router.emb.bias"] for m in (queries, keys))
    indices, affinities = route(queries, keys, topk)
    soft = None
    if options.get("soft_routing"):
        chosen = np.exp(scale * np.take_along_axis(affinities, indices, -1))
        soft = chosen / chosen.sum(-1, keepdims=True)
    local = depthwise(v, weights["lepe.weight"], weights["lepe.bias"]) if "lepe.weight" in weights else 0
    kept = {"q": q, "k": k, "v": v}
    mode = options.get("kv_downsample_mode", "identity")
    if mode != "identity":
        kind = ("adaptive_" if mode.startswith("ada_") else "") + ("max" if "max" in mode else "average")
        size = options["kv_per_win"] if mode.startswith("ada_") else options["kv_downsample_ratio"]
        kept |= {name: pool(kept[name], regions, kind=kind, size=size) for name in ("k", "v")}
    heads = [kept[name].reshape(*kept[name].shape[:3], num_heads, -1) for name in ("q", "k", "v")]
    out = attend(*heads, indices, regions=regions, scale=scale, weights=soft).reshape(batch, *shape, dim) + local
    if options.get("param_attention", "qkvo") == "qkvo":
        out = out @ weights["wo.weight"].T + weights["wo.bias"]
    return out[:, :rows, :columns]


def nchw(weights, x, *, dim, num_heads, n_win, topk, qk_scale=None, **_):
    """The official nchwBRA (ops/bra_nchw.py), as docs/families/biformer.md describes it; x and result `[B, Y, X,
    C]`."""
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    batch, rows, columns, _ = x.shape
    sizes = (rows // n_win, columns // n_win)
    regions = (-(-rows // sizes[0]), -(-columns // sizes[1]))
    projected = x @ weights["qkv_linear.weight"][:, :, 0, 0].T + weights["qkv_linear.bias"]
    local = projected[..., 2 * dim :]
    local = depthwise(local, weights["lepe.weight"], weights["lepe.bias"]) if "lepe.weight" in weights else 0 * local
    rest = [(0, count * size - side) for count, size, side in zip(regions, sizes, (rows, columns), strict=True)]
    q, k, v = np.split(np.pad(projected, ((0, 0), *rest, (0, 0))), 3, axis=-1)
    indices, _ = route(means(q, regions, (rows, columns)), means(k, regions, (rows, columns)), topk)
    heads = [part.reshape(*part.shape[:3], num_heads, -1) for part in (q, k, v)]
    out = attend(*heads, indices, regions=regions, scale=qk_scale or dim**-0.5)
    out = out.reshape(batch, *out.shape[1:3], dim)[:, :rows, :columns] + local
    return out @ weights["output_linear.weight"][:, :, 0, 0].T + weights["output_linear.bias"]
