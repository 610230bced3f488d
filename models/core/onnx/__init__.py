"""A model's inference function as an ONNX graph, made from its jaxpr: the graph, the rules for primitives, the walk."""
