"""What a server tells of its requests: metrics beside vLLM's own, an event for each reading where it traces, its state.

Nothing of a prompt or an answer is in any of them. Imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from mnemoscope.serving.admission import TOKENS, Offered

LABELS = ("outcome", "toward")
EVENT = "gen_ai.evaluation.result"  # of OpenTelemetry's conventions for generative models


@cache
def _metrics() -> tuple[Any, Any]:
    """A counter of requests and a histogram of P(memorized), registered once a process."""
    from prometheus_client import Counter, Histogram

    tenths = [n / 10 for n in range(1, 11)]
    return (
        Counter("mnemoscope:requests", "Requests that ask for steering or reading, by what became of them.", LABELS),
        Histogram("mnemoscope:p_memorized", "P(memorized) where a detector has read a prompt.", buckets=tenths),
    )


def count(report: Mapping[str, Any]) -> None:
    """Count an answer by its report: ``steered`` or ``held`` (by its gate) where it asked for that, and readings."""
    requests, histogram = _metrics()
    if report["steer"]:
        requests.labels("steered" if report["acted"] else "held", report["steer"]).inc()
    if TOKENS in report:
        requests.labels("tokens_read", "").inc()
    if (p := report.get("p_memorized")) is not None:
        requests.labels("read", "").inc()
        histogram.observe(p)


def count_refused() -> None:
    """Count a request that was refused."""
    _metrics()[0].labels("refused", "").inc()


def trace(report: Mapping[str, Any], context: Any = None) -> None:
    """Tell of a reading as an event of a span, where OpenTelemetry is there; ``context``: of the request's trace."""
    if (p := report.get("p_memorized")) is None:
        return
    from opentelemetry import trace as tracing

    facts = {"gen_ai.evaluation.name": "p_memorized", "gen_ai.evaluation.score.value": p}
    facts["gen_ai.evaluation.score.label"] = "unlike the fit" if report["unlike"] else "read"
    with tracing.get_tracer("mnemoscope").start_as_current_span("mnemoscope.read", context=context) as span:
        span.add_event(EVENT, facts)


def state_of(offered: Offered | None) -> dict[str, Any]:
    """What a server has, for whoever operates it: the run's name, what acts, on which model it was fitted, digests."""
    if offered is None:
        return {"levers": {}}
    binding = next((one.binding for one in offered.artefacts.values() if one.binding), None)
    return {
        "levers": {toward: list(named) for toward, named in offered.levers.items()},
        "detectors": list(offered.detectors),
        "reader": offered.reader is not None,
        "run": offered.source,
        "digest": offered.digest,
        "quantization": offered.quantization,
        "binding": asdict(binding) if binding else None,
    }
