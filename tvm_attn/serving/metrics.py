"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tvm_attn.runtime.scheduler import Scheduler

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """The figures of one server.

    Attributes:
        requests: HTTP requests by path and status.
        first_token: seconds from a sequence's start to its first token.
        between_tokens: seconds between two tokens of a streamed sequence, as they are sent.
        duration: seconds of a request, from its header to the end of the answer.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = registry = CollectorRegistry(auto_describe=True)
        self.requests = Counter("tvm_attn_requests", "HTTP requests", ["path", "status"], registry=registry)
        self.first_token = Histogram(
            "tvm_attn_time_to_first_token_seconds",
            "From a sequence's start to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "tvm_attn_time_between_tokens_seconds",
            "Between two tokens of a streamed sequence",
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "tvm_attn_request_seconds",
            "From a request's header to the end of its answer",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        registry.register(_SchedulerMetrics(scheduler))

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)


class _SchedulerMetrics(Collector):
    """The scheduler's own figures, read when they are asked for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        stats = self.scheduler.stats
        for name, text, value in (
            ("running", "Sequences that have a slot", stats.running),
            ("waiting", "Sequences that wait for a slot", stats.waiting),
            ("free_slots", "Slots that no sequence has", stats.free_slots),
            ("batch_size", "Sequences in the last step", stats.batch),
        ):
            yield GaugeMetricFamily(f"tvm_attn_{name}", text, value)
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens read", stats.prompt_tokens),
            ("reused_tokens", "Prompt tokens that a slot held already", stats.reused_tokens),
            ("generated_tokens", "Tokens generated", stats.generated_tokens),
            ("prefix_hits", "Sequences that found the beginning of their prompt in a slot", stats.prefix_hits),
        ):
            yield CounterMetricFamily(f"tvm_attn_{name}", text, value)
