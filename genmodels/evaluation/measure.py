"""From the answers of a model to estimates: every question is asked once, for all metrics that want it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.dataset import Dataset, Split
from ..metrics.features import FeatureExtractor
from ..metrics.metric import Metric, Subject
from ..metrics.reference import keep_features, kept_features
from ..registry import ConfigError
from ..training import processes
from ..types import Batch, Estimate, NotApplicable, Samples
from .answers import QUESTIONS, Failures, Interview
from .results import combine

SHOWN = 64  # drawn items in a result's picture
Estimates = dict[tuple[int, str], Estimate]


@dataclass
class Findings:
    """What was measured, on process 0.

    Attributes:
        estimates: by the position of the metric in the protocol, and name.
        questions: that fed each metric, by position.
        ids: of the items behind per-item values, by position.
        refused: why metrics were left out, by name.
        shown: [n, *shape] the first drawn items, if any were drawn.
    """

    estimates: Estimates = field(default_factory=dict)
    questions: dict[int, str] = field(default_factory=dict)
    ids: dict[int, Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    shown: Tensor | None = None


def measure(interview: Interview, metrics: Sequence[Metric], device: torch.device) -> Findings:
    """Ask each question once, for all metrics that want it; a metric that takes any of several capabilities gets the
    first that the model can answer.

    Raises:
        ConfigError: if two metrics give estimates of one name.
    """
    able = {entry: _able(metric, interview) for entry, metric in enumerate(metrics)}
    wanted = [metrics[entry] for entry, questions in able.items() if questions]
    interview.extractors.update(_extractors(wanted, interview.dataset, device))
    held = _reference(wanted, interview)
    found, waiting = Findings(), {}
    waiting, found.refused = processes.by_main(lambda: _begin(interview, metrics, able, held, device))
    while waiting:
        question = next(iter(waiting.values()))[0]
        asked = {entry: metrics[entry] for entry, questions in waiting.items() if questions[0] == question}
        try:
            with processes.together():
                _ask(interview, question, asked, found)
        except NotApplicable as reason:
            interview.bills.pop(question, None)
            interview.failures.pop(question, None)
            for entry, metric in asked.items():
                waiting[entry].remove(question)
                if processes.main():
                    metric.restart()
                if not waiting[entry]:
                    found.refused[_title(metric, entry, dict(enumerate(metrics)))] = str(reason)
                    waiting.pop(entry)
            continue
        waiting = {entry: questions for entry, questions in waiting.items() if entry not in asked}
    names = [name for _, name in found.estimates]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"metrics: two of the protocol's metrics both report '{twice}'; keep one of them.")
    found.estimates = dict(sorted(found.estimates.items(), key=lambda pair: pair[0][0]))
    return found


def _able(metric: Metric, interview: Interview) -> list[str]:
    """The questions that may feed a metric, in its order of preference."""
    name_of = {capability: question for question, capability in QUESTIONS.items()}
    return [name_of[c] for c in metric.requires if isinstance(interview.model, c)]


def _extractors(metrics: Sequence[Metric], dataset: Dataset, device: torch.device) -> dict[str, FeatureExtractor]:
    """The extractors of metrics by identity; all are ready for the data, since metrics may call their own."""
    extractors = [metric.features for metric in metrics if metric.features is not None]
    for extractor in extractors:
        extractor.start(dataset, device)
    return {extractor.identity: extractor for extractor in extractors}


def _reference(metrics: Sequence[Metric], interview: Interview) -> dict[tuple[str, Split], Tensor]:
    """Features of the splits that metrics read, found by all processes together; nothing but on process 0."""
    wanted = {(m.features.identity, split) for m in metrics if m.features is not None for split in m.splits}
    return {
        (identity, split): features
        for identity, split in sorted(wanted)
        if (features := _features_of(interview, identity, split)) is not None
    }


def _features_of(interview: Interview, identity: str, split: Split) -> Tensor | None:
    """[N, D] features of a split; costly ones are read from disk if they are kept there, and kept otherwise."""
    dataset, extract = interview.dataset, interview.extractors[identity]
    size, batch_size = dataset.size(split), _batch_size(interview)
    kept: list[Tensor | None] = [None]

    def look() -> bool:
        kept[0] = kept_features(extract, dataset, split)
        return kept[0] is not None

    def work(rows: Tensor) -> Tensor:
        if interview.progress is not None and processes.main():
            interview.progress(f"features of {split}", min(int(rows[-1]) + 1, size), size)
        return extract(dataset.take(split, rows).x).cpu()

    if not size or (extract.costly and processes.by_main(look)):
        return kept[0]
    parts = list(processes.in_order(torch.arange(size).split(batch_size), work))
    if not parts:
        return None
    bad = ~torch.cat(parts).isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"features '{extract.registered_name}': {int(bad.sum())} of {size} items of the split '{split}' give NaN "
            f"or infinity (the first is item {int(bad.nonzero()[0])}). Mend the extractor, or choose another one."
        )
    return keep_features(extract, dataset, split, torch.cat(parts)) if extract.costly else torch.cat(parts)


def _batch_size(interview: Interview) -> int:
    protocol = interview.protocol
    return max(asked.batch_size for asked in (protocol.sample, protocol.likelihood, protocol.predict, protocol.edit))


def _begin(
    interview: Interview,
    metrics: Sequence[Metric],
    able: dict[int, list[str]],
    held: dict[tuple[str, Split], Tensor],
    device: torch.device,
) -> tuple[dict[int, list[str]], dict[str, str]]:
    """Start every metric that applies; the questions that may feed it, and why others do not apply."""
    waiting, refused = {}, {}
    drawn = interview.protocol.sample.num_items
    subject = Subject(interview.model, interview.dataset, device, _batch_size(interview), held, drawn)
    name_of = {capability: question for question, capability in QUESTIONS.items()}
    for entry, metric in enumerate(metrics):
        try:
            if not able[entry]:
                raise NotApplicable(f"needs {' or '.join(name_of[c] for c in metric.requires)}")
            if metric.features is not None and metric.splits and not interview.dataset.size(metric.splits[0]):
                raise NotApplicable(f"the split '{metric.splits[0]}' of the protocol's data is empty")
            metric.start(subject)
        except NotApplicable as reason:
            refused[_title(metric, entry, dict(enumerate(metrics)))] = str(reason)
        else:
            waiting[entry] = list(able[entry])
    return waiting, refused


def _ask(interview: Interview, question: str, metrics: dict[int, Metric], found: Findings) -> None:
    """Hand the answers to a question to all metrics, block by block; nothing on processes that see no answers."""
    blocks: dict[int, list[dict[str, Estimate]]] = {entry: [] for entry in metrics}
    ids: list[Tensor] = []
    shown: list[Tensor] = []
    refused: dict[int, str] = {}
    for block in range(interview.protocol.sample.blocks if question == "sample" else 1):
        for metric in metrics.values() if block and processes.main() else ():
            metric.restart()
        for samples, batch in interview.ask(question, block):
            ids.append(samples.seeds)
            if samples.x is not None and len(samples.x) and sum(map(len, shown)) < SHOWN:
                shown.append(samples.x[:SHOWN])
            _hand(metrics, samples, batch, refused)
        for entry, metric in metrics.items():
            for setting in metric.settings(interview.model):
                for samples, batch in interview.again(question, setting, block):
                    _hand({entry: metric}, samples, batch, refused)
        failed = interview.failures[question] if question == "sample" else None
        for entry, metric in metrics.items() if processes.main() else ():
            if entry not in refused:
                _try(refused, entry, lambda e=entry, m=metric, f=failed: blocks[e].append(_compute(m, f)))
    if not processes.main():
        return
    interview.price(question)
    for entry, metric in metrics.items():
        estimates = {} if entry in refused else _over_blocks(blocks[entry], failed is not None and failed.items > 0)
        if not estimates:
            reason = refused.get(entry, "the answers are not finite")
            found.refused[_title(metric, entry, metrics)] = reason
        found.estimates |= {(entry, name): estimate for name, estimate in estimates.items()}
    found.questions |= dict.fromkeys(metrics, question)
    found.ids |= dict.fromkeys(metrics, torch.cat(ids))
    if shown:
        found.shown = torch.cat(shown)[:SHOWN]


def _hand(metrics: dict[int, Metric], samples: Samples, batch: Batch | None, refused: dict[int, str]) -> None:
    """An answer, unless it is empty, to all metrics that have not declined."""
    for entry, metric in metrics.items() if len(samples.seeds) else ():
        if entry not in refused:
            _try(refused, entry, lambda m=metric: m.update(samples, batch))


def _try(refused: dict[int, str], entry: int, step: Callable[[], None]) -> None:
    """A step of one metric; if it declines, the others go on."""
    try:
        step()
    except NotApplicable as reason:
        refused[entry] = str(reason)


def _title(metric: Metric, entry: int, metrics: dict[int, Metric]) -> str:
    """The name of a metric, with its place in the protocol if another one has the name."""
    name = metric.registered_name
    twice = sum(other.registered_name == name for other in metrics.values()) > 1
    return f"{name} (metrics[{entry}])" if twice else name


def _compute(metric: Metric, failed: Failures | None) -> dict[str, Estimate]:
    """The metric's estimates; none if drawn items were left out and the rest is too little for it."""
    try:
        return metric.compute()
    except ValueError:
        if failed is None or not failed.items:
            raise
        return {}


def _over_blocks(blocks: Sequence[dict[str, Estimate]], failed: bool) -> dict[str, Estimate]:
    """Means over blocks by name; without a value if drawn items were left out of any of them."""
    names = dict.fromkeys(name for block in blocks for name in block)
    found = {name: [block[name] for block in blocks if name in block] for name in names}
    return {name: _failed(e[0]) if failed else mean_over_blocks(e) for name, e in found.items()}


def _failed(estimate: Estimate) -> Estimate:
    nothing = {"value": math.nan, "stderr": None, "items": None, "flags": (), "detail": ""}
    return dataclasses.replace(estimate, **nothing)


def mean_over_blocks(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates of one thing, which keeps the value of each.

    Its standard error is the larger of sd/√k and, if all have one, their root mean square over √k.
    """
    if len(estimates) == 1:
        return estimates[0]
    values = [e.value for e in estimates]
    value, stderr = combine(values, [e.stderr for e in estimates])
    flags = tuple(dict.fromkeys(flag for e in estimates for flag in e.flags))
    n = sum(e.n for e in estimates)
    changes = {"value": value, "stderr": stderr, "n": n, "items": None, "flags": flags, "blocks": tuple(values)}
    return dataclasses.replace(estimates[0], **changes)
