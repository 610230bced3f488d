"""The contract of mechanisms is able to fail: one that does not keep what it declares is caught, whatever it is."""

import dataclasses
from functools import cache, partial

import jax.numpy as jnp
import pytest
import test_mechanisms as contract

from models.attention.registry import ATTENTION
from models.core.tap import TOKENS

CAUGHT = (Exception, pytest.fail.Exception)


def deaf(what):
    """Attends as if there were no such thing in the call."""

    def attend(self, x, call):
        return super(type(self), self).attend(x, call.replace(**{what: None}))

    return attend


def alone_first(self, x, call):
    """The first prefix token sees nothing but itself."""
    return jnp.concatenate([x[:, :1], super(type(self), self).attend(x, call)[:, 1:]], axis=1)


def by_layer(self, x, call):
    """Otherwise where the number of the layer is traced."""
    return super(type(self), self).attend(x, call) * (1.0 if isinstance(call.layer, int) else 1.5)


def seen_by_a_tap(self, x, call):
    """Otherwise where somebody looks."""
    return super(type(self), self).attend(x, call) * (1.0 if call.tap is None else 1.5)


def another_site(self, x, call):
    return call.emit("routes", super(type(self), self).attend(x, call), TOKENS)


def no_gradient(self, x, call):
    y = super(type(self), self).attend(x, call)
    return y - self.proj.bias[...] + jnp.zeros(())


def half_cost(self, grid):
    return super(type(self), self).cost(grid) // 2


def takes_all(self, grid):
    return None


HOST = partial(contract.test_it_fits_a_host_or_the_host_is_not_built, host="hierarchy")
WITH_CLASS = partial(contract.test_it_fits_a_host_or_the_host_is_not_built, host="isotropic with class token")
KEPT = ("q", "k", "v", "logits", "probs", "lse", "heads")
PLANTED = {  # a mechanism, what it declares against the truth, what it does against its word, tests that see it
    "a site that is not there": ("dense", {"sites": (*KEPT, "routes")}, {}, (contract.test_sites, HOST)),
    "a site that is not declared": ("dense", {"sites": KEPT[1:]}, {}, (contract.test_sites, HOST)),
    "a site of another": ("dense", {}, {"attend": another_site}, (contract.test_sites, HOST)),
    "prefix tokens": ("window", {"prefix": True}, {}, (WITH_CLASS,)),
    "prefix tokens that see nothing": (
        "dense",
        {},
        {"attend": alone_first},
        (contract.test_prefix_tokens_see_and_are_seen,),
    ),
    "three axes": ("window", {"axes": (2, 3)}, {}, (contract.test_axes_and_sizes,)),
    "any size": ("bottleneck", {"any_size": True}, {}, (contract.test_axes_and_sizes,)),
    "no size refused": ("bottleneck", {}, {"refuse_map": takes_all}, (contract.test_axes_and_sizes, HOST)),
    "a mask that is not heard": ("dense", {}, {"attend": deaf("mask")}, (contract.test_a_mask_leaves_what_is_allowed,)),
    "a mask that it has not": ("channel", {"masks": ("causal",)}, {}, (contract.test_a_mask_leaves_what_is_allowed,)),
    "a memory that is not heard": ("dense", {}, {"attend": deaf("memory")}, (contract.test_a_memory_is_attended_to,)),
    "a memory that it has not": ("window", {"memory": True}, {}, (contract.test_a_memory_is_attended_to,)),
    "another formula": ("dense", {"cost": "4 N C^2 + N^2 C"}, {}, (contract.test_the_formula_of_its_cost,)),
    "another cost": (
        "dense",
        {},
        {"cost": half_cost},
        (contract.test_its_cost_is_what_it_multiplies, contract.test_the_formula_of_its_cost),
    ),
    "another shape": ("halo", {"shape": "tokens"}, {}, (contract.test_what_it_gives,)),
    "no operator": ("dense", {"operator": "dens_attention"}, {}, (contract.test_what_the_declaration_says,)),
    "no paper": ("dense", {"paper": "Vaswani"}, {}, (contract.test_what_the_declaration_says,)),
    "scanned otherwise": ("dense", {}, {"attend": by_layer}, (contract.test_scanned_equals_unrolled,)),
    "looked at otherwise": ("dense", {}, {"attend": seen_by_a_tap}, (contract.test_scanned_equals_unrolled,)),
    "a parameter for nothing": ("dense", {}, {"attend": no_gradient}, (contract.test_scanned_equals_unrolled,)),
}


def lie(monkeypatch, name, declared, done):
    """From now on, the mechanism of that name is one that does not keep its word."""
    entry = ATTENTION[name]
    wrapped = isinstance(entry.build, partial)
    honest = entry.build.func if wrapped else entry.build
    declaration = dataclasses.replace(entry.declaration, **declared)
    liar = type(honest.__name__, (honest,), {"declaration": declaration, **done})
    build = partial(liar, **entry.build.keywords) if wrapped else liar
    monkeypatch.setitem(ATTENTION, name, dataclasses.replace(entry, build=build, declaration=declaration))
    monkeypatch.setattr(contract, "numbers", cache(contract.numbers.__wrapped__))


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    name, declared, done, seen_by = PLANTED[fault]
    lie(monkeypatch, name, declared, done)
    for test in seen_by:
        with pytest.raises(CAUGHT):
            test(name)


def test_probabilities_that_are_no_softmax_are_caught(monkeypatch):
    from attn.dense import xla

    honest = xla.softmax
    monkeypatch.setattr(xla, "softmax", lambda *arguments: honest(*arguments) * 0.9)
    monkeypatch.setattr(contract, "numbers", cache(contract.numbers.__wrapped__))
    with pytest.raises(AssertionError):
        contract.test_probabilities_are_those_of_the_logits("dense")


@pytest.mark.parametrize("name", ["dense", "window", "bottleneck"])
def test_one_that_keeps_its_word_is_not(name, monkeypatch):
    """Nothing of how faults are planted is itself what is caught."""
    lie(monkeypatch, name, {}, {})
    HOST(name)
    for test in (contract.test_sites, contract.test_what_the_declaration_says, contract.test_the_formula_of_its_cost):
        test(name)
