"""Weight names of the official BiFormer, BiFormerSTL and of their attention alone.

https://github.com/rayleizhu/BiFormer; released files have them below `model`.
"""

from collections.abc import Iterator

from models.families.biformer.model import BiFormer
from models.weights.table import Row, Table, batch_norm, conv, copy, linear, norm, pointwise


def biformer_table(model: BiFormer) -> Table:
    """Names by layout; a model whose dense attention convolves its values has those of nchwBiFormerSTL."""
    nchw, patches = model.options.local_of == "values", model.options.layout == "patches"
    return Table(
        _stem(model, patches),
        *(_downsampling(model, stage, patches) for stage in range(1, len(model.stages))),
        *(_block(model, stage, patches, nchw) for stage in range(len(model.stages))),
        _norm(model.options.head_norm, "norm", "norm"),
        linear("head"),
    )


def _stem(model: BiFormer, patches: bool) -> Iterator[Row]:
    theirs = "downsample_layers.0"
    if patches:
        yield from conv(f"{theirs}.0", "patch_embed.conv")
        yield from _norm(model.options.norm, f"{theirs}.1", "patch_embed.norm")
        return
    for number, place in ((1, 0), (2, 3)):
        yield from conv(f"{theirs}.{place}", f"patch_embed.conv{number}")
        yield from _norm(model.options.norm, f"{theirs}.{place + 1}", f"patch_embed.norm{number}")


def _downsampling(model: BiFormer, stage: int, patches: bool) -> Iterator[Row]:
    """The norm comes before the convolution in Swin's layout, and after it in the other."""
    theirs, ours = f"downsample_layers.{stage}", f"stages.{stage}.downsample"
    yield from _norm(model.options.norm, f"{theirs}.{0 if patches else 1}", f"{ours}.norm")
    yield from conv(f"{theirs}.{1 if patches else 0}", f"{ours}.conv")


def _block(model: BiFormer, stage: int, patches: bool, nchw: bool) -> Iterator[Row]:
    theirs = f"stages.{stage}.blocks.{{}}" if patches else f"stages.{stage}.{{}}"
    ours = f"stages.{stage}.blocks.{{}}"
    dense = pointwise if nchw else linear
    yield from conv(f"{theirs}.pos_embed", f"{ours}.position")
    for number in (1, 2):
        yield from norm(f"{theirs}.norm{number}", f"{ours}.norm{number}")
        yield from copy(f"{theirs}.gamma{number}", f"{ours}.ls{number}.gamma")
    yield from dense(f"{theirs}.mlp.0", f"{ours}.mlp.fc1")
    yield from conv(f"{theirs}.mlp.1.dwconv", f"{ours}.mlp.conv")
    yield from dense(f"{theirs}.mlp.{2 if patches else 3}", f"{ours}.mlp.fc2")
    mechanism = model.options.by_stage()["attention"][stage]
    if mechanism == "bilevel_routing":
        yield from bilevel_rows(f"{theirs}.attn.", f"{ours}.attn.", nchw=nchw)
    elif mechanism == "convolution":
        # The modules before and behind only change the layout.
        yield from pointwise(f"{theirs}.attn.1", f"{ours}.attn.fc1")
        yield from conv(f"{theirs}.attn.2", f"{ours}.attn.conv")
        yield from pointwise(f"{theirs}.attn.3", f"{ours}.attn.fc2")
    else:
        yield from dense(f"{theirs}.attn.qkv", f"{ours}.attn.qkv")
        yield from conv(f"{theirs}.attn.lepe", f"{ours}.attn.local")
        yield from dense(f"{theirs}.attn.proj", f"{ours}.attn.proj")


def bilevel_rows(theirs: str, ours: str, *, nchw: bool) -> Iterator[Row]:
    """Rows of bi-level routing attention, whose names begin with `theirs` and `ours`; `nchw` are those of nchwBRA."""
    dense = pointwise if nchw else linear
    yield from dense(theirs + ("qkv_linear" if nchw else "qkv.qkv"), (f"{ours}qk", f"{ours}v"))
    yield from linear(f"{theirs}router.emb", f"{ours}router")
    yield from conv(f"{theirs}lepe", f"{ours}local")
    yield from dense(theirs + ("output_linear" if nchw else "wo"), f"{ours}proj")


def _norm(kind: str, theirs: str, ours: str) -> Iterator[Row]:
    yield from (batch_norm if kind == "batch" else norm)(theirs, ours)
