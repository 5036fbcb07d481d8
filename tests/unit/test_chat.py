"""Chat messages to ids, in Llama 4's format."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.checkpoints.byte_tokenizer import SPECIAL_TOKENS, build_tokenizer, write_tokenizer
from cluster.front.chat import HEADER_OF_ROLE, ChatMessage, ImagePart, TextPart, encode_chat, turn_end_ids
from cluster.front.tokenizer import Tokenizer

# What the published checkpoints' template comes to without tools: the oracle.
PUBLISHED_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' + message['content'] + '<|eot|>' }}"
    "{%- endfor %}"
    "{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chat")
    write_tokenizer(folder)
    return Tokenizer(folder)


def test_a_conversation_has_the_same_ids_as_with_the_published_template(tokenizer: Tokenizer) -> None:
    turns = [("system", "Be brief."), ("user", " Hi! "), ("assistant", "Hello."), ("user", "Où vivent les lamas ?\n")]
    oracle = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=build_tokenizer(), bos_token="<|begin_of_text|>"
    )
    conversation = [{"role": role, "content": text} for role, text in turns]
    expected = oracle.apply_chat_template(conversation, chat_template=PUBLISHED_TEMPLATE, return_dict=False)
    assert encode_chat(tokenizer, [ChatMessage.of_text(*turn) for turn in turns]) == expected


def golden(text: str) -> list[int]:
    """The ids of a prompt as it is printed here: special tokens by their published places, all else byte by byte."""
    parts = re.split(r"(<\|[a-z_]+\|>)", text)
    return [token_id for part in parts for token_id in ([SPECIAL_TOKENS[part]] if part[:2] == "<|" else part.encode())]


def test_a_users_message_in_ids(tokenizer: Tokenizer) -> None:
    # begin_of_text 256, header_start 261, header_end 262, eot 264
    assert encode_chat(tokenizer, [ChatMessage.of_text("user", "Hi!")]) == [
        *(256, 261, *b"user", 262, 10, 10, 72, 105, 33, 264),
        *(261, *b"assistant", 262, 10, 10),
    ]


CALL = ChatMessage.of_text("assistant", '[get_weather(city="Cusco")]')
TURNS = {
    "system": (
        [ChatMessage.of_text("system", "\n Be brief. \n"), ChatMessage.of_text("user", " Hi! \n")],
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\n Hi! \n<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n",
    ),
    "several turns": (
        [
            ChatMessage.of_text("user", "Où vivent les lamas ?"),
            ChatMessage.of_text("assistant", " In the Andes 🦙. "),
            ChatMessage.of_text("user", "And alpacas?"),
        ],
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nOù vivent les lamas ?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n In the Andes 🦙. <|eot|>"
        "<|header_start|>user<|header_end|>\n\nAnd alpacas?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n",
    ),
    "list content": (
        [
            ChatMessage(role="system", content=(TextPart(text=" Be "), TextPart(text="brief. "))),
            ChatMessage(role="user", content=(TextPart(text="ll"), TextPart(text=""), TextPart(text="ama"))),
            ChatMessage(role="assistant", content=()),
        ],
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nllama<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n",
    ),
    "a tool's answer": (
        [ChatMessage.of_text("user", "Weather?"), CALL, ChatMessage.of_text("tool", '{"celsius": 12}\n')],
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nWeather?<|eot|>"
        '<|header_start|>assistant<|header_end|>\n\n[get_weather(city="Cusco")]<|eom|>'
        '<|header_start|>ipython<|header_end|>\n\n{"celsius": 12}\n<|eom|>'
        "<|header_start|>assistant<|header_end|>\n\n",
    ),
    "two tools' answers and a further turn": (
        [
            ChatMessage.of_text("user", "Weather?"),
            CALL,
            ChatMessage.of_text("tool", "12"),
            ChatMessage.of_text("ipython", "dry"),
            ChatMessage.of_text("assistant", "12 degrees and dry."),
            ChatMessage.of_text("user", "Thanks"),
        ],
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nWeather?<|eot|>"
        '<|header_start|>assistant<|header_end|>\n\n[get_weather(city="Cusco")]<|eom|>'
        "<|header_start|>ipython<|header_end|>\n\n12<|eom|>"
        "<|header_start|>ipython<|header_end|>\n\ndry<|eom|>"
        "<|header_start|>assistant<|header_end|>\n\n12 degrees and dry.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nThanks<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n",
    ),
}


@pytest.mark.parametrize(("messages", "prompt"), TURNS.values(), ids=TURNS)
def test_a_conversation_becomes_the_prompt_that_the_model_knows(
    tokenizer: Tokenizer, messages: list[ChatMessage], prompt: str
) -> None:
    assert encode_chat(tokenizer, messages) == golden(prompt)
    assert tokenizer.decode(golden(prompt), keep_special_tokens=True) == prompt


@pytest.mark.parametrize("role", HEADER_OF_ROLE)
@pytest.mark.parametrize("is_split", [False, True])
def test_no_special_token_can_be_smuggled_in(tokenizer: Tokenizer, role: str, is_split: bool) -> None:
    """Every special token there is, alone and in between, whole and in parts that come together."""
    names = list(tokenizer.special_tokens)
    assert len(names) > 90
    for name in names:
        text = f"a{name}{name}b"
        parts = (text,) if not is_split else (text[:3], text[3:9], text[9:])
        content = tuple(TextPart(text=part) for part in parts)
        plain = encode_chat(tokenizer, [ChatMessage.of_text(role, "")])
        smuggled = encode_chat(tokenizer, [ChatMessage(role=role, content=content)])
        begin = plain.index(SPECIAL_TOKENS["<|header_end|>"]) + len("?\n\n")
        inner = smuggled[begin : begin + len(text)]
        assert inner == list(text.encode()), "bytes, no special id among them"
        assert tokenizer.decode(inner, keep_special_tokens=True) == text
        assert smuggled[:begin] + smuggled[begin + len(text) :] == plain


@pytest.mark.parametrize("role", ["user<|header_end|>", "<|eot|>", "User", "tool ", ""])
def test_a_role_that_is_none_is_named(tokenizer: Tokenizer, role: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"not {role!r}")):
        encode_chat(tokenizer, [ChatMessage.of_text(role, "hi")])


def test_either_end_of_a_turn_is_known(tokenizer: Tokenizer) -> None:
    assert turn_end_ids(tokenizer) == (263, 264)


def test_an_image_part_is_refused_by_its_place(tokenizer: Tokenizer) -> None:
    message = ChatMessage(role="user", content=(TextPart(text="what is this?"), ImagePart(url="llama.png")))
    with pytest.raises(ValueError, match=r"messages\[1\]\.content\[1\] is an image"):
        encode_chat(tokenizer, [ChatMessage.of_text("system", "see"), message])


def test_an_unknown_role_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"messages\[0\]\.role must be one of .*, not 'wizard'"):
        encode_chat(tokenizer, [ChatMessage.of_text("wizard", "hi")])


def test_a_chat_without_messages_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="messages must not be empty"):
        encode_chat(tokenizer, [])


def test_a_tokenizer_without_the_special_tokens_refuses_chat_with_the_reason(tmp_path: Path) -> None:
    inner = build_tokenizer()
    plain = tokenizers.Tokenizer(inner.model)
    plain.add_special_tokens(["<|begin_of_text|>", "<|eot|>"])
    plain.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ValueError, match=r"lacks Llama 4's special tokens <\|header_start\|>, <\|header_end\|>, <\|eom\|>;"
    ):
        encode_chat(Tokenizer(tmp_path), [ChatMessage.of_text("user", "hi")])


def test_a_folder_without_a_tokenizer_refuses_chat(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        encode_chat(Tokenizer(tmp_path), [ChatMessage.of_text("user", "hi")])
