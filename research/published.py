"""Names of published weights, for `init_from.names`: from a safetensors file to the models here.

A file of PyTorch's has its own arrays in its own layout; each list below was checked against a
re-expression of the published model (tests/test_published.py).
"""

from research.init_from import Name
from research.models.resnet import ResNetConfig


def torchvision_resnet(config: ResNetConfig) -> tuple[Name, ...]:
    """torchvision's `resnet18`, `resnet50` and their kin, to `research.models.resnet`."""
    places = [(s, i) for s, count in enumerate(config.layers, 1) for i in range(count)]
    blocks = [
        Name(match=f"^layer{stage}/{i}/", to=f"blocks/{n}/") for n, (stage, i) in enumerate(places)
    ]
    branch = [
        Name(match=rf"(blocks/\d+)/{theirs}{i + 1}/", to=rf"\1/{ours}/{i}/")
        for theirs, ours in (("conv", "convs"), ("bn", "norms"))
        for i in range(2 if config.block == "basic" else 3)
    ]
    shortcut = []
    if config.block == "bottleneck" or len(config.layers) > 1:
        shortcut = [
            Name(match="downsample/0/", to="shortcut/"),
            Name(match="downsample/1/", to="shortcut_norm/"),
        ]
    return (
        *blocks,
        *branch,
        *shortcut,
        Name(match="^conv1/", to="stem/"),
        Name(match="^bn1/", to="stem_norm/"),
        Name(match="^fc/weight", to="head/kernel", axes="o i -> i o"),
        Name(match="^fc/bias", to="head/bias"),
        Name(match="(norm|norms/.)/weight$", to=r"\1/scale"),
        Name(match="running_mean", to="mean"),
        Name(match="running_var", to="var"),
        Name(match="weight$", to="kernel", axes="o i h w -> h w i o"),
    )


TORCHVISION_VIT = (
    Name(match="^class_token", to="token", axes="1 1 d -> d"),
    Name(match="^encoder/pos_embedding", to="positions/embedding", axes="1 t d -> t d"),
    Name(match="^conv_proj/weight", to="patches/kernel", axes="o i h w -> h w i o"),
    Name(match="^conv_proj/", to="patches/"),
    Name(match=r"^encoder/layers/encoder_layer_(\d+)/", to=r"layers/\1/"),
    Name(match="^encoder/ln/", to="norm/"),
    Name(match="^heads/head/", to="head/"),
    Name(match="ln_1/", to="attention_norm/"),
    Name(match="ln_2/", to="mlp_norm/"),
    Name(
        match="self_attention/in_proj_weight",
        to="attention/qkv/kernel",
        axes="(c n h) d -> d n c h",
    ),
    Name(match="self_attention/in_proj_bias", to="attention/qkv/bias", axes="(c n h) -> n c h"),
    Name(match="self_attention/out_proj/", to="attention/out/"),
    Name(match="mlp/(linear_1|0)/", to="mlp/up/"),
    Name(match="mlp/(linear_2|3)/", to="mlp/down/"),
    Name(match="norm/weight$", to="norm/scale"),
    Name(match="weight$", to="kernel", axes="o i -> i o"),
)
"""torchvision's `vit_b_16` and its kin, to `research.models.vit`."""

GPT2 = (
    Name(match=r"^(transformer/)?h/(\d+)/", to=r"layers/\2/"),
    Name(match="^(transformer/)?wte/weight", to="embed/embedding"),
    Name(match="^(transformer/)?wpe/weight", to="positions/embedding"),
    Name(match="^(transformer/)?ln_f/", to="norm/"),
    Name(match="ln_1/", to="attention_norm/"),
    Name(match="ln_2/", to="mlp_norm/"),
    Name(match="attn/c_attn/weight", to="attention/qkv/kernel", axes="d (c n h) -> d n c h"),
    Name(match="attn/c_attn/bias", to="attention/qkv/bias", axes="(c n h) -> n c h"),
    Name(match="attn/c_proj/", to="attention/out/"),
    Name(match="mlp/c_fc/", to="mlp/up/"),
    Name(match="mlp/c_proj/", to="mlp/down/"),
    Name(match="norm/weight$", to="norm/scale"),
    Name(match="weight$", to="kernel"),
)
"""Hugging Face's `gpt2` and its kin, whose kernels are [in, out] as here, to
`research.models.transformer` at its defaults."""
