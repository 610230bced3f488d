"""Image classification: softmax or sigmoid loss, label smoothing, mixup, CutMix, distillation from a frozen teacher,
and token labels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

import data
from configs import Field
from tasks import metrics
from tasks.base import Batch, Chart, Outputs, Partners, Picture, Task, register
from tasks.calibration import expected_calibration_error, reliability, temperature_scaling
from tasks.metrics import Metric
from tasks.mixing import mix
from tasks.token_labels import dense_predictions, shared_target, token_label_loss

# A dense confusion matrix of 2,000 classes is 16 MB on the device and about 10 MB of JSON; larger sets go without.
MOST_CONFUSION_CLASSES = 2000
MOST_LOGGED_PICTURES = 8

OPTIONS = {
    "loss": Field("softmax", "Softmax cross entropy, or one sigmoid per class.", choices=("softmax", "sigmoid")),
    "label_smoothing": Field(0.0, "Probability taken from the label and spread over all classes.", low=0, high=0.999),
    "mixup": Field(0.0, "Alpha of mixup's Beta distribution; 0 is off.", low=0),
    "cutmix": Field(0.0, "Alpha of CutMix's Beta distribution; 0 is off.", low=0),
    "mixup_probability": Field(1.0, "Probability that a batch is mixed at all.", low=0, high=1),
    "mixup_switch_probability": Field(0.5, "Probability of CutMix where both are on.", low=0, high=1),
    "teacher": Field(
        "",
        "Workdir, checkpoint or CONFIG.py:FILE of official weights of a frozen teacher (docs/tasks.md); its moving "
        "average where it has one.",
    ),
    "distill": Field(
        "none", "Learn from the teacher's probabilities or from its decisions.", choices=("none", "soft", "hard")
    ),
    "distill_weight": Field(0.5, "Share of the distillation loss.", low=0, high=1),
    "distill_temperature": Field(1.0, "Temperature of soft distillation.", low=1e-6),
    "token_labels": Field(
        0.0,
        "Weight of the loss of every token's own logits beside that of the image (docs/tasks.md); 0 is off.",
        low=0,
    ),
}


def classification_loss(logits: Float[Array, "B C"], target: Float[Array, "B C"], kind: str) -> Float[Array, " B"]:
    """Loss of each example, in nats, against class probabilities.

    `"softmax"` is the cross-entropy `-sum_c target_c log softmax(logits)_c`; `"sigmoid"` the binary cross-entropy of
    every class on its own, summed over the classes (big_vision's `sigmoid_xent`; timm divides it by the number of
    classes).
    """
    logits = logits.astype(jnp.float32)
    if kind == "softmax":
        return optax.softmax_cross_entropy(logits, target)
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, target), axis=1)


def distillation_loss(
    student: Float[Array, "B C"], teacher: Float[Array, "B C"], kind: str, temperature: float
) -> Float[Array, " B"]:
    """Distillation term of each example, in nats (DeiT, arXiv:2012.12877).

    `"soft"` (eq. 2): `T^2 KL(softmax(teacher / T) || softmax(student / T))`, which keeps its gradient as large
    whatever T is. `"hard"` (eq. 3): cross-entropy against the teacher's best class; the temperature plays no part.
    """
    student, teacher = student.astype(jnp.float32), jax.lax.stop_gradient(teacher.astype(jnp.float32))
    if kind == "hard":
        return optax.softmax_cross_entropy_with_integer_labels(student, jnp.argmax(teacher, axis=1))
    log_student, log_teacher = jax.nn.log_softmax(student / temperature), jax.nn.log_softmax(teacher / temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=1)


@register("classification")
class Classification(Task):
    """One label for each image.

    Batch: `image` `[B, S, S, 3]` float32, `label` `[B]` int32; `prepare` adds `target` `[B, C]`, the class
      probabilities after mixing.
    Outputs: `logits` `[B, C]`; in training with a teacher also `teacher_logits` `[B, C]`, and from a model with a
      distillation token `distillation_logits` `[B, C]`, the head that learns from the teacher; with token labels what
      `tasks/token_labels.py` says.
    """

    best_metric = ("top1", "max")
    columns = ("top1", "top5", "loss", "nll", "ece", "calibrated/nll", "calibrated/ece", "calibrated/temperature")

    known_options = OPTIONS

    def __init__(self, config: Any, info: Any):
        super().__init__(config, info)
        if not info.num_classes:
            raise ValueError(
                f"task 'classification' needs labels; {info.name!r} has the fields {', '.join(info.fields)} and no "
                f"classes"
            )
        options = self.options
        if options.token_labels:
            if options.distill != "none":
                raise ValueError(
                    f"config.task.options.token_labels={options.token_labels} with config.task.options.distill="
                    f"{options.distill!r}: a teacher labels the tokens or the image; token labels take distill=none"
                )
        elif (options.distill == "none") != (not options.teacher):
            raise ValueError(
                f"config.task.options.distill={options.distill!r} with config.task.options.teacher="
                f"{options.teacher!r}: distilling takes a teacher (a workdir or checkpoint) and distill=soft or hard; "
                f"training without one takes neither"
            )

    def batch_spec(
        self, batch_size: int, *, train: bool, info: data.Info | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """An image batch with `label` `[B]` int32."""
        spec = super().batch_spec(batch_size, train=train, info=info)
        return spec | {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def partners(self, load: Callable[..., nnx.Module], *, train: bool = True) -> dict[str, nnx.Module]:
        """The teacher, if the configuration names one; an evaluation has no use for it."""
        teacher = self.options.teacher
        return {"teacher": load(teacher)} if teacher and train else {}

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Mixes images and adds `target` `[B, C]`."""
        options = self.options
        image, target = mix(
            batch["image"],
            jax.nn.one_hot(batch["label"], self.info.num_classes),
            key,
            mixup=options.mixup,
            cutmix=options.cutmix,
            probability=options.mixup_probability,
            switch_probability=options.mixup_switch_probability,
        )
        return {**batch, "image": image, "target": target}

    def forward(
        self, model: nnx.Module, batch: Batch, *, train: bool, key: jax.Array | None, partners: Partners
    ) -> Outputs:
        """Logits of the model and, in training, of its distillation head and of the teacher."""
        if not train:
            return {"logits": model(batch["image"])}
        answer = model(batch["image"], train=True, key=key)
        outputs = dict(answer) if isinstance(answer, Mapping) else {"logits": answer}
        if "teacher" in partners:
            if self.options.token_labels:
                outputs["teacher_token_logits"] = dense_predictions(partners["teacher"], batch["image"])
            else:
                outputs["teacher_logits"] = partners["teacher"](batch["image"])
        return outputs

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """In training (the batch has a `target`) with label smoothing, distillation and token labels; in evaluation
        plainly against the label."""
        options = self.options
        if "target" in batch:
            own = optax.smooth_labels(batch["target"], options.label_smoothing)
        else:
            own = jax.nn.one_hot(batch["label"], self.info.num_classes)
        target = shared_target(own, outputs)
        label_loss = metrics.weighted_mean(classification_loss(outputs["logits"], target, options.loss), batch)
        if options.token_labels and "target" in batch:
            tokens = token_label_loss(outputs, own, functools.partial(classification_loss, kind=options.loss))
            token_loss = metrics.weighted_mean(tokens, batch)
            total = label_loss + options.token_labels * token_loss
            return total, {"label_loss": label_loss, "token_loss": token_loss}
        if "token_logits" in outputs:
            raise ValueError("config.task.options.token_labels is 0, and nothing else trains the logits of the tokens")
        if "teacher_logits" not in outputs:
            if "distillation_logits" in outputs:
                raise ValueError("config.task.options.teacher is empty, and nothing else trains the distillation token")
            return label_loss, {}
        student = outputs.get("distillation_logits", outputs["logits"])
        teacher, temperature = outputs["teacher_logits"], options.distill_temperature
        distillation = distillation_loss(student, teacher, options.distill, temperature)
        teacher_loss = metrics.weighted_mean(distillation, batch)
        total = (1 - options.distill_weight) * label_loss + options.distill_weight * teacher_loss
        return total, {"label_loss": label_loss, "distillation_loss": teacher_loss}

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
        """`classes` `[B, k]` and their `probabilities` `[B, k]`, best first, for k = 5 or all classes if there are
        fewer."""
        scores = jax.nn.softmax(outputs["logits"].astype(jnp.float32))
        probabilities, classes = jax.lax.top_k(scores, min(5, self.info.num_classes))
        return {"classes": classes, "probabilities": probabilities}

    def written(self, prediction: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """`class` and `probability` of the best class, then `top2, probability2` and so on to the fifth best."""
        names = self.info.class_names
        row: dict[str, Any] = {}
        for rank, (label, value) in enumerate(zip(prediction["classes"], prediction["probabilities"], strict=True), 1):
            which, share = ("class", "probability") if rank == 1 else (f"top{rank}", f"probability{rank}")
            row |= {which: names[label] if names else str(label), share: f"{value:.6f}"}
        return row

    def metrics(self) -> dict[str, Metric]:
        """Accuracy, loss, calibration, confusion and the worst mistakes; docs/evaluation.md defines each number."""
        classes = self.info.num_classes
        found = {
            "top1": metrics.top_k_accuracy(1),
            **super().metrics(),
            "nll": metrics.negative_log_likelihood(),
            "ece": expected_calibration_error(),
            "calibrated": temperature_scaling(),
            "reliability": reliability(),
            "per_class": metrics.per_class_accuracy(classes),
            "worst": metrics.worst_mistakes(self.config.eval.worst),
        }
        if classes > 5:
            found["top5"] = metrics.top_k_accuracy(5)
        if classes <= MOST_CONFUSION_CLASSES:
            found["confusion"] = metrics.confusion_matrix(classes)
        return found

    def train_metrics(self) -> dict[str, Metric]:
        """Top-1 accuracy against the class with the largest share of the (mixed) target."""

        def correct(outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> Float[Array, " B"]:
            target = shared_target(batch["target"], outputs)
            return (jnp.argmax(outputs["logits"], axis=1) == jnp.argmax(target, axis=1)).astype(jnp.float32)

        return {"top1": metrics.mean(correct)}

    def report(self, results: Mapping[str, Any], source: Any, samples: Mapping[str, np.ndarray]) -> list[Chart]:
        """Accuracy by class, confusion, reliability and the worst mistakes as images."""
        del samples
        # Matplotlib takes a second to import; a training run that draws nothing does not pay for it.
        from tasks.charts import classification_charts

        return classification_charts(results, source, self.info)

    def tables(self, results: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], list[tuple[Any, ...]]]]:
        """Accuracy and number of examples of each class, as the report has them."""
        if "per_class/accuracy" not in results:  # of a task that measures something else
            return {}
        names = self.info.class_names or [str(number) for number in range(self.info.num_classes)]
        rows = list(zip(names, results["per_class/accuracy"], results["per_class/count"], strict=True))
        return {"per_class": (("class", "top1", "examples"), rows)}

    def pictures(self, results: Mapping[str, Any], source: Any) -> list[tuple[str, Picture]]:
        """The most confident mistakes: true class, predicted one, confidence."""
        if "worst" not in results or "image" not in source.info.fields:
            return []
        names = self.info.class_names or [str(number) for number in range(self.info.num_classes)]
        return [
            (
                f"{names[one['label']]} → {names[one['predicted']]}  {one['confidence']:.3f}",
                Picture(np.asarray(source[one["index"]]["image"])),
            )
            for one in results["worst"][:MOST_LOGGED_PICTURES]
        ]
