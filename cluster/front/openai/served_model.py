"""The one model of a service, as the API tells of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from cluster.config import ServiceConfig
from cluster.front.openai.payloads import ModelCard

OWNER = "arriero"
FINGERPRINT_LENGTH = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """created: seconds since 1970. fingerprint: equal where equal requests with equal seeds get equal answers, as far
    as the configuration decides that."""

    name: str
    created: int
    fingerprint: str
    max_model_len: int

    @classmethod
    def of(cls, config: ServiceConfig, folder: Path) -> ServedModel:
        """config: resolved. folder: the model's, with its config.json. The same in every gateway of a service."""
        assert config.max_model_len is not None
        name = config.served_model_name or _default_name(config.model)
        made_of = (version("arriero"), config.model, config.dtype, config.device, config.max_model_len)
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()
        return cls(
            name=name,
            created=int((folder / "config.json").stat().st_mtime),
            fingerprint=f"fp_{digest[:FINGERPRINT_LENGTH]}",
            max_model_len=config.max_model_len,
        )

    def fingerprint_of(self, weights_version: int) -> str:
        return f"{self.fingerprint}.{weights_version}"

    def card(self) -> ModelCard:
        return ModelCard(id=self.name, created=self.created, owned_by=OWNER, max_model_len=self.max_model_len)


def _default_name(model: str) -> str:
    """The id of a model on the hub as it is; of a folder, its name."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
