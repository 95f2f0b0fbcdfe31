"""Where the time of training goes: by part of a step, by operation, and as a trace to look at."""

import tempfile
from pathlib import Path

import torch

from ..config import Config
from ..files import write_text
from .measure import PARTS, TimedStep, timed_step

WARM_UP, TIMED, TRACED, LISTED = 3, 20, 3, 12
MEANING = {
    "data": "waiting for the next batch",
    "forward": "moving the batch, loss",
    "backward": "gradients",
    "update": "finite check, clipping, optimiser, averages",
}


def profile(config: Config, root: str | Path) -> str:
    """Times some steps on fresh weights, then traces a few more; the trace goes to `<root>/.profile/<name>/trace.json`.

    Parts are timed without the tracer, which slows what it watches.

    Returns:
        a table of the parts of a step, and one of the operations by their own time.
    Raises:
        ConfigError: if `train` would refuse the batch size.
    """
    folder = Path(root) / ".profile" / config.name  # hidden: `runs/*` are runs
    with torch.random.fork_rng():
        step = timed_step(config)
        step.run(0, WARM_UP)
        step.seconds = dict.fromkeys(PARTS, 0.0)
        total = step.run(WARM_UP, WARM_UP + TIMED)
        parts = dict(step.seconds)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if step.model.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as tracer:
            step.run(WARM_UP + TIMED, WARM_UP + TIMED + TRACED)
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / "trace.json"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        tracer.export_chrome_trace(str(Path(temporary) / trace.name))
        (Path(temporary) / trace.name).replace(trace)
    text = "\n".join([*_parts(step, parts, total), "", *_operations(step, tracer)])
    write_text(folder / "profile.txt", text + "\n")
    return f"{text}\n\ntrace  {trace}  (for chrome://tracing or ui.perfetto.dev); this text is beside it"


def _parts(step: TimedStep, parts: dict[str, float], total: float) -> list[str]:
    each = total / TIMED
    rest = {**parts, "rest": total - sum(parts.values())}
    head = f"{TIMED} steps on {step.model.device}: {1 / each:.1f} steps/s, {each * 1e3:.1f} ms a step of which"
    return [
        head,
        *(
            f"  {name:<9}{seconds / TIMED * 1e3:>9.2f} ms {seconds / total:>6.1%}  {MEANING.get(name, '')}".rstrip()
            for name, seconds in rest.items()
        ),
    ]


def _operations(step: TimedStep, tracer: torch.profiler.profile) -> list[str]:
    """The operations with the most time of their own, on the device that computes."""
    on_gpu = step.model.device.type == "cuda"

    def own(event: object) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events = [e for e in tracer.key_averages() if e.key not in PARTS and own(e) > 0]
    total = sum(map(own, events)) or 1.0
    rows = sorted(events, key=own, reverse=True)[:LISTED]
    width = max((len(e.key[:60]) for e in rows), default=9)
    where = "GPU" if on_gpu else "CPU"
    return [
        f"operations by their own time on the {where}, with the tracer on ({TRACED} steps)",
        *(
            f"  {e.key[:60]:<{width}} {own(e) / 1e3 / TRACED:>9.2f} ms {own(e) / total:>6.1%}"
            f"{e.count // TRACED:>7} calls"
            for e in rows
        ),
    ]
