"""Official constructor arguments to ours."""

import pytest
from families.vit.config import pool_options, vit_options
from official_config import named_object


def test_arguments_without_a_counterpart_are_refused():
    for config, message in (
        ({"pool_include_prefx": True}, "unknown argument of timm's VisionTransformer.*nearest: pool_include_prefix"),
        ({"block_fn": "ResPost"}, "block_fn 'ResPost'; nearest: ResPostBlock"),
        ({"drop_rate": 0.1}, "drop_rate=0.1 has no counterpart"),
        ({"act_layer": "gelu_tahn"}, "activation 'gelu_tahn'; nearest: gelutanh"),
        ({"norm_layer": "RmsNorm"}, "norm_layer='RmsNorm' has no counterpart"),
        ({"cls": "VisionTransformerDistilled", "reg_tokens": 1}, "neither registers"),
    ):
        with pytest.raises(ValueError, match=message):
            vit_options(config)
    with pytest.raises(ValueError, match="latent_len=2"):
        pool_options({"in_features": 8, "latent_len": 2})
    with pytest.raises(ValueError, match="unknown argument of timm's AttentionPoolLatent 'num_head'"):
        pool_options({"in_features": 8, "num_head": 2})


def test_arguments_written_in_several_ways():
    partial_norm = {"_type": "functools.partial", "_args": [{"_type": "torch.nn.LayerNorm"}], "eps": 1e-5}
    assert named_object(partial_norm) == ("LayerNorm", {"eps": 1e-5})
    assert vit_options({"norm_layer": partial_norm})["norm_eps"] == 1e-5
    assert vit_options({"norm_layer": "torch.nn.LayerNorm"})["norm_eps"] == 1e-5
    assert vit_options({})["norm_eps"] == 1e-6
    tanh = {"_type": "partial", "_args": ["GELU"], "approximate": "tanh"}
    for value in (tanh, "gelu_tanh", "GELUTanh"):
        assert vit_options({"act_layer": value})["activation"] == "gelu_tanh"
    assert vit_options({"act_layer": "torch.nn.SiLU"})["activation"] == "silu"
    assert vit_options({"img_size": (37, 45), "patch_size": [8, 6]})["image_size"] == (32, 42)
    options = vit_options({"mlp_layer": "SwiGLUPacked", "embed_dim": 96, "mlp_ratio": 5.33334})
    assert (options["mlp_width"], options["pool_mlp_width"]) == (256, 512)
