"""Kernels written by hand (Pallas), each beside the plain-XLA code that it must agree with.

Rules for what comes here. A kernel has
* an oracle: a slow, plain function that defines the result, in `attn/` or in the test;
* a backward pass, compared with the gradient of the oracle;
* an error bound, stated relative to a float64 evaluation of the same rounded inputs;
* a choice by the platform that is lowered for (`jax.lax.platform_dependent`) or by an explicit argument, never by
  `jax.default_backend()`: a step compiled ahead of time for a machine that is not here must take that machine's path.
"""

import kernels.interpreter  # noqa: F401  (before anything is traced)
