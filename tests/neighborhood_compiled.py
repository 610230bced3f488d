"""What `test_neighborhood_tpu.py` has compiled in a process of its own."""

from kernels.neighborhood import tpu
from kernels.neighborhood.pattern import make_pattern


def both_directions(q, k, v, d_out, bias, *, window, dilation, heads):
    """A forward and a backward pass from packed arrays, for the compiler."""
    pattern = make_pattern(q.shape[1:-1], window, dilation=dilation)
    split = [array.reshape(*array.shape[:-1], heads, -1) for array in (q, k, v, d_out)]
    out, lse = tpu.forward(*split[:3], bias, None, None, pattern=pattern, scale=0.125)
    return out, tpu.backward(*split[:3], bias, None, None, out, lse, split[3], None, pattern=pattern, scale=0.125)
