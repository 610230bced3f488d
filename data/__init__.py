"""Data sets as records of typed fields, transforms, and streams that are pure functions of (seed, position)."""

from data.catalog import open_files, open_source, register_source, sources
from data.evaluation import EvalBatches, EvalPass, EvalPool, eval_batches, eval_pass
from data.kinds import FieldSpec
from data.pixels import Reading
from data.source import ArraySource, EncodedImage, ExampleError, Info, Record, Source
from data.stream import TrainStream, train_stream
from data.transforms import TRANSFORMS, Pipeline, parse_transforms

__all__ = [
    "TRANSFORMS",
    "ArraySource",
    "EncodedImage",
    "EvalBatches",
    "EvalPass",
    "EvalPool",
    "ExampleError",
    "FieldSpec",
    "Info",
    "Pipeline",
    "Reading",
    "Record",
    "Source",
    "TrainStream",
    "eval_batches",
    "eval_pass",
    "open_files",
    "open_source",
    "parse_transforms",
    "register_source",
    "sources",
    "train_stream",
]
