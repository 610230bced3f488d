"""How an operator is traced, differentiated, mapped and lowered: one primitive for all of them.

A step of an operator, `forward` or `backward`, is one equation of a program. What computes it is chosen when the
equation is lowered, by a rule for each platform, so a trace is short and the same for every platform, and a program can
be lowered for several (`jax.export`). Equations of one kind share one function of the lowered program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from attn.core import explain, shards, vmap
from attn.core.explain import PLATFORMS

NAMES = ("attention_heads", "attention_lse")
"""What results are called under `jax.checkpoint`: with a policy that keeps them, they are not computed again."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What of a call of an operator is no array: hashable, and part of every equation.

    Attributes:
      operator, settings, implementation: see `attn.core.operator.Operator.run`.
      policy: what becomes of a fallback.
      returned: how many of the results are handed out.
    """

    operator: Any
    settings: Any
    implementation: str | None
    policy: str
    returned: int


def keywords(settings: Any) -> dict[str, Any]:
    """The fields of settings as keyword arguments."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def named(results: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Results with their names for `jax.checkpoint`."""
    return tuple(checkpoint_name(result, name) for result, name in zip(results, NAMES, strict=False))


# --- differentiation --------------------------------------------------------------------------------------------------


def fused(call: Call, *inputs: Any) -> tuple[jax.Array, ...]:
    """The results by the implementation that is chosen where the program is lowered; differentiable in reverse mode,
    once, without keeping a map.

    Raises:
      ValueError: an implementation is asked for that refuses; forward mode, or a second derivative, is asked for.
    """
    return _fused(call, *guarded(shards.all_varying(inputs), once(call.operator.name)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(call: Call, *inputs: Any) -> tuple[jax.Array, ...]:
    return _forward(call, *inputs)[0]


def _forward(call: Call, *inputs: Any) -> tuple[tuple[jax.Array, ...], Any]:
    # Named here, what is handed to the backward pass is what a policy keeps; forward and backward on every platform
    # speak of the same arrays.
    results = named(_step(call, "forward", inputs, ()))
    return results[: call.returned], (inputs, results if call.operator.keeps_results else ())


def _backward(call: Call, kept: Any, cotangents: tuple[jax.Array, ...]) -> tuple[jax.Array | None, ...]:
    inputs, results = kept
    whole = len(call.operator.results(call.settings, *inputs))
    missing = [None] * (whole - len(cotangents))
    found = iter(_step(call, "backward", inputs, (*results, *cotangents, *missing)))
    return tuple(next(found) if number in gradients(call, inputs) else None for number in range(len(inputs)))


_fused.defvjp(_forward, _backward)


def gradients(call: Call, inputs: Sequence[Any]) -> list[int]:
    """Numbers of the inputs that `backward` gives a gradient of."""
    wanted = call.operator.gradients
    return [i for i, array in enumerate(inputs) if array is not None and (wanted is None or i in wanted)]


def once(name: str) -> str:
    """What is said where another derivative of an operator is asked for."""
    return (
        f"{name} is differentiable in reverse mode, once; implementation='reference' has forward mode and derivatives "
        "of every order"
    )


def guarded(inputs: Sequence[Any], message: str) -> tuple[Any, ...]:
    """The inputs as they are; forward-mode differentiation of them is a ValueError."""
    arrays = [array for array in inputs if array is not None]
    remaining = iter(_guard_p.bind(*arrays, message=message))
    return tuple(None if array is None else next(remaining) for array in inputs)


_guard_p = core.Primitive("forward_mode_guard")
_guard_p.multiple_results = True
_guard_p.def_impl(lambda *arrays, message: list(arrays))
_guard_p.def_abstract_eval(lambda *arrays, message: list(arrays))
mlir.register_lowering(_guard_p, lambda ctx, *arrays, message: list(arrays))


def _guard_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, message: str) -> tuple[Any, Any]:
    # The tangent goes through an equation that can be transposed, which is all that reverse mode does to it.
    after = [tangent if type(tangent) is ad.Zero else _tangent_p.bind(tangent, message=message) for tangent in tangents]
    return _guard_p.bind(*primals, message=message), after


ad.primitive_jvps[_guard_p] = _guard_jvp


def _guard_batch(arrays: Sequence[Any], axes: Sequence[Any], *, message: str) -> tuple[Any, Any]:
    return _guard_p.bind(*arrays, message=message), axes


batching.primitive_batchers[_guard_p] = _guard_batch


def _refuse(*_: Any, message: str, **__: Any) -> Any:
    raise ValueError(message)


_tangent_p = core.Primitive("forward_mode_tangent")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda tangent, *, message: tangent)
mlir.register_lowering(_tangent_p, _refuse)
batching.defvectorized(_tangent_p)
ad.deflinear(_tangent_p, lambda cotangent, *, message: [cotangent])


# --- one equation for a step ------------------------------------------------------------------------------------------


def _step(call: Call, step: str, inputs: Sequence[Any], others: Sequence[Any]) -> tuple[jax.Array, ...]:
    """`forward(*inputs)` or `backward(*inputs, *others)` on each device of a mesh for its share."""
    count = len(inputs)

    def on_one_device(*shares: Any) -> tuple[jax.Array, ...]:
        _noted(call, shares[:count])
        present = tuple(share is not None for share in shares)
        arrays = [share for share in shares if share is not None]
        return tuple(_step_p.bind(*arrays, call=call, step=step, count=count, present=present))

    arguments = (*inputs, *others)
    return shards.on_shards(on_one_device, arguments, *_layouts(call, step, count, arguments))


def _noted(call: Call, inputs: Sequence[Any]) -> None:
    """Notes the choice for `explain`. ValueError for an implementation that is asked for and refuses."""
    if explain.noting() or call.implementation is not None:
        call.operator.decide(inputs, call.settings, (), call.implementation)


def _layouts(
    call: Call, step: str, count: int, arguments: Sequence[Any]
) -> tuple[list[shards.Layout | None], list[shards.Layout | None]]:
    """Layouts of the arguments of a step and of what it gives."""
    inputs, results = call.operator.layouts(call.settings, *arguments[:count])
    if step == "forward":
        return list(inputs), list(results)
    kept = list(results) if call.operator.keeps_results else []
    possible = zip(arguments[count:], kept + list(results), strict=True)
    others = [None if array is None else own for array, own in possible]
    return [*inputs, *others], [inputs[number] for number in gradients(call, arguments[:count])]


def _spread(arrays: Sequence[Any], present: Sequence[bool]) -> tuple[Any, ...]:
    """The arrays with a None for each one that is not there."""
    remaining = iter(arrays)
    return tuple(next(remaining) if there else None for there in present)


_step_p = core.Primitive("attention_step")
_step_p.multiple_results = True


@_step_p.def_abstract_eval
def _(*arrays: Any, call: Call, step: str, count: int, present: tuple[bool, ...]) -> list[jax.core.ShapedArray]:
    inputs = _spread(arrays, present)[:count]
    if step == "forward":
        shapes = call.operator.results(call.settings, *inputs)
    else:
        shapes = [inputs[number] for number in gradients(call, inputs)]
    return [jax.core.ShapedArray(shape.shape, shape.dtype) for shape in shapes]


@functools.lru_cache(maxsize=1024)
def _compiled(**parameters: Any) -> Any:
    return jax.jit(functools.partial(_step_p.bind, **parameters))


@_step_p.def_impl
def _(*arrays: Any, **parameters: Any) -> list[jax.Array]:
    return _compiled(**parameters)(*arrays)


def _computed(call: Call, platform: str, step: str, count: int, present: tuple[bool, ...]) -> Any:
    """A function of the arrays of a step: the implementation that is chosen for the platform."""
    operator = call.operator

    def run(*arrays: Any) -> list[jax.Array]:
        arguments = _spread(arrays, present)
        inputs = arguments[:count]
        if call.implementation is None:
            choice = operator.choose(platform, inputs, call.settings)
            stop = operator.stops(inputs, call.settings, (), {platform: choice, "": choice}, call.policy)[platform]
            one = operator.named(choice.implementation)
        else:
            one = operator.named(call.implementation)
            choices = operator.decide(inputs, call.settings, (), call.implementation)
            stop = None if platform in choices else operator.stops(inputs, call.settings, (), choices, call.policy)[""]
        if stop:
            raise ValueError(stop)
        results = getattr(one.load(), step)(*arguments, **keywords(call.settings))
        return [result for result in results if result is not None]

    return run


def _rule(platform: str) -> Any:
    def lower(ctx: Any, *arrays: Any, call: Call, step: str, count: int, present: tuple[bool, ...]) -> Any:
        run = _computed(call, platform, step, count, present)
        run.__name__ = f"{call.operator.name}_{step}"
        # Traced without what a shard_map knows of arrays: implementations are for one device.
        into, out_of = (
            [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in avals] for avals in (ctx.avals_in, ctx.avals_out)
        )
        module = ctx.module_context
        one = _on_one_device(module.axis_context)
        ctx = ctx.replace(avals_in=into, avals_out=out_of, module_context=module.replace(axis_context=one))
        try:
            return mlir.lower_fun(run, multiple_results=True)(ctx, *arrays)
        except (AssertionError, NotImplementedError) as error:
            if getattr(one, "num_devices", 1) == 1:
                raise
            raise ValueError(
                f"{call.operator.name} is lowered for {one.num_devices} devices without their mesh, over which no "
                "kernel is cut: call it under jax.set_mesh(mesh), or with implementation='reference'"
            ) from error

    return lower


def _on_one_device(axes: Any) -> Any:
    """What JAX's lowering knows of devices. Where there is one it may not be said which; what is written to be cut by
    the compiler itself (`custom_partitioning`, as JAX's calls of cuDNN are) asks for it, and then is not cut."""
    if getattr(axes, "device_assignment", ()) is None and axes.num_devices == 1:
        return dataclasses.replace(axes, device_assignment=(None,))
    return axes


mlir.register_lowering(_step_p, _rule(""), inline=False)
for _platform in PLATFORMS:
    mlir.register_lowering(_step_p, _rule(_platform), platform=_platform, inline=False)


def _batched(
    arrays: Sequence[Any], axes: Sequence[Any], *, call: Call, step: str, count: int, present: tuple[bool, ...]
) -> tuple[Any, Any]:
    """The mapped axis as part of the batch, or of the heads."""
    parameters = {"call": call, "step": step, "count": count, "present": present}
    arguments, mapped = _spread(arrays, present), _spread(axes, present)
    arguments = tuple(
        jnp.moveaxis(array, axis, 0) if isinstance(axis, int) else array
        for array, axis in zip(arguments, mapped, strict=True)
    )
    is_mapped = [isinstance(axis, int) for axis in mapped]

    def run(*folded: Any) -> list[jax.Array]:
        _noted(call, folded[:count])
        return _step_p.bind(*[array for array in folded if array is not None], **parameters)

    def layouts(*examples: Any) -> tuple[list[shards.Layout | None], list[shards.Layout | None]]:
        return _layouts(call, step, count, examples)

    results = vmap.folded(run, arguments, is_mapped, layouts, keys=call.operator.keys)
    return results, [0] * len(results)


batching.primitive_batchers[_step_p] = _batched


def _no_derivative(primals: Any, tangents: Any, *, call: Call, **_: Any) -> Any:
    raise ValueError(once(call.operator.name))


ad.primitive_jvps[_step_p] = _no_derivative


def expanded(parameters: Any, *arrays: Any) -> list[jax.Array]:
    """What an equation computes, by the operator's definition: for whoever counts what a program does."""
    call = dataclasses.replace(parameters["call"], implementation=parameters["call"].operator.definition)
    present = parameters["present"]
    return _computed(call, "", parameters["step"], parameters["count"], present)(*arrays)


STEP = _step_p
"""The primitive."""


def stopping(x: jax.Array, stops: dict[str, str | None]) -> jax.Array:
    """x as it is; lowering it is a ValueError on platforms with a message. "" stands for those that are not named."""
    if not any(stops.values()):
        return x
    return _stopping(x, tuple(stops.items()))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _stopping(x: jax.Array, stops: tuple[tuple[str, str | None], ...]) -> jax.Array:
    return _stop_p.bind(x, stops=stops)


@_stopping.defjvp
def _stopping_jvp(stops: Any, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    return _stopping(primals[0], stops), tangents[0]


_stop_p = core.Primitive("stop_lowering")
_stop_p.def_impl(lambda x, *, stops: jax.jit(functools.partial(_stop_p.bind, stops=stops))(x))
_stop_p.def_abstract_eval(lambda x, *, stops: x)
batching.defvectorized(_stop_p)


def _stop_rule(platform: str) -> Any:
    def lower(ctx: Any, x: Any, *, stops: tuple[tuple[str, str | None], ...]) -> Any:
        by_platform = dict(stops)
        if message := by_platform.get(platform, by_platform.get("")):
            raise ValueError(message)
        return [x]

    return lower


mlir.register_lowering(_stop_p, _stop_rule(""))
for _platform in PLATFORMS:
    mlir.register_lowering(_stop_p, _stop_rule(_platform), platform=_platform)
