"""From the answers of a model to estimates: every question is asked once, for all metrics that want it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.dataset import Dataset, Split
from ..metrics.features import FeatureExtractor
from ..metrics.metric import Metric, Subject
from ..metrics.reference import keep_features, kept_features
from ..registry import ConfigError
from ..training import processes
from ..types import Estimate, NotApplicable
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
                    found.refused[metric.registered_name] = str(reason)
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
    return keep_features(extract, dataset, split, torch.cat(parts)) if extract.costly else torch.cat(parts)


def _batch_size(interview: Interview) -> int:
    protocol = interview.protocol
    return max(asked.batch_size for asked in (protocol.sample, protocol.likelihood, protocol.predict))


def _begin(
    interview: Interview,
    metrics: Sequence[Metric],
    able: dict[int, list[str]],
    held: dict[tuple[str, Split], Tensor],
    device: torch.device,
) -> tuple[dict[int, list[str]], dict[str, str]]:
    """Start every metric that applies; the questions that may feed it, and why others do not apply."""
    waiting, refused = {}, {}
    subject = Subject(interview.model, interview.dataset, device, _batch_size(interview), held)
    name_of = {capability: question for question, capability in QUESTIONS.items()}
    for entry, metric in enumerate(metrics):
        try:
            if not able[entry]:
                raise NotApplicable(f"needs {' or '.join(name_of[c] for c in metric.requires)}")
            metric.start(subject)
        except NotApplicable as reason:
            refused[metric.registered_name] = str(reason)
        else:
            waiting[entry] = list(able[entry])
    return waiting, refused


def _ask(interview: Interview, question: str, metrics: dict[int, Metric], found: Findings) -> None:
    """Hand the answers to a question to all metrics, block by block; nothing on processes that see no answers."""
    blocks: list[Estimates] = []
    ids: list[Tensor] = []
    shown: list[Tensor] = []
    active = dict(metrics)
    for block in range(interview.protocol.sample.blocks if question == "sample" else 1):
        for metric in active.values() if block and processes.main() else ():
            metric.restart()
        for samples, batch in interview.ask(question, block):
            ids.append(samples.seeds)
            if samples.x is not None and sum(map(len, shown)) < SHOWN:
                shown.append(samples.x[:SHOWN])
            for entry, metric in list(active.items()) if len(samples.seeds) else ():
                try:
                    metric.update(samples, batch)
                except NotApplicable as reason:
                    found.refused[metric.registered_name] = str(reason)
                    active.pop(entry)
        if processes.main():
            failed = interview.failures[question] if question == "sample" else None
            blocks.append({(e, name): got for e, m in active.items() for name, got in _compute(m, failed).items()})
    if not processes.main():
        return
    interview.price(question)
    found.estimates |= {key: mean_over_blocks([block[key] for block in blocks]) for key in blocks[0]}
    found.questions |= dict.fromkeys(active, question)
    found.ids |= dict.fromkeys(active, torch.cat(ids))
    if shown:
        found.shown = torch.cat(shown)[:SHOWN]


def _compute(metric: Metric, failed: Failures | None) -> dict[str, Estimate]:
    """The metric's estimates; if drawn items were left out because they are not finite, none of them has a value."""
    if failed is None or not failed.items:
        return metric.compute()
    try:
        found = metric.compute()
    except ValueError:  # too few are left
        found = {metric.registered_name: Estimate(math.nan, None, failed.of, "1", "none", "plug-in")}
    return {
        name: dataclasses.replace(e, value=math.nan, stderr=None, items=None, flags=()) for name, e in found.items()
    }


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
