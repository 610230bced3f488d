"""Writes preprocessing.npz: what timm, torchvision and Hugging Face's transformers make of images of odd shapes.

    pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0
    python tests/files/make_preprocessing.py

The images are the formula `picture`, so they are not stored. Of large results the hash is stored, of small ones the
pixels, and of some what the library makes of them in the end, normalized. `cases` says in JSON what each one is, `timm`
what timm says of its models of our families, `torchvision` what torchvision does with its files of weights. The stored
ones are of Pillow 13.0.0 and torch 2.13.0, which has no part in the pixels.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = [(333, 500), (501, 333), (97, 101), (225, 1000), (20, 31), (224, 224)]
SMALL = [(33, 50), (51, 34), (97, 101), (25, 190), (7, 5), (32, 32), (31, 64)]


def picture(height, width):
    """A picture uint8 [height, width, 3] with structure of every size."""
    y, x, c = np.ogrid[:height, :width, :3]
    waves = 60 * np.sin(x * (c + 1) / 17) + 50 * np.cos(y / (9 + 4 * c))
    noise = ((x * x * 7 + y * y * 13 + x * y * (3 + c) + 31 * c) % 97) * 0.9
    return np.clip(np.rint(85 + waves + noise), 0, 255).astype(np.uint8)


# What timm says of its models: the fields of pretrained_cfg.
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
TIMM = {
    "vit_base_patch16_224": {"crop_pct": 0.9, **HALF},
    "deit3_small_patch16_224": {"crop_pct": 0.9},
    "swin_tiny bilinear": {"crop_pct": 0.875, "interpolation": "bilinear"},
    "davit": {"crop_pct": 0.95},
    "volo": {"crop_pct": 0.96},
    "siglip": {"crop_pct": 0.9, "crop_mode": "squash", **HALF},
    "border": {"crop_pct": 1.0, "crop_mode": "border"},
    "384": {"input_size": (3, 384, 384), "crop_pct": 1.0, **HALF},
    "rectangle": {"input_size": (3, 160, 224), "crop_pct": 0.9, "interpolation": "lanczos"},
}
SMALL_TIMM = {
    "small": {"input_size": (3, 32, 32), "crop_pct": 0.9},
    "small squash": {"input_size": (3, 32, 32), "crop_pct": 0.9, "crop_mode": "squash"},
    "small border": {"input_size": (3, 33, 33), "crop_pct": 0.95, "crop_mode": "border"},
    "small rectangle": {"input_size": (3, 24, 40), "crop_pct": 0.9, "interpolation": "bilinear"},
    "small rectangle border": {"input_size": (3, 24, 40), "crop_pct": 1.0, "crop_mode": "border"},
    "larger crop": {"input_size": (3, 33, 33), "crop_pct": 1.15},
}
# What preprocessor_config.json holds.
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TRANSFORMERS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}, "resample": 2},
    "swin": {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 3, **IMAGENET},
    "deit": {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224, **IMAGENET},
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "do_convert_rgb": True,
        **IMAGENET,
    },
    "clip": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}, "resample": 3},
    "convnext": {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875, **IMAGENET},
    "convnext 384": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, **IMAGENET},
    "dinat": {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}, **IMAGENET},
}
SMALL_TRANSFORMERS = {
    "small": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 37},
        "crop_size": {"height": 32, "width": 32},
    },
    "small rectangle": {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 40}},
    "larger crop": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 33, "width": 33},
    },
}
TORCHVISION = ("ViT_B_16", "ViT_B_32", "ViT_L_16", "ViT_L_32", "ViT_H_14", "Swin_T", "Swin_S", "Swin_B", "MaxVit_T")
# Of those of equal numbers one is enough.
PIXELS_OF = (
    "ViT_B_16_Weights.IMAGENET1K_V1",
    "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1",
    "ViT_L_16_Weights.IMAGENET1K_V1",
    "Swin_T_Weights.IMAGENET1K_V1",
    "Swin_S_Weights.IMAGENET1K_V1",
    "Swin_B_Weights.IMAGENET1K_V1",
    "MaxVit_T_Weights.IMAGENET1K_V1",
)
MODELS = ("vit_*", "deit*", "swin_*", "maxvit_*_tf_*", "davit*", "volo*", "*halo*")
PRESET = ("crop_size", "resize_size", "interpolation", "mean", "std")


def timm_transforms(settings):
    """(pixels, normalized), each a function of a Pillow image."""
    from timm.data import create_transform, resolve_data_config

    found = resolve_data_config({}, pretrained_cfg=settings)
    pixels, whole = (create_transform(**found, is_training=False, normalize=normalize) for normalize in (False, True))
    return (lambda image: pixels(image).numpy().transpose(1, 2, 0)), lambda image: whole(image).numpy()


def transformers_transforms(settings):
    import transformers

    kind = settings.get("image_processor_type") or settings["feature_extractor_type"]
    kind = kind.replace("FeatureExtractor", "ImageProcessor")
    processor = getattr(transformers, f"{kind}Pil").from_dict(dict(settings))

    def pixels(image):
        made = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        return made[0].transpose(1, 2, 0)

    return pixels, lambda image: processor(image, return_tensors="np")["pixel_values"][0]


def torchvision_transforms(preset):
    def pixels(image):
        from torchvision.transforms import functional

        resized = functional.resize(image, preset.resize_size, interpolation=preset.interpolation)
        return np.asarray(functional.center_crop(resized, preset.crop_size))

    return pixels, lambda image: preset(image).numpy()


def main():
    import torchvision.models

    kinds = {
        "timm": (TIMM, SMALL_TIMM, timm_transforms),
        "transformers": (TRANSFORMERS, SMALL_TRANSFORMERS, transformers_transforms),
    }
    cases, arrays = [], {}
    for library, (large, small, transforms) in kinds.items():
        for name, settings in {**large, **small}.items():
            add(cases, arrays, library, name, settings, transforms(settings), name in small)
    files = {}
    for model in TORCHVISION:
        for weights in getattr(torchvision.models, f"{model}_Weights"):
            preset = weights.transforms()
            settings = {key: getattr(preset, key) for key in PRESET} | {"interpolation": preset.interpolation.value}
            files[weights.url.rpartition("/")[2]] = settings
            if str(weights) in PIXELS_OF:
                add(cases, arrays, "torchvision", str(weights), settings, torchvision_transforms(preset), False)
    arrays["torchvision"] = np.array(json.dumps(files))
    arrays["cases"] = np.array(json.dumps(cases))
    arrays["timm"] = np.array(json.dumps(pretrained_cfgs()))
    np.savez_compressed(Path(__file__).with_name("preprocessing.npz"), **arrays)


def pretrained_cfgs():
    """What timm says of the default weights of its models of our families, by the model's name."""
    import timm

    keys = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    found = {}
    for pattern in MODELS:
        for name in timm.list_models(pattern):
            said = timm.get_pretrained_cfg(name)
            found[name] = {key: getattr(said, key) for key in keys}
    return found


def add(cases, arrays, library, name, settings, transforms, small):
    pixels, normalized = transforms
    for shape in SMALL if small else SHAPES:
        image = Image.fromarray(picture(*shape))
        made = np.ascontiguousarray(pixels(image))
        assert made.dtype == np.uint8
        case = {"library": library, "name": name, "settings": settings, "shape": shape, "made": made.shape}
        case["sha256"] = hashlib.sha256(made.tobytes()).hexdigest()
        key = f"{library} {name} {shape[0]}x{shape[1]}"
        if small and shape in SMALL[:5:2]:
            arrays[key] = made
        if shape == (333, 500) or (small and shape == SMALL[0]):
            # Sixteen numbers from the middle of each channel.
            middle = made.shape[0] // 2
            case["normalized"] = normalized(image)[:, middle, :16].tolist()
        cases.append(case)


if __name__ == "__main__":
    main()
