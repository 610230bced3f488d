"""What every model shares: stacks of blocks, state, registry, sharding, initialization."""
