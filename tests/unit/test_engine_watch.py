"""When an engine's trouble is worth a line."""

from router.engine_watch import EngineWatch
from router.messages import EngineStats, Heartbeat

STATS = EngineStats(
    num_running=2,
    num_waiting=1,
    num_waiting_tokens=0,
    num_free_blocks={},
    num_blocks={},
    num_steps=40,
    num_preemptions=0,
    num_prompt_tokens=0,
    num_generated_tokens=0,
    num_cached_tokens=0,
    num_degraded_tokens=0,
    lost_shards={},
    expert_load=[],
)


def complaints(watch: EngineWatch, *, silence_s: float = 0.0, step_s: float = 0.0) -> list[str]:
    return watch.complaints(silence_s=silence_s, heartbeat=Heartbeat(stats=STATS, step_s=step_s, step=41))


def test_a_step_is_named_when_it_is_slow_and_at_each_doubling() -> None:
    watch = EngineWatch(silent_after_s=3.0, slow_after_s=10.0)
    found = {seconds: complaints(watch, step_s=float(seconds)) for seconds in range(1, 45)}
    assert [seconds for seconds, lines in found.items() if lines] == [10, 20, 40]
    assert found[20] == ["step 41 has taken 20.0 s so far, with 2 running and 1 waiting sequences before it"]


def test_a_silence_is_named_also_before_the_first_heartbeat_and_anew_after_a_word() -> None:
    watch = EngineWatch(silent_after_s=3.0, slow_after_s=10.0)
    assert watch.complaints(silence_s=3.5, heartbeat=None) == ["the engine process has been silent for 3.5 s"]
    assert complaints(watch, silence_s=5.0) == []
    assert complaints(watch, silence_s=0.1) == []
    assert complaints(watch, silence_s=3.0) == ["the engine process has been silent for 3.0 s"]
