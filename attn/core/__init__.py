"""What every operator shares: the choice of an implementation, meshes, `jax.vmap`."""
