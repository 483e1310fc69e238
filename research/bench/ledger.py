"""What counters of FLOPs report for the same models, divided by the truth (jax_models).

A loss is the mean square of what a model gives.
"""

import contextlib
import dataclasses
import functools
import importlib
import logging
import platform
import re
import textwrap
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import roofline

from research import compute
from research.bench import jax_models
from research.compute import causes


@dataclasses.dataclass(frozen=True)
class Row:
    """A model forward, or its loss and the gradient, and the truth."""

    title: str
    model: str
    """Its name in torch_models."""
    forward: Callable[[Any, Any], jax.Array]
    args: tuple[Any, jax.ShapeDtypeStruct]
    truth: int
    backward: bool = False
    dense: int = 0
    """The truth with taps on padding, where there are any."""

    @property
    def name(self) -> str:
        return f"{self.title}, forward" + " + backward" * self.backward

    @property
    def fn(self) -> Callable[..., Any]:
        return jax.value_and_grad(self._loss) if self.backward else self.forward

    def _loss(self, params: Any, x: Any) -> jax.Array:
        return jnp.square(self.forward(params, x)).mean()


def rows() -> list[Row]:
    """Every line of the table."""
    m = jax_models
    mlp, lstm, gqa = (m.mlp, m.mlp_arrays()), (m.lstm, m.lstm_arrays()), (m.gqa, m.gqa_arrays())
    written = functools.partial(m.lstm, scanned=False), m.lstm_arrays()
    small, gpt2 = (
        (functools.partial(m.gpt, size=size, scanned=size is m.SMALL), m.gpt_arrays(size))
        for size in (m.SMALL, m.GPT2)
    )
    remat = functools.partial(small[0], remat=True), small[1]
    return [
        Row("MLP", "mlp", *mlp, m.mlp_flops(True), True),
        Row("LSTM of 100 steps", "lstm", *lstm, m.lstm_flops(False)),
        Row("LSTM of 100 steps", "lstm", *lstm, m.lstm_flops(True), True),
        # Not backward too: XLA takes a minute to compile that.
        Row("LSTM written out", "lstm_written", *written, m.lstm_flops(False)),
        *_convolutions("CNN", "cnn", m.CNN),
        *_convolutions("Depthwise", "depthwise", m.DEPTHWISE),
        Row("Transformer, scanned", "gpt", *small, m.gpt_flops(m.SMALL)),
        Row("Transformer, scanned", "gpt", *small, m.gpt_flops(m.SMALL, True), True),
        Row("Transformer, remat", "gpt_remat", *remat, m.gpt_flops(m.SMALL, True, True), True),
        Row("GPT-2 124M", "gpt2", *gpt2, m.gpt_flops(m.GPT2)),
        Row("Grouped-query attention", "gqa", *gqa, m.gqa_flops(False)),
        Row("Grouped-query attention", "gqa", *gqa, m.gqa_flops(True), True),
    ]


def _convolutions(title: str, model: str, convs: jax_models.Convs) -> Iterator[Row]:
    fn, args = functools.partial(jax_models.cnn, convs=convs), jax_models.cnn_arrays(convs)
    for backward in (False, True):
        truth, dense = (jax_models.cnn_flops(convs, backward, padding) for padding in (False, True))
        yield Row(title, model, fn, args, truth, backward, dense)


# ---- the columns


def ours(row: Row) -> int:
    return compute.count(row.fn, *row.args).matmul_flops


def xla(row: Row) -> int:
    """Of the program compiled for the CPU."""
    device = jax.local_devices(backend="cpu")[0]
    with jax.default_device(device):
        found = causes.xla_flops(jax.jit(row.fn).lower(*row.args).compile())
    assert found is not None, "XLA tells for a CPU"
    return int(found)


def _roofline(row: Row, field: str) -> int:
    with hushed():
        _, result = roofline.roofline(row.fn)(*row.args)
    return int(getattr(result, field))


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without the logs that jax and DeepSpeed write."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


Report = int | str
"""FLOPs, or in words why there are none."""
NO_BACKWARD, NOT_INSTALLED = "-", "not installed"


def _torch(row: Row, tool: str) -> Report:
    try:
        models = importlib.import_module("research.bench.torch_models")
        found = models.COUNTERS[tool](row)
    except ModuleNotFoundError as error:
        if error.name in ("torch", tool.split()[0].lower()):
            return NOT_INSTALLED
        raise
    return NO_BACKWARD if found is None else found


JAX_COLUMNS: dict[str, Callable[[Row], Report]] = {
    "ours": ours,
    "XLA": xla,
    "roofline flops": functools.partial(_roofline, field="flops"),
    "roofline unfused": functools.partial(_roofline, field="unfused_flops"),
}
COLUMNS = JAX_COLUMNS | {
    name: functools.partial(_torch, tool=name)
    for name in ("torch cpu", "torch meta", "DeepSpeed", "fvcore")
}


@dataclasses.dataclass
class Line:
    row: Row
    reports: dict[str, Report]

    def cell(self, column: str) -> str:
        """The report over the truth: 1 where they are equal, as words where there is none."""
        found = self.reports[column]
        if isinstance(found, str):
            return found.split(":")[0]
        return "1" if found == self.row.truth else f"{found / self.row.truth:.3f}"

    def to_json(self) -> dict[str, Any]:
        row = self.row
        return {"name": row.name, "truth": row.truth, "dense": row.dense, "reports": self.reports}


def versions() -> dict[str, str]:
    """Of Python and of every counter's package that is installed."""
    found = {"Python": platform.python_version()}
    for package in ("jax", "torch", "deepspeed", "fvcore"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def measure(columns: dict[str, Callable[[Row], Report]] = COLUMNS) -> Iterator[Line]:
    """Each row by each counter; one that fails says so in its cell, and the rest go on."""
    for row in rows():
        reports: dict[str, Report] = {}
        for name, counter in columns.items():
            try:
                reports[name] = counter(row)
            except Exception as error:
                reason = re.sub(r"\s+", " ", str(error))[:200]
                reports[name] = f"failed: {type(error).__name__}: {reason}"
        yield Line(row, reports)


def table(lines: list[Line]) -> str:
    """Ratios to the truth, and below them every reason of a failure."""
    columns = list(lines[0].reports)
    heads = [name.split() for name in ("truth GFLOP", *columns)]
    cells = [["", *(head[0] for head in heads)], ["", *(" ".join(head[1:]) for head in heads)]]
    for line in lines:
        gigas = f"{line.row.truth / 1e9:.4g}"
        cells.append([line.row.name, gigas, *(line.cell(name) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = []
    for first, *rest in cells:
        right = (f"{cell:>{width + 2}}" for cell, width in zip(rest, widths[1:], strict=True))
        text.append(f"{first:{widths[0]}}{''.join(right)}".rstrip())
    padded = "; ".join(
        f"{line.row.name} {line.row.dense / line.row.truth:.3f}" for line in lines if line.row.dense
    )
    failed = [
        f"{column}, {line.row.name}: {report}"
        for line in lines
        for column, report in line.reports.items()
        if isinstance(report, str) and report.startswith("failed")
    ]
    notes = [
        "1: equal to the last digit.  -: counts a forward pass alone.",
        "fvcore counts a multiply-add as 1: its figures are doubled here.",
        *textwrap.wrap(f"With taps on padding, over the truth: {padded}.", 100),
    ]
    return "\n".join([*text, "", *notes, *failed])
