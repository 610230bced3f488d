"""Tasks: what is asked of a model, how it is trained for it and how the answer is measured."""

from tasks import classification as _classification  # registers "classification"
from tasks.base import Chart, Task, create, find, names, register
from tasks.losses import Loss
from tasks.metrics import Metric

del _classification

__all__ = ["Chart", "Loss", "Metric", "Task", "create", "find", "names", "register"]
