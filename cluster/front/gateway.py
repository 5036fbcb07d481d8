"""The gateway as a Serve ingress: gRPC methods by their bare names. It only translates; HTTP is http_api.py's.

Serve hands a gRPC call to the method named like the last component of its path, whatever the service.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import ray
from grpc_health.v1 import health_pb2
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from cluster.config import ServiceConfig, parse_config
from cluster.control.controller_link import ControllerLink
from cluster.control.member_report import MemberReport
from cluster.control.membership import Member, MemberId, MemberKind, MemberState
from cluster.front.access_log import AccessLog
from cluster.front.admission import ServiceLimits
from cluster.front.chat_encoder import chat_encoder
from cluster.front.errors import ServiceError, StatusCode
from cluster.front.generate_call import GRPC_GENERATE
from cluster.front.generator import Generator, SeedSource
from cluster.front.grpc_codec import (
    generate_call,
    generate_response,
    max_requests_of,
    prompt_of,
    requests_response,
    update_progress_response,
    update_response,
    view_response,
)
from cluster.front.open_requests import OpenRequests
from cluster.front.openai.api import OpenAiApi
from cluster.front.openai.planning import Planner
from cluster.front.openai.served_model import ServedModel
from cluster.front.rebalance_codec import progress_response, rebalance_response
from cluster.front.relay import RelayLimits
from cluster.front.serve_routers import ServeRouters
from cluster.front.served_weights import ServedWeights
from cluster.front.token_listener import TokenListener
from cluster.front.tokenizer import Tokenizer
from cluster.metrics import definitions as metrics
from cluster.metrics.exposition import expose
from cluster.metrics.merge import merge
from cluster.service_model import read_model_config, resolve
from cluster.v1 import admin_pb2, generation_pb2
from experts.hub import resolve_model
from experts.logs import configure_logging
from experts.process_memory import resident_bytes
from router.config import ModelConfig

logger = logging.getLogger("arriero.gateway")

# `arriero status` promises an answer within a second.
VIEW_TIMEOUT_S = 0.8
# Scrapers wait ten seconds, by default.
METRICS_TIMEOUT_S = 5.0
TICK_S = 1.0
CONTROLLER_SILENT = "the controller does not answer: try again"
REBALANCE_TIMEOUT_S = 60.0
# A model of the hub may have to be downloaded first.
UPDATE_TIMEOUT_S = 600.0
HEALTH_SERVICES = frozenset({"", "arriero.v1.GenerationService", "arriero.v1.AdminService"})


class Gateway:
    """config: a ServiceConfig as a plain dict. routers: the handle of the router deployment."""

    async def __init__(self, config: dict[str, Any], routers: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        self._config = parse_config(config)
        self._member_id = MemberId(f"gateway-{secrets.token_hex(3)}")
        configure_logging(self._config.log_settings, process=self._member_id)
        self._requests = OpenRequests(
            access_log=AccessLog(self._config.access_log), slow_after_s=self._config.slow_request_s
        )
        self._link = ControllerLink(self._config)
        welcome = await self._link.join_gateway(self._member(MemberState.STARTING))
        self._admin_token: str = welcome["admin_token"]
        self._weights = ServedWeights(welcome["weights"])
        self._tokens = TokenListener(host=_node_address(), secret=welcome["secret"])
        await self._tokens.start()
        await asyncio.to_thread(self._load, welcome["model"], routers)
        self._ticker = asyncio.create_task(self._tick_for_ever())
        self._link.start_reporting(self._report, self._weights.take)

    def _load(self, served_model: str, routers: DeploymentHandle[Any]) -> None:
        """What the model's folder is needed for; an update may have put another one in the place of the configured."""
        folder = Path(resolve_model(served_model))
        model = read_model_config(folder)
        config = resolve(self._config, model, os.cpu_count() or 1)
        tokenizer = Tokenizer(folder)
        seeds = SeedSource(config.seed, gateway_index=serve.get_replica_context().rank.rank)
        self._generator = Generator(
            tokenizer=tokenizer,
            encode_chat=chat_encoder(tokenizer, config.chat_template),
            limits=_service_limits(config, model),
            routers=ServeRouters(
                routers,
                num_ready=lambda: self._link.num_ready_routers,
                absence_timeout_s=config.resubmit_timeout_s,
                draining_nodes=lambda: self._link.draining_nodes,
                prefix_block_size=None if config.prefix_gap == 0 else config.block_size,
            ),
            tokens=self._tokens,
            relay_limits=_relay_limits(config),
            seeds=seeds,
            requests=self._requests,
            weights=self._weights,
        )
        self._model = ServedModel.of(config, folder)
        planner = Planner(
            generator=self._generator,
            tokenizer=tokenizer,
            seeds=seeds,
            model=self._model,
            max_choices=config.max_choices,
        )
        self.openai = OpenAiApi(planner, max_request_bytes=config.max_request_bytes)

    async def _tick_for_ever(self) -> None:
        period_s = min(TICK_S, self._config.slow_request_s / 4 or TICK_S)
        while True:
            await asyncio.sleep(period_s)
            self._requests.tick()

    def _report(self) -> tuple[Member, MemberReport]:
        versions = self._requests.weights_versions | {self._weights.current}
        report = replace(self._requests.report(), weights_versions=versions)
        report.metrics.put(metrics.LATE_OUTPUTS, self._tokens.num_late_outputs)
        report.metrics.put(metrics.REFUSED_TOKEN_CONNECTIONS, self._tokens.num_refused)
        report.metrics.put(metrics.RESIDENT_MEMORY, resident_bytes())
        return self._member(MemberState.READY), report

    def _member(self, state: MemberState) -> Member:
        return Member(
            member_id=self._member_id,
            kind=MemberKind.GATEWAY,
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
            state=state,
        )

    def __del__(self) -> None:
        # Serve's word for a replica that is stopped as it should be; absent attributes: its start had failed.
        ticker, link = getattr(self, "_ticker", None), getattr(self, "_link", None)
        if ticker is not None:
            ticker.cancel()
        if link is not None:
            link.leave(self._member(MemberState.DRAINING))

    async def Generate(
        self, request: generation_pb2.GenerateRequest, grpc_context: Any
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        with _errors_told(grpc_context):
            yield generation_pb2.GenerateResponse()  # for the proxy: see cluster.front.grpc_services
            try:
                call = _understood(generate_call, request)
            except ServiceError as error:
                self._generator.refuse(GRPC_GENERATE, error)
                raise
            async with aclosing(self._generator.generate(call)) as chunks:
                async for chunk in chunks:
                    yield generate_response(chunk)

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, grpc_context: Any
    ) -> generation_pb2.TokenizeResponse:
        with _errors_told(grpc_context):
            prompt = _understood(prompt_of, request)
            token_ids = await asyncio.to_thread(_understood, self._generator.encode, prompt)
            return generation_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, grpc_context: Any
    ) -> generation_pb2.DetokenizeResponse:
        with _errors_told(grpc_context):
            text = await asyncio.to_thread(self._decode, list(request.token_ids), request.keep_special_tokens)
            return generation_pb2.DetokenizeResponse(text=text)

    async def GetView(self, request: admin_pb2.GetViewRequest, grpc_context: Any) -> admin_pb2.GetViewResponse:
        with _errors_told(grpc_context):
            self._check_admin(grpc_context)
            with _controller_heard():
                return view_response(await self._link.get_view(VIEW_TIMEOUT_S))

    async def ListRequests(
        self, request: admin_pb2.ListRequestsRequest, grpc_context: Any
    ) -> admin_pb2.ListRequestsResponse:
        with _errors_told(grpc_context):
            self._check_admin(grpc_context)
            at_most = _understood(max_requests_of, request)
            with _controller_heard():
                return requests_response(await self._link.get_open_choices(VIEW_TIMEOUT_S, at_most=at_most))

    async def metrics(self) -> bytes:
        """Of the whole service, in Prometheus's text format. Raises ServiceError."""
        with _controller_heard():
            numbers = await self._link.get_numbers(METRICS_TIMEOUT_S)
        if numbers is None:
            raise ServiceError(StatusCode.UNAVAILABLE, "the controller has come back and gathers reports: try again")
        return expose(merge(numbers), model_name=self._model.name)

    async def ScaleShards(
        self, request: admin_pb2.ScaleShardsRequest, grpc_context: Any
    ) -> admin_pb2.ScaleShardsResponse:
        with _errors_told(grpc_context):
            self._check_admin(grpc_context)
            with _controller_heard():
                answer = await self._link.scale_shards(request.num_shards, VIEW_TIMEOUT_S)
            if "refusal" in answer:
                raise ServiceError(StatusCode.INVALID_ARGUMENT, answer["refusal"])
            return admin_pb2.ScaleShardsResponse(shard_ids=answer["shard_ids"])

    async def Rebalance(self, request: admin_pb2.RebalanceRequest, grpc_context: Any) -> admin_pb2.RebalanceResponse:
        with _errors_told(grpc_context):
            self._check_admin(grpc_context)
            with _controller_heard():
                answer = await self._link.rebalance(REBALANCE_TIMEOUT_S, dry_run=request.dry_run)
            if answer["refusal"] is not None and not request.dry_run:
                message = "{reason}: {sentence}".format(**answer["refusal"])
                raise ServiceError(StatusCode.FAILED_PRECONDITION, message)
            return rebalance_response(answer)

    async def GetRebalance(
        self, request: admin_pb2.GetRebalanceRequest, grpc_context: Any
    ) -> admin_pb2.GetRebalanceResponse:
        with _errors_told(grpc_context):
            self._check_admin(grpc_context)
            with _controller_heard():
                progress = await self._link.get_rebalance(VIEW_TIMEOUT_S, rebalance_id=request.rebalance_id)
            if progress is None:
                raise ServiceError(StatusCode.NOT_FOUND, f"rebalance_id: no {request.rebalance_id!r} is known")
            return progress_response(progress)

    async def UpdateWeights(
        self, request: admin_pb2.UpdateWeightsRequest, grpc_context: Any
    ) -> admin_pb2.UpdateWeightsResponse:
        with _errors_told(grpc_context):
            self._check_admin(grpc_context)
            with _controller_heard():
                answer = await self._link.update_weights(UPDATE_TIMEOUT_S, model=request.model, dry_run=request.dry_run)
            if answer.get("refusal") and (answer["is_input"] or not request.dry_run):
                code = StatusCode.INVALID_ARGUMENT if answer["is_input"] else StatusCode.FAILED_PRECONDITION
                raise ServiceError(code, answer["refusal"])
            return update_response(answer)

    async def GetUpdate(self, request: admin_pb2.GetUpdateRequest, grpc_context: Any) -> admin_pb2.GetUpdateResponse:
        with _errors_told(grpc_context):
            self._check_admin(grpc_context)
            with _controller_heard():
                progress = await self._link.get_update(VIEW_TIMEOUT_S, update_id=request.update_id)
            if progress is None:
                raise ServiceError(StatusCode.NOT_FOUND, f"update_id: no {request.update_id!r} is known")
            return update_progress_response(progress)

    async def Check(self, request: health_pb2.HealthCheckRequest, grpc_context: Any) -> health_pb2.HealthCheckResponse:
        with _errors_told(grpc_context):
            if request.service not in HEALTH_SERVICES:
                raise ServiceError(StatusCode.NOT_FOUND, f"service {request.service!r} is not known here")
            answers = health_pb2.HealthCheckResponse
            return answers(status=answers.SERVING if await self.is_serving() else answers.NOT_SERVING)

    async def is_serving(self) -> bool:
        """Whether a router is ready, by the last heartbeat's word or, where that was no, by a new one's."""
        if self._link.num_ready_routers == 0:
            with suppress(RayError, TimeoutError):
                await self._link.refresh(VIEW_TIMEOUT_S)
        return self._link.num_ready_routers > 0

    def _decode(self, token_ids: list[int], keep_special_tokens: bool) -> str:
        text: str = _understood(
            lambda ids: self._generator.decode(ids, keep_special_tokens=keep_special_tokens), token_ids
        )
        return text

    def _check_admin(self, grpc_context: Any) -> None:
        given = dict(grpc_context.invocation_metadata()).get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._admin_token}".encode()):
            raise ServiceError(StatusCode.UNAUTHENTICATED, "authorization must be 'Bearer ' and the admin token")


def _node_address() -> str:
    """Where the other processes of the cluster reach this node."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _service_limits(config: ServiceConfig, model: ModelConfig) -> ServiceLimits:
    assert config.max_model_len is not None
    return ServiceLimits(
        max_model_len=config.max_model_len,
        vocab_size=model.vocab_size,
        max_logprobs=config.max_logprobs,
        max_choices=config.max_choices,
        max_request_bytes=config.max_request_bytes,
    )


def _relay_limits(config: ServiceConfig) -> RelayLimits:
    return RelayLimits(stream_interval_s=config.stream_interval_ms / 1000, resubmit_timeout_s=config.resubmit_timeout_s)


def _understood(read: Any, request: Any) -> Any:
    """read(request); what it cannot make sense of is the client's mistake. Raises ServiceError."""
    try:
        return read(request)
    except ValueError as error:
        raise ServiceError(StatusCode.INVALID_ARGUMENT, str(error)) from None


@contextmanager
def _controller_heard() -> Iterator[None]:
    """Serving goes on without the controller, and what only it can tell comes later."""
    try:
        yield
    except (RayError, TimeoutError):
        raise ServiceError(StatusCode.UNAVAILABLE, CONTROLLER_SILENT) from None


@contextmanager
def _errors_told(grpc_context: Any) -> Iterator[None]:
    """The edge: whatever fails inside becomes a status code and a sentence, never a stack trace."""
    try:
        yield
    except ServiceError as error:
        _set_status(grpc_context, error)
        raise
    except Exception:
        logger.exception("a request failed")
        failure = ServiceError(StatusCode.INTERNAL, "internal error")
        _set_status(grpc_context, failure)
        raise failure from None


def _set_status(grpc_context: Any, error: ServiceError) -> None:
    grpc_context.set_code(grpc.StatusCode[error.code.value])
    grpc_context.set_details(error.message)
