"""Bodies that hold mechanisms: stacks on one map, and hierarchies of maps."""
