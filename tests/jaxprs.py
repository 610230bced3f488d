"""What is in a traced computation."""

import jax


def equations(jaxpr):
    """All equations of a jaxpr, those of its parts among them, loop bodies once."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(function, *arguments):
    """All equations of a function of these arguments."""
    return list(equations(jax.make_jaxpr(function)(*arguments).jaxpr))


def steps(function, *arguments):
    """The steps of operators, `"forward"` and `"backward"`, in the order of the program."""
    return [eqn.params["step"] for eqn in traced(function, *arguments) if eqn.primitive.name == "attention_step"]


def largest(function, *arguments):
    """Elements of the largest array that is made."""
    return max(v.aval.size for eqn in traced(function, *arguments) for v in eqn.outvars if hasattr(v.aval, "shape"))
