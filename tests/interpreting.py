"""TPU kernels on the CPU, by Pallas' interpreter of a TPU's memory."""

import contextlib

from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def interpreted():
    """Memory that nobody wrote is NaN, and reads and writes that race are found."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        yield
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found
