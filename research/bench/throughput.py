"""Published throughput of training Transformers, and the MFU that the ledger's count gives it.

Who publishes MFU has counted FLOPs: from the tokens a second, and from what is counted here, it
follows by which convention. Published figures are known to the last digit that is printed.
"""

import dataclasses
import functools
import pathlib
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from research import compute
from research.compute import chips
from research.data.outline import outlined
from research.data.text import Text
from research.experiment import Experiment
from research.init_from import flat
from research.models.transformer import TransformerConfig
from research.optim import Optax, Optimizer
from research.setup import prepare
from research.tasks import NextToken

CONVENTIONS = {
    "full": "every product, masked attention as if nothing were masked",
    "causal": "the same, masked attention halved",
    "6N": "full, and 6 for each parameter in no product, of norms and of embeddings but positions'",
}
Span = tuple[float, float]
"""The least and the greatest that a figure may be."""


def span(printed: str) -> Span:
    """What a number that is rounded to its last digit may have been."""
    half = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    return float(printed) - half, float(printed) + half


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One that was published; fields as published.toml says."""

    model: str
    context: int
    chip: str
    devices: int
    source: str
    tokens: str | None = None
    seconds: str | None = None
    batch: int = 0
    rows: int = 0
    slices: int = 1
    replica: int = 1
    accumulate: int = 1
    mfu: str | None = None
    teraflops: str | None = None
    note: str = ""

    @property
    def rate(self) -> Span:
        """Tokens a second on one device."""
        if self.tokens is not None:
            return span(self.tokens)
        assert self.seconds is not None
        low, high = span(self.seconds)
        each = self.batch * self.context / self.devices
        return each / high, each / low

    @property
    def peak(self) -> float:
        """FLOP/s of bfloat16."""
        return chips.chips()[self.chip].peaks["bfloat16"]

    @property
    def published(self) -> Span | None:
        """MFU, as a fraction."""
        printed, unit = (self.mfu, 0.01) if self.mfu else (self.teraflops, 1e12 / self.peak)
        if printed is None:
            return None
        low, high = span(printed)
        return low * unit, high * unit


@dataclasses.dataclass(frozen=True)
class Row:
    run: Run
    flops: dict[str, float]
    """Model FLOPs a token, by convention."""

    @property
    def mfu(self) -> dict[str, Span | None]:
        """By convention, at the published rate; None: more than 1, which no program reaches."""
        low, high = (tokens / self.run.peak for tokens in self.run.rate)
        found = {name: (low * each, high * each) for name, each in self.flops.items()}
        return {name: None if each[0] > 1 else each for name, each in found.items()}

    @property
    def agreeing(self) -> list[str]:
        """The conventions by which the published MFU follows from the published rate."""
        if (published := self.run.published) is None:
            return []
        low, high = published
        known = ((name, each) for name, each in self.mfu.items() if each is not None)
        return [name for name, (least, most) in known if least <= high and low <= most]

    def to_json(self) -> dict[str, Any]:
        """Of figures that are rounded, the least and the greatest that they may be."""
        return {
            "published": dataclasses.asdict(self.run),
            "peak": self.run.peak,
            "tokens_per_second": self.run.rate,
            "published_mfu": self.run.published,
            "flops_per_token": self.flops,
            "mfu": self.mfu,
            "agreeing": self.agreeing,
        }


@functools.cache
def _read() -> dict[str, Any]:
    text = pathlib.Path(__file__).with_name("published.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def runs() -> list[Run]:
    return [Run(**fields) for fields in _read()["runs"]]


def model(name: str, context: int) -> TransformerConfig:
    llama = {"norm": "rms", "positions": "rotary", "mlp": "swiglu", "tied": False}
    fields = llama | _read()["models"][name]
    return TransformerConfig(context=context, bias=False, scan=True, **fields)


def experiment(model: TransformerConfig, rows: int = 1) -> Experiment:
    """A step of AdamW on so many rows."""
    return Experiment(
        model=model,
        task=NextToken(),
        data=Text(train="", tokens="bytes", length=model.context),
        optimizer=Optimizer(update=Optax("adamw", {"learning_rate": 1e-4})),
        batch_size=rows,
        steps=1,
    )


@functools.cache
def per_token(model: TransformerConfig) -> dict[str, float]:
    """Model FLOPs a token of a training step on one row, by convention; nothing is compiled."""
    setup = prepare(outlined(experiment(model)), jax.devices()[:1])
    found = compute.count(setup.step().trace(*setup.abstract_example()))
    assert found.exact
    assert found.causal_flops is not None
    whole = flat(setup.abstract.params)
    unused = [k for k in whole if "norm" in k or (k.startswith("embed") and not model.tied)]
    return {
        "full": found.model_flops / model.context,
        "causal": found.causal_flops / model.context,
        "6N": found.model_flops / model.context + 6 * sum(whole[k].size for k in unused),
    }


def measure() -> Iterator[Row]:
    for run in runs():
        yield Row(run, per_token(model(run.model, run.context)))


def table(rows: Sequence[Row]) -> str:
    """MFU in %, of the middles of what the figures may be; and sources, by their numbers."""
    names = "".join(f"{name:>8}" for name in CONVENTIONS)
    sources = list(dict.fromkeys(row.run.source for row in rows))
    lines = [
        f"{'':50}{'tokens/s':>10}{'MFU, as':>11}{'MFU by the count':>24}",
        f"{'model':18}{'chips':22}{'context':>10}{'a chip':>10}{'published':>11}{names}  which is",
    ]
    for row in rows:
        run, published = row.run, row.run.published
        given = "-" if published is None else run.mfu or f"{50 * sum(published):.2f}"
        which = "-" if published is None else " or ".join(row.agreeing) or "none of them"
        mfu = "".join(f"{50 * sum(each):8.2f}" if each else "   > 100" for each in row.mfu.values())
        on = f"{run.devices} {chips.chips()[run.chip].name}"
        lines.append(
            f"{run.model:18}{on:22}{run.context:>10,}{sum(run.rate) / 2:>10,.1f}{given:>11}"
            f"{mfu}  {which} [{sources.index(run.source) + 1}]"
        )
    lines += ["", "one token's model FLOPs are"]
    lines += [f"  {name:8}{what}" for name, what in CONVENTIONS.items()]
    lines.append("")
    for i, source in enumerate(sources, 1):
        lines.append(f"[{i}] {source}")
        notes = (row.run.note for row in rows if row.run.source == source and row.run.note)
        lines += [f"    {note}" for note in notes]
    return "\n".join(lines)
