"""The ledger's models in PyTorch, and three counters of theirs. Importing this needs torch.

FlopCounterMode sees the operators that a device is given: on the CPU fused kernels are among them,
on the meta device, where nothing runs, the products that they stand for. DeepSpeed and fvcore look
above a device's operators.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from research.bench import jax_models as sizes
from research.bench.ledger import Row, hushed


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in sizes.DENSE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(F.relu(x) if i else x)
        return x


class LSTM(nn.Module):
    """torch.nn.LSTM, from a first state that is trained."""

    def __init__(self) -> None:
        super().__init__()
        batch, _, inputs, width = sizes.LSTM_BTDH
        self.lstm = nn.LSTM(inputs, width, bias=False, batch_first=True)
        self.hidden = nn.Parameter(torch.zeros(batch, width))
        self.cell = nn.Parameter(torch.zeros(batch, width))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.lstm(x_BTD, (self.hidden[None], self.cell[None]))[0]


class LSTMWritten(LSTM):
    """The same step by step, with LSTM's parameters."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        hidden, cell, hiddens = self.hidden, self.cell, []
        for x_BD in x_BTD.unbind(1):
            gates = F.linear(x_BD, self.lstm.weight_ih_l0)
            gates = gates + F.linear(hidden, self.lstm.weight_hh_l0)
            i, f, g, o = gates.chunk(4, -1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
            hiddens.append(hidden)
        return torch.stack(hiddens, 1)


class CNN(nn.Module):
    def __init__(self, convs: sizes.Convs) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(
                c.inputs, c.outputs, c.kernel, c.stride, c.kernel // 2, groups=c.groups, bias=False
            )
            for c in convs.layers
        )
        last, classes = convs.layers[-1].outputs, convs.classes
        self.head = nn.Linear(last, classes, bias=False) if classes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(F.relu(x) if i else x)
        return x if self.head is None else self.head(x.mean((2, 3)))


class Layer(nn.Module):
    """Of GPT; attention written out, so that every counter can see its products."""

    def __init__(self, size: sizes.Gpt) -> None:
        super().__init__()
        d, t = size.width, size.time
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.register_buffer("causal", torch.ones(t, t, dtype=torch.bool).tril())

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        b, t, d = x_BTD.shape
        qkv = self.qkv(self.norm1(x_BTD)).view(b, t, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(d // self.heads)
        weights = F.softmax(scores.masked_fill(~self.causal, -math.inf), -1)
        x = x_BTD + self.out((weights @ v).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, size: sizes.Gpt, remat: bool = False) -> None:
        super().__init__()
        self.remat = remat
        self.tokens = nn.Embedding(size.vocab, size.width)
        self.positions = nn.Parameter(torch.zeros(size.time, size.width))
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens_BT) + self.positions
        for layer in self.layers:
            x = checkpoint.checkpoint(layer, x, use_reentrant=False) if self.remat else layer(x)
        return F.linear(self.norm(x), self.tokens.weight)


class GQA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, _, d, n, k = sizes.GQA_BTDNK
        self.width = d // n
        self.query, self.out = (nn.Linear(d, d, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(d, d // n * k, bias=False) for _ in range(2))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        projected = (layer(x_BTD) for layer in (self.query, self.key, self.value))
        q, k, v = (y.unflatten(-1, (-1, self.width)).transpose(1, 2) for y in projected)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": MLP,
    "lstm": LSTM,
    "lstm_written": LSTMWritten,
    "cnn": functools.partial(CNN, sizes.CNN),
    "depthwise": functools.partial(CNN, sizes.DEPTHWISE),
    "gpt": functools.partial(GPT, sizes.SMALL),
    "gpt_remat": functools.partial(GPT, sizes.SMALL, remat=True),
    "gpt2": functools.partial(GPT, sizes.GPT2),
    "gqa": GQA,
}


def build(row: Row, device: str) -> tuple[nn.Module, torch.Tensor]:
    """The model, and inputs that no gradient is asked of."""
    shape = row.args[1]
    dtype = torch.int64 if shape.dtype == "int32" else torch.float32
    with torch.device(device):
        return MODELS[row.model](), torch.zeros(shape.shape, dtype=dtype)


# ---- the counters: FLOPs, or None where a forward pass is all that a tool counts


def flop_counter_mode(row: Row, device: str) -> int:
    model, inputs = build(row, device)
    with FlopCounterMode(display=False) as counter:
        outputs = model(inputs)
        if row.backward:
            outputs.square().mean().backward()
    return int(counter.get_total_flops())


def deepspeed(row: Row) -> int | None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings(), hushed():
        warnings.simplefilter("ignore")
        from deepspeed.profiling.flops_profiler import FlopsProfiler

        if row.backward:
            return None
        model, inputs = build(row, "cpu")
        profiler = FlopsProfiler(model)
        profiler.start_profile()
        try:
            with torch.no_grad():
                model(inputs)
            return int(profiler.get_total_flops())
        finally:
            profiler.end_profile()  # else torch stays patched


def fvcore(row: Row) -> int | None:
    """Twice what it says: it counts a multiply-add as one."""
    from fvcore.nn import FlopCountAnalysis

    if row.backward:
        return None
    model, inputs = build(row, "cpu")
    analysis = FlopCountAnalysis(model, inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return 2 * int(analysis.total())


COUNTERS: dict[str, Callable[[Row], int | None]] = {
    "torch cpu": functools.partial(flop_counter_mode, device="cpu"),
    "torch meta": functools.partial(flop_counter_mode, device="meta"),
    "DeepSpeed": deepspeed,
    "fvcore": fvcore,
}
