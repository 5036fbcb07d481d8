"""What a client may ask of the sampler, checked once where it enters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_SEED = 2**63 - 1
WHOLE_VOCABULARY = -1
# Beyond these, float32 has nothing sensible left: temperatures below the first are greedy, as in vLLM.
GREEDY_BELOW = 1e-5
MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one choice of a request. Names and meanings follow vLLM's.

    temperature: 0, or next to it, is greedy. top_k: 0 is off. num_logprobs and num_prompt_logprobs: None for none,
    0 for the token's own, n for the n most likely as well, -1 for the whole vocabulary. seed and choice_index,
    together with the output position, fix the sampling noise.

    Raises ValueError naming the field and its value.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    choice_index: int = 0
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int = 16
    ignore_eos: bool = False
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._require("temperature", 0.0 <= self.temperature <= MAX_TEMPERATURE, f"in [0, {MAX_TEMPERATURE}]")
        self._require("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]")
        self._require("top_k", self.top_k >= 0, "at least 0")
        self._require("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        self._require(
            "repetition_penalty",
            MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY,
            f"in [{MIN_REPETITION_PENALTY}, {MAX_REPETITION_PENALTY}]",
        )
        self._require("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]")
        self._require("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]")
        self._require("seed", 0 <= self.seed <= MAX_SEED, f"in [0, {MAX_SEED}]")
        self._require("choice_index", self.choice_index >= 0, "at least 0")
        self._require("max_tokens", self.max_tokens >= 1, "at least 1")
        self._require("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens")
        for name in ("num_logprobs", "num_prompt_logprobs"):
            value = getattr(self, name)
            self._require(name, value is None or value >= WHOLE_VOCABULARY, "at least -1")
        for token_id, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise ValueError(f"logit_bias[{token_id}] must be in [-100, 100], not {bias}")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW
