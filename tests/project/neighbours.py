"""Nearest neighbours: every example of one set is kept, those of another are given the label of the nearest."""

import jax
import jax.numpy as jnp
from flax import nnx

from configs import Field
from tasks import Task, metrics


class Neighbours(Task):
    """Accuracy of the k nearest training images, by their pixels; there is nothing to train."""

    trains = False
    best_metric = ("accuracy", "max")
    known_options = {"k": Field(5, "Neighbours that vote.", low=1)}  # noqa: RUF012

    def build_model(self, rngs):
        return nnx.Module()

    def batch_spec(self, batch_size, *, train, info=None):
        spec = super().batch_spec(batch_size, train=train, info=info)
        return {**spec, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def forward(self, model, batch, *, train, key, partners):
        flat = batch["image"].reshape(len(batch["image"]), -1)
        return {"features": flat / jnp.linalg.norm(flat, axis=1, keepdims=True).clip(1e-6)}

    def fit_metrics(self):
        height, width, channels = self.batch_spec(1, train=False)["image"].shape[1:]

        def of_set(info):
            features = jnp.zeros((info.num_examples, height * width * channels))
            return {"features": features, "labels": jnp.full(info.num_examples, -1, jnp.int32)}

        def update(state, outputs, batch):
            kept = metrics.example_weights(batch) > 0
            place = jnp.where(kept, batch["index"], len(state["labels"]))  # padding falls off the end
            return {
                "features": state["features"].at[place].set(outputs["features"], mode="drop"),
                "labels": state["labels"].at[place].set(batch["label"], mode="drop"),
            }

        return {"bank": metrics.Metric(dict, update, metrics.add_states, dict, of_set)}

    def compare(self, outputs, batch, fitted):
        bank = fitted["bank"]
        _, nearest = jax.lax.top_k(outputs["features"] @ bank["features"].T, self.options.k)
        votes = jax.nn.one_hot(bank["labels"][nearest], self.info.num_classes).sum(1)
        return {**outputs, "label": jnp.argmax(votes, axis=1)}

    def metrics(self):
        right = metrics.mean(lambda outputs, batch: (outputs["label"] == batch["label"]).astype(jnp.float32))
        return {"accuracy": right}
