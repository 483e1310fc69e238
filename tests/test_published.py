"""Published layouts: PyTorch modules under the published names give what is loaded from them."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from made import images
from safetensors.numpy import save_file

from research import init_from, published
from research.init_from import InitFrom
from research.models.resnet import RESNET18, RESNET50, ResNetConfig
from research.models.transformer import TransformerConfig
from research.models.vit import VIT_B16, ViTConfig
from research.modules import merged, variables

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402


class TorchBlock(nn.Module):
    """`BasicBlock` and `Bottleneck` of torchvision/models/resnet.py."""

    def __init__(self, kind, inputs, width, stride):
        super().__init__()
        outputs = width * (1 if kind == "basic" else 4)
        sizes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        if kind == "bottleneck":
            sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.count = len(sizes)
        for i, (m, n, size, step) in enumerate(sizes, 1):
            setattr(self, f"conv{i}", nn.Conv2d(m, n, size, step, size // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(n))
        self.downsample = None
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.count else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class TorchResNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.conv1 = nn.Conv2d(config.channels, config.width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        inputs = config.width
        for stage, count in enumerate(config.layers):
            width, blocks = config.width << stage, []
            for n in range(count):
                blocks.append(TorchBlock(config.block, inputs, width, 2 if stage and not n else 1))
                inputs = width * (1 if config.block == "basic" else 4)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(config.layers)
        self.fc = nn.Linear(inputs, config.classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


class TorchEncoder(nn.Module):
    """`EncoderBlock` of torchvision/models/vision_transformer.py."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        inner = nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(*inner)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TorchViT(nn.Module):
    def __init__(self, config):
        super().__init__()
        patch, width = config.patch, config.width
        count = config.image[0] * config.image[1] // patch**2
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.conv_proj = nn.Conv2d(config.image[2], width, patch, patch)
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, count + 1, width))
        layers = {f"encoder_layer_{i}": TorchEncoder(config) for i in range(config.layers)}
        self.encoder.layers = nn.Sequential()
        for name, layer in layers.items():
            self.encoder.layers.add_module(name, layer)
        self.encoder.ln = nn.LayerNorm(width, eps=1e-6)
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(width, config.classes))

    def forward(self, x):
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.encoder.pos_embedding
        return self.heads(self.encoder.ln(self.encoder.layers(x))[:, 0])


class Conv1D(nn.Module):
    """Hugging Face's linear layer, whose weight is [in, out]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class TorchGPT2Block(nn.Module):
    """`GPT2Block` of transformers/models/gpt2/modeling_gpt2.py."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = Conv1D(width, 3 * width), Conv1D(width, width)
        self.mlp.c_fc, self.mlp.c_proj = Conv1D(width, 4 * width), Conv1D(4 * width, width)

    def forward(self, x):
        parts = self.attn.c_attn(self.ln_1(x)).split(x.shape[-1], dim=2)
        q, k, v = (p.unflatten(2, (self.heads, -1)).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn.c_proj(y.transpose(1, 2).flatten(2))
        y = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.mlp.c_proj(y)


class TorchGPT2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(TorchGPT2Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)

    def forward(self, x):
        x = self.wte(x) + self.wpe.weight[: x.shape[1]]
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


BASIC = ResNetConfig(classes=3, channels=2, layers=(1, 2), width=4)
BOTTLENECK = dataclasses.replace(BASIC, block="bottleneck", layers=(2,))
VIT = ViTConfig(image=(6, 9, 2), classes=3, patch=3, layers=2, heads=2, width=8)
GPT2 = TransformerConfig(vocab=11, context=6, layers=2, heads=4, width=16)
CASES = {
    "ResNet": (TorchResNet, BASIC, published.torchvision_resnet(BASIC)),
    "bottlenecks": (TorchResNet, BOTTLENECK, published.torchvision_resnet(BOTTLENECK)),
    "ViT": (TorchViT, VIT, published.TORCHVISION_VIT),
    "GPT-2": (TorchGPT2, GPT2, published.GPT2),
}


def outline(config):
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    return nnx.graphdef(model), *variables(model)


@pytest.mark.parametrize("kind", CASES)
def test_a_file_under_the_published_names_gives_the_published_function(kind, tmp_path):
    made, config, names = CASES[kind]
    theirs = made(config).eval()
    rng = np.random.default_rng(0)
    state = {
        name: np.asarray(np.exp(x) if name.endswith("var") else x, np.float32)
        for name, value in theirs.state_dict().items()
        for x in [0.5 * rng.normal(size=tuple(value.shape))]
    }
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    theirs.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
    save_file(state, tmp_path / "model.safetensors")

    graph, params, statistics = outline(config)
    found = init_from.load(
        InitFrom(path=str(tmp_path / "model.safetensors"), names=names), params, statistics
    )
    assert set(found.unused) == {name.replace(".", "/") for name in counters}
    params, statistics = (init_from.replaced(part, found.arrays) for part in (params, statistics))
    if kind == "GPT-2":
        x = rng.integers(11, size=(2, 6))
        expected = theirs(torch.tensor(x))
    else:
        x = images(2, *(17, 14, 2) if "image" not in vars(config) else config.image)
        expected = theirs(torch.tensor(x).permute(0, 3, 1, 2))
    with merged(graph, params, statistics, training=False) as model:
        y = jax.jit(lambda x: model(x))(x)
    expected = expected.detach().numpy()
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("made", "config", "names"),
    [
        (TorchResNet, RESNET18, published.torchvision_resnet(RESNET18)),
        (TorchResNet, RESNET50, published.torchvision_resnet(RESNET50)),
        (TorchViT, VIT_B16, published.TORCHVISION_VIT),
        (TorchGPT2, TransformerConfig(vocab=50257, context=1024, layers=12, heads=12, width=768),
         published.GPT2),
    ],
    ids=["ResNet-18", "ResNet-50", "ViT-B/16", "GPT-2"],
)  # fmt: skip
def test_every_array_of_the_published_sizes_finds_its_place(made, config, names):
    with torch.device("meta"):
        state = made(config).state_dict()
    shapes = {name.replace(".", "/"): tuple(x.shape) for name, x in state.items()}
    renamed = init_from._renamed(names, shapes)
    _, params, statistics = outline(config)
    wanted = init_from.flat(params) | init_from.flat(statistics)
    for name, leaf in wanted.items():
        old, axes = renamed[name]
        assert init_from._turned(shapes[old], axes, leaf.shape) == leaf.shape, name
    used = {renamed[name][0] for name in wanted}
    assert {name.split("/")[-1] for name in set(shapes) - used} <= {"num_batches_tracked"}
