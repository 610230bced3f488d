"""Reading optimized modules: shapes, loops, FLOPs, traffic and exchanges, on modules small enough to count by hand."""

import textwrap

import numpy as np
import pytest

from training.plans import hlo, hlo_cost

ADD = """
add (a: f32[], b: f32[]) -> f32[] {
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT sum = f32[] add(%a, %b)
}
"""


def module(*computations, entry):
    """A module from computations without indentation marks; `entry` is the body of the entry computation."""
    body = textwrap.indent(textwrap.dedent(entry).strip(), "  ")
    others = "\n".join(map(textwrap.dedent, computations))
    return hlo.parse(f"HloModule m\n{others}\nENTRY main () -> f32[] {{\n{body}\n}}\n")


def cost(*computations, entry):
    return hlo_cost.measure(module(*computations, entry=entry))


def loop(limit="%limit", step="%one", start="0", inner="", bound="constant(5)", known=""):
    """A loop that multiplies two 8 x 8 matrices in each pass, and the entry that runs it."""
    body = f"""
body (p: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {{
  p = (s32[], f32[8,8]{{1,0}}, s32[]) parameter(0)
  i = s32[] get-tuple-element(%p), index=0
  x = f32[8,8]{{1,0}} get-tuple-element(%p), index=1
  n = s32[] get-tuple-element(%p), index=2
  one = s32[] constant(1)
  two = s32[] constant(2)
  same = s32[] copy(%i)
  next = s32[] add(%same, {step})
  y = f32[8,8]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  {inner}
  ROOT out = (s32[], f32[8,8]{{1,0}}, s32[]) tuple(%next, %y, %n)
}}
"""
    condition = f"""
condition (p: (s32[], f32[8,8], s32[])) -> pred[] {{
  p = (s32[], f32[8,8]{{1,0}}, s32[]) parameter(0)
  i = s32[] get-tuple-element(%p), index=0
  limit = s32[] constant(5)
  carried = s32[] get-tuple-element(%p), index=2
  ROOT less = pred[] compare(%i, {limit}), direction=LT
}}
"""
    entry = f"""
start = s32[] constant({start})
bound = s32[] {bound}
x = f32[8,8]{{1,0}} parameter(0)
init = (s32[], f32[8,8]{{1,0}}, s32[]) tuple(%start, %x, %bound)
ROOT done = (s32[], f32[8,8]{{1,0}}, s32[]) while(%init), condition=%condition, body=%body{known}
"""
    return cost(body, condition, entry=entry)


KNOWN = ', backend_config={"known_trip_count":{"n":"11"}}'
ONE_PASS = 2 * 8**3


@pytest.mark.parametrize(
    ("options", "trips"),
    [
        ({}, 5),
        ({"step": "%two"}, 3),
        ({"start": "3"}, 2),
        ({"start": "9"}, 0),
        ({"limit": "%carried", "bound": "constant(7)"}, 7),
        ({"known": KNOWN, "limit": "%carried", "bound": "parameter(1)"}, 11),
    ],
)
def test_loops_count_as_often_as_they_run(options, trips):
    found = loop(**options)
    assert found.flops == trips * ONE_PASS
    assert found.product_bytes == trips * 3 * 8 * 8 * 4
    assert not found.unknown_loops


def test_a_loop_whose_length_data_decide_is_reported():
    found = loop(limit="%carried", bound="parameter(1)")
    assert found.flops == ONE_PASS
    assert list(found.unknown_loops) == ["done"]


def test_nested_loops_multiply():
    inner = """
    inner_body (p: (s32[])) -> (s32[]) {
      p = (s32[]) parameter(0)
      i = s32[] get-tuple-element(%p), index=0
      three = s32[] constant(3)
      next = s32[] fusion(%i, %three), kind=kLoop, calls=%plus
      z = f32[4,4]{1,0} parameter(1)
      y = f32[4,4]{1,0} dot(%z, %z), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      ROOT out = (s32[]) tuple(%next)
    }
    inner_condition (p: (s32[])) -> pred[] {
      p = (s32[]) parameter(0)
      i = s32[] get-tuple-element(%p), index=0
      nine = s32[] constant(9)
      ROOT less = pred[] compare(%i, %nine), direction=LE
    }
    plus (a: s32[], b: s32[]) -> s32[] {
      a = s32[] parameter(0)
      b = s32[] parameter(1)
      ROOT sum = s32[] add(%a, %b)
    }
    """
    outer = """
    body (p: (s32[])) -> (s32[]) {
      p = (s32[]) parameter(0)
      i = s32[] get-tuple-element(%p), index=0
      one = s32[] constant(1)
      zero = s32[] constant(0)
      begin = (s32[]) tuple(%zero)
      done = (s32[]) while(%begin), condition=%inner_condition, body=%inner_body
      next = s32[] add(%i, %one)
      ROOT out = (s32[]) tuple(%next)
    }
    condition (p: (s32[])) -> pred[] {
      p = (s32[]) parameter(0)
      i = s32[] get-tuple-element(%p), index=0
      six = s32[] constant(6)
      ROOT less = pred[] compare(%i, %six), direction=NE
    }
    """
    entry = """
    zero = s32[] constant(0)
    init = (s32[]) tuple(%zero)
    ROOT done = (s32[]) while(%init), condition=%condition, body=%body
    """
    assert cost(inner, outer, entry=entry).flops == 6 * 4 * 2 * 4**3


def test_one_branch_runs():
    branches = [
        f"""
        branch{size} (x: f32[{size},{size}]) -> f32[{size},{size}] {{
          x = f32[{size},{size}]{{1,0}} parameter(0)
          ROOT y = f32[{size},{size}]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
        }}
        """
        for size in (4, 16, 8)
    ]
    entry = """
    which = s32[] parameter(0)
    x = f32[4,4]{1,0} parameter(1)
    ROOT y = f32[4,4]{1,0} conditional(%which, %x, %x, %x), branch_computations={%branch4, %branch16, %branch8}
    """
    assert cost(*branches, entry=entry).flops == 2 * 16**3


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def convolved(size, window, *, stride=1, pad=(0, 0), dilation=1, window_dilation=1):
    """(Places, pairs that meet a number) along one axis, by convolving ones."""
    spread = np.zeros((size - 1) * dilation + 1)
    spread[::dilation] = 1
    padded = np.concatenate([np.zeros(pad[0]), spread, np.zeros(pad[1])])
    reach = (window - 1) * window_dilation + 1
    starts = range(0, len(padded) - reach + 1, stride)
    return len(starts), sum(padded[start : start + reach : window_dilation].sum() for start in starts)


@pytest.mark.parametrize(
    "axis",
    [
        {"size": 14, "window": 3, "pad": (1, 1)},
        {"size": 14, "window": 3, "stride": 2, "pad": (0, 1)},
        {"size": 9, "window": 4, "dilation": 2, "pad": (3, 2)},
        {"size": 12, "window": 3, "window_dilation": 3, "pad": (2, 0)},
        {"size": 32, "window": 32, "stride": 31, "dilation": 32},  # 32 matrices of a batch, as a TPU writes them
    ],
)
def test_convolutions_count_numbers_only(axis):
    places, pairs = convolved(**axis)
    if axis["size"] == 32:
        assert (places, pairs) == (32, 32)
    names = {"stride": "stride", "dilation": "lhs_dilate", "window_dilation": "rhs_dilate"}
    window = " ".join(
        [f"size={axis['window']}"]
        + ([f"pad={axis['pad'][0]}_{axis['pad'][1]}"] if "pad" in axis else [])
        + [f"{names[key]}={axis[key]}" for key in names if key in axis]
    )
    entry = f"""
    x = f32[5,{axis["size"]},6]{{2,1,0}} parameter(0)
    w = f32[{axis["window"]},6,7]{{2,1,0}} parameter(1)
    ROOT y = f32[5,{places},7]{{2,1,0}} convolution(%x, %w), window={{{window}}}, dim_labels=b0f_0io->b0f
    """
    assert cost(entry=entry).flops == 2 * 5 * 6 * 7 * pairs


def test_groups_of_a_convolution():
    entry = """
    x = f32[5,8,8,6]{3,2,1,0} parameter(0)
    w = f32[3,3,1,6]{3,2,1,0} parameter(1)
    ROOT y = f32[5,6,6,6]{3,2,1,0} convolution(%x, %w), window={size=3x3}, \
    dim_labels=b01f_01io->b01f, feature_group_count=6
    """
    assert cost(entry=entry).flops == 2 * 5 * 6 * 6 * 6 * 9


def test_products_inside_fusions_count():
    fused = """
    inside (x: f32[8,4]) -> f32[8,8] {
      x = f32[8,4]{1,0} parameter(0)
      y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
      ROOT z = f32[8,8]{1,0} negate(%y)
    }
    """
    entry = """
    x = f32[8,4]{1,0} parameter(0)
    ROOT y = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%inside, backend_config={"estimated_cycles":"321"}
    """
    found = cost(fused, entry=entry)
    assert (found.flops, found.cycles) == (2 * 8 * 8 * 4, 321)
    assert found.memory_bytes == 4 * (8 * 4 + 8 * 8)


def test_kernels_count_what_they_state():
    entry = """
    x = f32[64]{0} parameter(0)
    y = f32[64]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/k/pallas_call"}, \
    backend_config={"custom_call_config":{"cost_estimate":{"flops":"33554432","bytes_accessed":"786432"}}}
    ROOT z = f32[64]{0} custom-call(%y), custom_call_target="tpu_custom_call"
    """
    found = cost(entry=entry)
    assert found.kernels == {"jit(f)/k/pallas_call": 1, "z": 1}
    assert (found.flops, found.memory_bytes) == (33554432, 4 * 256)


# --- traffic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size", "padded", "in_hbm"),
    [
        ("f32[4,197]{1,0:T(8,128)}", 4 * 4 * 197, 4 * 8 * 256, True),
        ("bf16[4,197]{1,0:T(8,128)(2,1)S(1)}", 2 * 4 * 197, 2 * 8 * 256, False),
        ("bf16[4,197]{0,1:T(8,128)(2,1)}", 2 * 4 * 197, 2 * 200 * 128, True),
        ("f32[3,16,197]{2,1,0:T(8,128)S(0)}", 4 * 3 * 16 * 197, 4 * 3 * 16 * 256, True),
        ("f32[]{:T(128)}", 4, 512, True),
        ("pred[9]{0}", 9, 9, True),
        ("f8e4m3fn[2,3]{1,0}", 6, 6, True),
    ],
)
def test_buffers_as_they_lie_in_memory(shape, size, padded, in_hbm):
    found = module(entry=f"ROOT x = {shape} parameter(0)").entry.root.outputs[0]
    assert (found.size, found.padded, found.in_hbm) == (size, padded, in_hbm)


def test_only_main_memory_and_only_slices_count():
    fused = """
    take (stack: f32[12,100], new: f32[1,100], i: s32[]) -> (f32[12,100], f32[1,100], f32[12,100]) {
      stack = f32[12,100]{1,0} parameter(0)
      new = f32[1,100]{1,0} parameter(1)
      i = s32[] parameter(2)
      zero = s32[] constant(0)
      part = f32[1,100]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,100}
      sum = f32[1,100]{1,0} add(%part, %new)
      other = f32[12,100]{1,0} parameter(3)
      put = f32[12,100]{1,0} dynamic-update-slice(%other, %sum, %i, %zero)
      ROOT out = (f32[12,100]{1,0}, f32[1,100]{1,0}, f32[12,100]{1,0}) tuple(%put, %sum, %stack)
    }
    """
    entry = """
    stack = f32[12,100]{1,0} parameter(0)
    new = f32[1,100]{1,0:S(1)} parameter(1)
    i = s32[]{:S(6)} parameter(2)
    ROOT y = (f32[12,100]{1,0}, f32[1,100]{1,0}, f32[12,100]{1,0}) fusion(%stack, %new, %i, %stack), kind=kLoop, \
    calls=%take
    """
    # Read: a slice of the stack. Written: a slice in place, and the sum. `new` is on the chip, the stack handed on.
    assert cost(fused, entry=entry).memory_bytes == 3 * 400


@pytest.mark.parametrize(
    ("line", "bytes_moved"),
    [
        ("y = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%x)", 256),
        ("y = ((f32[64]{0}), f32[16]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:16]}", 64),
        ("y = f32[64]{0:S(1)} copy-done(%x)", 0),
        ("y = f32[64]{0} copy(%x)", 512),
        ("y = f32[16]{0} dynamic-slice(%x, %x), dynamic_slice_sizes={16}", 128),
        ("y = f32[64]{0:S(1)} negate(%x)", 256),
        ('y = f32[64]{0} custom-call(), custom_call_target="AllocateBuffer"', 0),
    ],
)
def test_traffic_of_single_instructions(line, bytes_moved):
    assert cost(entry=f"x = f32[64]{{0}} parameter(0)\nROOT {line}").memory_bytes == bytes_moved


# --- exchanges --------------------------------------------------------------------------------------------------------


def exchanges(found):
    return {(one.kind, one.size, one.overlapped): count for one, count in found.collectives.items()}


def test_exchanges_count_once():
    entry = """
    x = f32[16]{0} parameter(0)
    a = f32[64]{0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
    b = (f32[16]{0}, f32[64]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
    c = f32[64]{0} all-gather-done(%b)
    d = (f32[16]{0}, f32[64]{0}) all-reduce(%x, %c), replica_groups=mesh['a'=4] {'a'}, to_apply=%add
    e = f32[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
    f = f32[] constant(0)
    zeros = f32[16]{0} broadcast(%f), dimensions={}
    ROOT g = f32[16]{0} collective-permute(%zeros), source_target_pairs={{0,1},{1,0}}
    """
    assert exchanges(cost(ADD, entry=entry)) == {
        ("all-gather", 64, False): 1,
        ("all-gather", 64, True): 1,
        ("all-reduce", 320, False): 1,
        ("collective-permute", 64, False): 1,
    }


def test_an_exchange_spread_over_fusions_counts_once_with_its_traffic():
    def part(name, flag, target=""):
        end = "ROOT out = (f32[16]{0}, f32[64]{0}) tuple(%x, %all)"
        if target:
            end = f'ROOT out = f32[64]{{0}} custom-call(%all), custom_call_target="{target}"'
        config = f'backend_config={{"async_collective_fusion_config":{{"flag_start":"{flag}"}}}}'
        return f"""
        {name} (x: f32[16]) -> f32[64] {{
          x = f32[16]{{0}} parameter(0)
          all = f32[64]{{0}} all-gather(%x), channel_id=98, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, {config}
          {end}
        }}
        """

    entry = """
    x = f32[16]{0} parameter(0)
    a = f32[64]{0} fusion(%x), kind=kCustom, calls=%first
    b = (f32[16]{0}, f32[64]{0}) fusion(%x), kind=kCustom, calls=%middle
    ROOT c = f32[64]{0} fusion(%x), kind=kCustom, calls=%last
    """
    parts = (part("first", -1, "AsyncCollectiveStart"), part("middle", 2), part("last", 2, "AsyncCollectiveDone"))
    found = cost(*parts, entry=entry)
    assert exchanges(found) == {("all-gather", 64, True): 1}
    assert found.memory_bytes == 64 + 256


def test_a_sum_of_which_slices_are_used_is_a_reduce_scatter():
    fused = """
    scatter (x: f32[64]) -> f32[16] {
      x = f32[64]{0} parameter(0)
      i = s32[] constant(0)
      sum = (f32[64]{0}) all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%add
      whole = f32[64]{0} get-tuple-element(%sum), index=0
      ROOT part = f32[16]{0} dynamic-slice(%whole, %i), dynamic_slice_sizes={16}
    }
    """
    entry = """
    x = f32[64]{0} parameter(0)
    ROOT y = f32[16]{0} fusion(%x), kind=kCustom, calls=%scatter
    """
    assert exchanges(cost(ADD, fused, entry=entry)) == {("reduce-scatter", 256, False): 1}


def test_an_exchange_on_a_sparse_core():
    offloaded = """
    work (x: bf16[64]) -> bf16[64] {
      x = bf16[64]{0} parameter(0)
      ROOT y = bf16[64]{0} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%add, \
    backend_config={"estimated_cycles":"9223372036854775807"}
    }, execution_thread="sparsecore"
    start (x: bf16[64]) -> bf16[64] {
      x = bf16[64]{0} parameter(0)
      ROOT y = bf16[64]{0} custom-call(%x), custom_call_target="any", called_computations={%work}
    }, execution_thread="sparsecore"
    """
    entry = """
    x = bf16[64]{0} parameter(0)
    begun = ((), (), (s32[128]{0})) async-start(), async_execution_thread="sparsecore", calls=%start
    ROOT done = () async-done(%begun)
    """
    found = cost(ADD, offloaded, entry=entry)
    assert exchanges(found) == {("all-reduce", 128, True): 1}
    assert (found.memory_bytes, found.cycles) == (2 * 128, 0)


def test_exchanges_between_slices():
    entry = """
    x = bf16[64]{0} parameter(0)
    token = token[] after-all()
    out = (bf16[64]{0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, \
    frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
    sent = token[] send-done(%out), is_host_transfer=true
    in = (bf16[64]{0}, u32[], token[]) recv(%token), is_host_transfer=true, \
    frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
    ROOT y = (bf16[64]{0}, token[]) recv-done(%in), is_host_transfer=true
    """
    (one,) = cost(entry=entry).collectives
    assert (one.kind, one.size, one.between_slices, one.sent(2)) == ("all-reduce", 128, True, 128)


def test_bytes_sent_around_a_ring():
    sent = {kind: hlo_cost.Collective(kind, 1200, "", False).sent(4) for kind in hlo_cost.KINDS}
    assert sent["all-gather"] == 3600
    assert sent["all-reduce"] == 2 * sent["reduce-scatter"] == 1800
    assert sent["all-to-all"] == 900
    assert sent["collective-permute"] == 1200


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ("{{0,2},{1,3}}", [(0, 2), (1, 3)]),
        ("{}", [(0, 1, 2, 3)]),
        ("[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
        ("mesh['a'=2,'b'=2] {'b'}", [(0, 1), (2, 3)]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
    ],
)
def test_groups_of_devices(groups, found):
    assert hlo_cost.members(groups, 4) == found


def test_what_cannot_be_read_is_said():
    with pytest.raises(ValueError, match="device groups"):
        hlo_cost.members("mesh['a'=4] {'a':(1)2}", 4)
    with pytest.raises(ValueError, match="no XLA module"):
        hlo.parse("nothing\n")
