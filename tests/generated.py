"""Small generated sets with the names, features and splits of real ones, prepared as ArrayRecord without TensorFlow."""

import io

import numpy as np
from PIL import Image

# name: (version, image shape, encoding, classes, other text features, splits)
SETS = {
    "imagenet2012": ("5.1.0", (None, None, 3), "JPEG", 1000, ("file_name",), {"train": 24, "validation": 12}),
    "cifar10": ("3.0.2", (32, 32, 3), "PNG", 10, ("id",), {"train": 24, "test": 12}),
    "cifar100": ("3.0.2", (32, 32, 3), "PNG", 100, ("id",), {"train": 24, "test": 12}),
}


def image_bytes(shape, encoding, random):
    height, width = (side or int(random.integers(180, 320)) for side in shape[:2])
    coarse = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, encoding)
    return buffer.getvalue()


def prepare(name, directory):
    """Writes the set `name` below `directory`, as `tfds build` would."""
    import tensorflow_datasets as tfds

    version, shape, encoding, classes, texts, splits = SETS[name]
    random = np.random.default_rng(0)
    features = {
        "image": tfds.features.Image(shape=shape, encoding_format=encoding.lower()),
        "label": tfds.features.ClassLabel(num_classes=classes),
    }
    examples = {}
    for split, count in splits.items():
        examples[split] = [
            {
                "image": image_bytes(shape, encoding, random),
                "label": int(random.integers(classes)),
                **dict.fromkeys(texts, f"{split}_{i}"),
            }
            for i in range(count)
        ]
    write(directory, name, version, {**features, **{text: tfds.features.Text() for text in texts}}, examples)


def write(directory, name, version, features, examples, config=None):
    """Writes `{split: examples}` with these features; images are given as the bytes of files."""
    import tensorflow_datasets as tfds

    folder = directory / name / (config or "") / version
    folder.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name,
        config_name=config,
        version=tfds.core.Version(version),
        data_dir=str(folder),
        module_name=name,
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=100, file_format="array_record")
    writer.initialize_splits(list(examples))
    for split, some in examples.items():
        writer.add_examples({split: some})
    writer.close_all()
