import pytest

from cluster.front.chat import ChatMessage, ImagePart, TextPart
from cluster.front.generate_call import ChatPrompt, Chunk, GenerateCall, ResumedChoice, TextPrompt, TokenPrompt, Usage
from cluster.front.grpc_codec import generate_call, generate_response, view_response
from cluster.front.journal import Delta
from cluster.v1 import generation_pb2
from router.messages import FinishReason, MissingExpertPolicy, TokenLogprobs


def test_what_the_client_left_out_stays_out() -> None:
    request = generation_pb2.GenerateRequest(text="hi")
    assert generate_call(request) == GenerateCall(prompt=TextPrompt(text="hi"), num_bytes=request.ByteSize())


def test_every_field_arrives() -> None:
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=[3, 4]),
        sampling=generation_pb2.SamplingParams(
            temperature=0.0,
            logit_bias={5: -1.5},
            stop_token_ids=[6, 7],
            logprobs=0,
            ignore_eos=True,
            stop=["User:", "\n\n"],
            include_stop_str_in_output=True,
        ),
        n=2,
        request_id="r",
        seed=0,
        resume_token_ids=[generation_pb2.ResumedChoice(choice_index=1, token_ids=[8], finished=True)],
        on_missing_expert=generation_pb2.ON_MISSING_EXPERT_SHARED_ONLY,
        cache_salt="s",
    )
    assert generate_call(request) == GenerateCall(
        prompt=TokenPrompt(token_ids=[3, 4]),
        num_bytes=request.ByteSize(),
        n=2,
        sampling={
            "temperature": 0.0,
            "logit_bias": {5: -1.5},
            "stop_token_ids": (6, 7),
            "logprobs": 0,
            "ignore_eos": True,
        },
        request_id="r",
        seed=0,
        resumed={1: ResumedChoice(token_ids=[8], finished=True)},
        on_missing_expert=MissingExpertPolicy.SHARED_ONLY,
        cache_salt="s",
        stop=("User:", "\n\n"),
        include_stop_str_in_output=True,
    )


def test_zero_is_not_the_same_as_left_out() -> None:
    request = generation_pb2.GenerateRequest(text="hi", n=0, seed=0)
    assert (generate_call(request).n, generate_call(request).seed) == (0, 0)


def test_chat_parts_keep_their_kind_and_order() -> None:
    part = generation_pb2.ContentPart
    message = generation_pb2.ChatMessage(
        role="user", content=[part(text="a"), part(image=generation_pb2.Image(url="u")), part(text="b")]
    )
    request = generation_pb2.GenerateRequest(chat=generation_pb2.Chat(messages=[message]))
    content = (TextPart(text="a"), ImagePart(url="u"), TextPart(text="b"))
    assert generate_call(request).prompt == ChatPrompt(messages=(ChatMessage(role="user", content=content),))


def test_a_request_without_prompt_names_the_fields() -> None:
    with pytest.raises(ValueError, match="prompt must be set: one of text, token_ids, chat"):
        generate_call(generation_pb2.GenerateRequest())


@pytest.mark.parametrize("policy", list(MissingExpertPolicy))
def test_every_policy_has_its_name_on_the_wire(policy: MissingExpertPolicy) -> None:
    value = generation_pb2.OnMissingExpert.Value(f"ON_MISSING_EXPERT_{policy.name}")
    call = generate_call(generation_pb2.GenerateRequest(text="hi", on_missing_expert=value))
    assert call.on_missing_expert is policy


def test_an_unknown_policy_is_refused_by_number() -> None:
    request = generation_pb2.GenerateRequest(text="hi", on_missing_expert=77)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not 77"):
        generate_call(request)


def test_a_choice_resumed_twice_is_refused() -> None:
    twice = [generation_pb2.ResumedChoice(choice_index=0)] * 2
    with pytest.raises(ValueError, match="0 comes twice"):
        generate_call(generation_pb2.GenerateRequest(text="hi", resume_token_ids=twice))


def test_the_first_response_tells_id_and_seed_and_the_last_usage() -> None:
    delta = Delta(
        choice_index=1,
        token_ids=(5,),
        text="x",
        logprobs=(TokenLogprobs(token_id=5, logprob=-0.5, top=[(6, -0.25), (5, -0.5)]),),
        finish_reason=FinishReason.STOP,
        degraded=True,
    )
    usage = Usage(prompt_tokens=3, completion_tokens=1, cached_tokens=2)
    response = generate_response(Chunk(delta=delta, request_id="r", seed=0, usage=usage))
    [logprobs] = response.logprobs
    assert (response.request_id, response.HasField("seed"), response.seed) == ("r", True, 0)
    assert (response.choice_index, list(response.token_ids), response.text) == (1, [5], "x")
    assert (list(logprobs.top_token_ids), list(logprobs.top_logprobs)) == ([6, 5], [-0.25, -0.5])
    assert response.finish_reason == generation_pb2.FINISH_REASON_STOP
    assert response.degraded
    assert response.usage.cached_tokens == 2


def test_a_response_in_between_tells_neither() -> None:
    response = generate_response(Chunk(delta=Delta(choice_index=0, token_ids=(5,))))
    assert not response.request_id
    assert not response.HasField("seed")
    assert not response.HasField("usage")
    assert response.finish_reason == generation_pb2.FINISH_REASON_UNSPECIFIED


def test_the_view_keeps_members_slots_and_load() -> None:
    member = {"id": "m", "pid": 1, "node": "n", "state": "ready"}
    view = view_response(
        {
            "epoch": 4,
            "controller": member,
            "gateways": [member],
            "routers": [],
            "shards": [{**member, "slots": [[1, 0], [3, 2]]}],
            "shard_growth": {"state": "waits", "least": 1, "most": 2, "busy": None, "why": "because"},
            "load": [[1, 0, 9]],
            "weights_version": 3,
            "model": "/m",
            "update": None,
        }
    )
    assert (view.epoch, view.weights_version, view.model) == (4, 3, "/m")
    assert not view.HasField("update")
    assert view.shards[0].member.id == "m"
    assert [(slot.layer, slot.expert) for slot in view.shards[0].slots] == [(1, 0), (3, 2)]
    assert (view.shard_growth.most, view.shard_growth.HasField("busy")) == (2, False)
    assert (view.load[0].layer, view.load[0].expert, view.load[0].tokens) == (1, 0, 9)
