"""What `test_routed_tpu.py` has compiled in a process of its own."""

from kernels.routed import tpu


def both_directions(q, k, v, indices, d_out, *, heads, regions):
    """A forward and a backward pass from packed arrays, for the compiler."""
    split = [array.reshape(*array.shape[:-1], heads, -1) for array in (q, k, v, d_out)]
    options = {"regions": tuple(regions), "scale": 0.125}
    out, lse = tpu.forward(*split[:3], indices, **options)
    return out, lse, tpu.backward(*split[:3], indices, out, lse, split[3], **options)
