"""What a client has received of a stream: enough to ask for the rest of it, from any gateway."""

from __future__ import annotations

from cluster.client_types import Piece
from cluster.v1 import generation_pb2


class Received:
    """Grows with each response of a stream and of those that resume it."""

    def __init__(self, request: generation_pb2.GenerateRequest) -> None:
        """request may itself resume a stream of an earlier process."""
        self._request = request
        self._num_choices = request.n if request.HasField("n") else 1
        self._token_ids = {choice.choice_index: list(choice.token_ids) for choice in request.resume_token_ids}
        self._finished = {choice.choice_index for choice in request.resume_token_ids if choice.finished}
        self._has_prompt_logprobs = False
        self.request_id = request.request_id
        self.seed = request.seed if request.HasField("seed") else None
        self.weights_version = request.weights_version if request.HasField("weights_version") else None
        self.has_begun = False

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        return len(self._finished) >= self._num_choices

    def accept(self, response: generation_pb2.GenerateResponse, piece: Piece) -> bool:
        """Notes a response and the piece it holds. True if it brought the stream forward."""
        if response.request_id:
            self.request_id = response.request_id
            self.seed = response.seed
            if response.HasField("weights_version"):
                self.weights_version = response.weights_version
            self.has_begun = True
        if piece.token_ids:
            self._token_ids.setdefault(piece.choice_index, []).extend(piece.token_ids)
        if piece.finish_reason is not None:
            self._finished.add(piece.choice_index)
        self._has_prompt_logprobs |= bool(piece.prompt_logprobs)
        return bool(piece.token_ids or piece.prompt_logprobs or piece.finish_reason or piece.usage)

    def remaining(self) -> generation_pb2.GenerateRequest:
        """The request for what has not been received; the first request as long as nothing has."""
        request = generation_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        if not self.has_begun:
            return request
        assert self.seed is not None
        request.request_id = self.request_id
        request.seed = self.seed
        if self.weights_version is not None:
            request.weights_version = self.weights_version
        del request.resume_token_ids[:]
        for choice_index in sorted(self._token_ids.keys() | self._finished):
            request.resume_token_ids.add(
                choice_index=choice_index,
                token_ids=self._token_ids.get(choice_index, []),
                finished=choice_index in self._finished,
            )
        if self._has_prompt_logprobs:
            request.sampling.ClearField("prompt_logprobs")
        return request
