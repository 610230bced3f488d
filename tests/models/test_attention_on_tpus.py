"""Attention on four TPU chips, compiled by their own compiler: kernels run, and chips exchange next to nothing."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from attention_mesh_job import EXCHANGE
from compiling import for_tpus, needs_compiler
from jax.sharding import NamedSharding, PartitionSpec

from attn import dense_attention, neighborhood_attention, outlook_attention, routed_attention
from attn.dense import splash
from training.distributed import mesh
from training.plans import chips

pytestmark = [pytest.mark.plan, needs_compiler]


@pytest.fixture(scope="module")
def grid():
    """2 x 1 x 2 chips."""
    with for_tpus():
        yield mesh.create(SimpleNamespace(data=2, fsdp=1, tensor=2), chips.parse("v5e:2x2").devices())


def compiled(grid, function, heads, *tables):
    """Results and gradients, all of them where the arguments are."""

    def step(arguments, cotangent):
        out, pull = jax.vjp(function, *arguments)
        return out, pull(cotangent)

    out = PartitionSpec(("data", "fsdp"), *[None] * (len(heads) - 3), "tensor")
    specs = [out] * 3 + [PartitionSpec("tensor")] * len(tables)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(grid, spec))
        for shape, spec in zip([heads] * 3 + list(tables), specs, strict=True)
    ]
    wanted = (arguments[0].sharding, tuple(argument.sharding for argument in arguments))
    program = jax.jit(mesh.under(grid, step), out_shardings=wanted)
    return program.lower(arguments, arguments[0]).compile().as_text()


def exchanged(text):
    return [
        (kind, [int(size) for size in dims.split(",") if size])
        for shape, kind in re.findall(EXCHANGE, text)
        for dims in re.findall(r"\w+\[([\d,]*)\]", shape)
    ]


def test_neighborhood_attention_runs_its_kernels_and_sums_its_table(grid):
    def attend(q, k, v, bias):
        return neighborhood_attention(q, k, v, window=5, bias=bias)

    text = compiled(grid, attend, (2, 16, 16, 4, 32), (4, 9, 9))
    assert text.count("tpu_custom_call") >= 2
    assert exchanged(text) == [("all-reduce", [2, 9, 9])]


def test_dense_attention_runs_its_kernels_alone(grid, monkeypatch):
    monkeypatch.setattr(splash, "LEAST_TOKENS", 512)
    text = compiled(grid, dense_attention, (2, 600, 2, 64))
    assert text.count("tpu_custom_call") >= 2
    assert exchanged(text) == []


def test_routed_attention_runs_its_kernels_alone(grid):
    def attend(q, k, v):
        routes = jnp.arange(2 * 4).reshape(2, 4, 1) % 4
        return routed_attention(q, k, v, routes, regions=(2, 2), scale=0.5)

    text = compiled(grid, attend, (2, 8, 8, 4, 32))
    assert text.count("tpu_custom_call") >= 2
    assert exchanged(text) == []


def test_outlook_attention_runs_its_kernels_alone(grid):
    def attend(q, k, v):
        centres = [x[:, ::2, ::2, :, :9] for x in (q, k)]
        return outlook_attention(centres[0][..., :, None] * centres[1][..., None, :], v)

    text = compiled(grid, attend, (2, 8, 8, 4, 32))
    assert text.count("tpu_custom_call") >= 2
    assert exchanged(text) == []
