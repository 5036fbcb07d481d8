"""From what single processes count to the text that Prometheus reads."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics.definitions import (
    EXPERT_ROWS,
    GATEWAY_METRICS,
    GENERATION_TOKENS,
    INTER_TOKEN_LATENCY,
    METRICS,
    OPEN_CHOICES,
    REFUSED_LANES,
    REQUEST_PROMPT_TOKENS,
    REQUEST_SUCCESS,
    REQUESTS_RUNNING,
    Kind,
)
from cluster.metrics.exposition import expose
from cluster.metrics.merge import ServiceNumbers, merge, with_departed
from cluster.metrics.recorder import Recorder
from cluster.metrics.snapshot import Snapshot


def gateway(num_tokens: int = 0, *latencies_s: float) -> Snapshot:
    recorder = Recorder(GATEWAY_METRICS)
    recorder.add(GENERATION_TOKENS, num_tokens)
    for latency_s in latencies_s:
        recorder.observe(INTER_TOKEN_LATENCY, latency_s)
    return recorder.snapshot()


def router(num_running: int, num_rows: int) -> Snapshot:
    snapshot = Snapshot()
    snapshot.put(REQUESTS_RUNNING, num_running)
    snapshot.put(EXPERT_ROWS, num_rows)
    return snapshot


def parsed(numbers: ServiceNumbers) -> dict[str, float]:
    """By name{label=value,...} as the parser of Prometheus's own client reads it, model_name left out."""
    families = text_string_to_metric_families(expose(merge(numbers), model_name='a "model"\n').decode())
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        assert sample.labels.pop("model_name") == 'a "model"\n'
        labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
        found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_names_are_unique_and_carry_no_suffix_of_their_types() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.endswith(("_total", "_bucket", "_sum", "_count"))]


def test_counters_and_histograms_of_gateways_add_up_with_those_of_the_departed() -> None:
    departed = with_departed(Snapshot(), gateway(100, 0.004, 30.0))
    living = {"gateway-a": gateway(5, 0.02), "gateway-b": gateway(7, 0.02, 0.5)}
    found = parsed(ServiceNumbers(living=living, departed=departed))
    assert found["vllm:generation_tokens_total{}"] == 112
    assert found["vllm:inter_token_latency_seconds_count{}"] == 5
    assert found["vllm:inter_token_latency_seconds_sum{}"] == pytest.approx(30.544)
    buckets = [found[f"vllm:inter_token_latency_seconds_bucket{{le={le}}}"] for le in ("0.005", "0.025", "0.5", "+Inf")]
    assert buckets == [1, 3, 4, 5]


def test_a_value_on_a_bound_belongs_below_it() -> None:
    found = parsed(ServiceNumbers(living={"gateway-a": gateway(0, 0.025)}, departed=Snapshot()))
    assert found["vllm:inter_token_latency_seconds_bucket{le=0.01}"] == 0
    assert found["vllm:inter_token_latency_seconds_bucket{le=0.025}"] == 1


def test_what_members_are_asked_one_by_one_bears_their_name_and_ends_with_them() -> None:
    living = {"router-a": router(2, 10), "router-b": router(0, 20)}
    departed = with_departed(Snapshot(), router(9, 90))
    found = parsed(ServiceNumbers(living=living, departed=departed))
    assert {name: value for name, value in found.items() if "running" in name or "rows" in name} == {
        "vllm:num_requests_running{member=router-a}": 2,
        "vllm:num_requests_running{member=router-b}": 0,
        "arriero:expert_rows_total{member=router-a}": 10,
        "arriero:expert_rows_total{member=router-b}": 20,
    }


def test_labels_are_kept_apart_and_added_up() -> None:
    snapshots = []
    for reasons in ({"opening timed out": 1}, {"opening timed out": 2, "MessageError": 3}):
        snapshots.append(Snapshot())
        for reason, count in reasons.items():
            snapshots[-1].put(REFUSED_LANES, count, reason)
    found = parsed(ServiceNumbers(living={"shard-0": snapshots[0]}, departed=with_departed(Snapshot(), snapshots[1])))
    assert found == {
        "arriero:refused_lanes_total{reason=opening timed out}": 3,
        "arriero:refused_lanes_total{reason=MessageError}": 3,
    } | {f"vllm:request_success_total{{finished_reason={reason}}}": 0 for reason in ("stop", "length", "abort")}


def test_several_observations_at_once_are_as_many_single_ones() -> None:
    together, single = Recorder(GATEWAY_METRICS), Recorder(GATEWAY_METRICS)
    together.observe(REQUEST_PROMPT_TOKENS, 7.0, 3)
    for _ in range(3):
        single.observe(REQUEST_PROMPT_TOKENS, 7.0)
    assert together.snapshot() == single.snapshot()


def test_a_snapshot_stays_what_it_was() -> None:
    recorder = Recorder(GATEWAY_METRICS)
    before = recorder.snapshot()
    recorder.add(GENERATION_TOKENS, 3)
    recorder.observe(INTER_TOKEN_LATENCY, 1.0)
    assert before == Recorder(GATEWAY_METRICS).snapshot()


def test_a_snapshot_survives_the_controllers_memory() -> None:
    snapshot = gateway(3, 0.1, 5000.0)
    snapshot.put(OPEN_CHOICES, 2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot), type=Snapshot) == snapshot


histories = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["count", "go"]), st.integers(0, 9)), max_size=30
)


@given(histories)
def test_no_sum_ever_goes_back_whoever_comes_and_goes(history: list[tuple[str, str, int]]) -> None:
    living: dict[str, Recorder] = {}
    departed = Snapshot()
    total, seen = 0, 0.0
    for name, act, number in history:
        if act == "go" and name in living:
            departed = with_departed(departed, living.pop(name).snapshot())
        else:
            living.setdefault(name, Recorder(GATEWAY_METRICS)).add(REQUEST_SUCCESS, number, "stop")
            total += number
        numbers = ServiceNumbers(
            living={name: recorder.snapshot() for name, recorder in living.items()}, departed=departed
        )
        merged = merge(numbers).numbers[REQUEST_SUCCESS.name]
        assert merged[("stop",)] == total >= seen
        seen = merged[("stop",)]


def test_series_that_a_process_can_foresee_are_there_from_the_start() -> None:
    found = parsed(ServiceNumbers(living={"gateway-a": gateway()}, departed=Snapshot()))
    missing = {
        name for metric in GATEWAY_METRICS for name in metric.series_names if not any(s.startswith(name) for s in found)
    }
    assert missing == {"arriero:request_errors_total", "arriero:open_choices"}
    assert not any(found.values())
    assert all(metric.kind is Kind.HISTOGRAM for metric in METRICS if metric.buckets)
