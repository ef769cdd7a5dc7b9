"""What Prometheus reads at ``/metrics``: names as vLLM has them, with acceptance by level, depth, and certificates."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from adi.decoding.policies import Reflex
from adi.decoding.records import Step
from adi.model.backbone import Spec
from adi.serve.jobs import Answer, Job, JobPart

SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4)
STATES = ("unwatched", "holds", "refuted")


class Metrics:
    """Counts what the engine gives to requests."""

    def __init__(self, name: str, spec: Spec) -> None:
        self.registry = CollectorRegistry()
        self._name, self._layers = name, spec.layers
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated = self._counter("generation_tokens", "Tokens of answers.")
        self._reused = self._counter("prefix_cache_hits", "Tokens of prompts whose KV memory was there.")
        self._ended = self._counter("request_success", "Answers that came to their end.", "finished_reason")
        self._failed = self._counter("request_failure", "Requests that were refused or failed.", "status")
        self._drafts = self._counter("spec_decode_num_draft_tokens", "Drafts judged.", "level")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Drafts accepted.", "level")
        self._first = self._seconds("time_to_first_token_seconds", "From request to first token.")
        self._between = self._seconds("inter_token_latency_seconds", "Between passes that gave an answer tokens.")
        self._whole = self._seconds("e2e_request_latency_seconds", "From request to the end of an answer.")
        self._queued = self._seconds("request_queue_time_seconds", "From request to the first pass over its prompt.")
        steps = sorted({max(1, spec.layers * i // 10) for i in range(11)} | {spec.layers})
        depths = Histogram("adi:token_depth", "Blocks run for a token of an answer.", ["model_name"],
                           buckets=(0, *steps), registry=self.registry)  # fmt: skip
        self._depth = depths.labels(name)
        labels = ["model_name", "kind", "level", "state"]
        self._certificates = Gauge("adi:certificate", "What is known of a certified level.", labels, registry=self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        made = Counter(f"adi:{name}", about, ["model_name", *labels], registry=self.registry)
        return made if labels else made.labels(self._name)

    def _seconds(self, name: str, about: str) -> Histogram:
        return Histogram(f"adi:{name}", about, ["model_name"], buckets=SECONDS, registry=self.registry).labels(self._name)

    def gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        """A number that is read when somebody asks."""
        Gauge(f"adi:{name}", about, ["model_name"], registry=self.registry).labels(self._name).set_function(read)

    def certificate(self, kind: str, level: float, policy: Reflex | None) -> None:
        """What spot checks say of a certified level by now."""
        monitor = None if policy is None else policy.monitor
        state = STATES[0] if monitor is None else STATES[1 + monitor.alarmed]
        for one in STATES:
            self._certificates.labels(self._name, kind, f"{level:g}", one).set(one == state)

    def refused(self, status: int) -> None:
        """A request that was not answered."""
        self._failed.labels(self._name, str(status)).inc()

    def saw(self, job: Job, part: JobPart) -> None:
        """What a pass gave a job."""
        sequence = job.sequences[part.index] if job.sequences else None
        if not isinstance(sequence, Answer):
            return
        now, steps = perf_counter(), [event for event in part.events if isinstance(event, Step)]
        if steps:
            self._took(job, part.index, sequence, steps, now)
        if part.ended:
            self._whole.observe(now - job.submitted)
            self._ended.labels(self._name, sequence.finish).inc()

    def _took(self, job: Job, index: int, sequence: Answer, steps: list[Step], now: float) -> None:
        if job.delivered[index] == job.submitted:
            assert sequence.begun is not None
            self._prompt.inc(len(sequence.prompt_ids))
            self._reused.inc(sequence.counters.reused)
            self._first.observe(now - job.submitted)
            self._queued.observe(sequence.begun - job.submitted)
        else:
            self._between.observe(now - job.delivered[index])
        self._generated.inc(len(steps))
        for step in steps:
            self._depth.observe(step.depth)
            if step.drafted:
                self._drafts.labels(self._name, step.level).inc()
                self._accepted.labels(self._name, step.level).inc(step.accepted)
            for draft in step.rejected:
                self._drafts.labels(self._name, draft.level).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
