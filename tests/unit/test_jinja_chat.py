"""Chats by an operator's template: as transformers renders it, except that users cannot write special tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cluster.checkpoints.byte_tokenizer import BOS_TOKEN_ID, SPECIAL_TOKENS, build_tokenizer, write_tokenizer
from cluster.front.byte_alphabet import NUM_BYTES
from cluster.front.chat import HEADER_OF_ROLE, ChatMessage, ImagePart, TextPart, encode_chat
from cluster.front.chat_encoder import chat_encoder
from cluster.front.jinja_chat import JinjaChat
from cluster.front.tokenizer import Tokenizer

PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' + message['content'] + '<|eot|>' }}
{%- endfor %}
{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}"""

RICH = """\
{%- macro header(role) -%}
<|header_start|>{{ role }}<|header_end|>{{ "\\n\\n" }}
{%- endmacro -%}
{%- set ends = namespace(one='<|eom|>', other='<|eot|>') -%}
{{ bos_token }}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- continue -%}
    {%- endif -%}
    {{- header('ipython' if message.role in ['tool', 'ipython'] else message.role) -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
        {{- message.content.split('</think>')[-1] | trim -}}
        {%- endgeneration -%}
    {%- elif message.content is string and '<|image|>' in message.content -%}
        {{- message.content | replace('<|image|>', '[image]') -}}
    {%- elif message.role == 'tool' -%}
        {{- {"answer": message.content} | tojson -}}
    {%- else -%}
        {{- message.content -}}
    {%- endif -%}
    {{- ends.one if message.role == 'tool' else ends.other -}}
{%- endfor -%}
{{- header('assistant') -}}
"""

# What a template might do to what users write, so that it becomes the spelling of a special token.
CARELESS = """\
{{- bos_token }}<|header_start|>{% for message in messages %}{{ message.content }}{% endfor %}
{{- '<' ~ messages[0].content ~ '>' }}<{{ messages[0].content }}>{{ '<|' + messages[0].content + '|>' }}
{{- messages[0].content | replace(' ', '') }}{{ messages[0].content | lower }}{{ messages[0].content | reverse }}
{{- messages[0].content.split() | join }}{{ messages[0].content | trim }}
{{- messages | map(attribute='content') | join }}
{{- messages[0].content[1:-1] }}{{ '%s' | format(messages[0].content) }}{{ messages[0].content.upper().lower() }}
{{- messages[0] | tojson }}{% for letter in messages[0].content %}{{ letter }}{% endfor %}<|eot|>"""
NUM_SPECIAL_IN_CARELESS = 3

TURNS = [("system", " Be brief. "), ("user", "Hi! é🦙"), ("assistant", "x</think> Hello. "), ("tool", '{"a": "é"}')]

MakeChat = Callable[[str], JinjaChat]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chat")
    write_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def make_chat(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> MakeChat:
    def make(template: str) -> JinjaChat:
        path = tmp_path_factory.mktemp("template") / "chat.jinja"
        path.write_text(template)
        return JinjaChat(path, tokenizer)

    return make


def messages_of(*turns: tuple[str, str]) -> list[ChatMessage]:
    return [ChatMessage.of_text(*turn) for turn in turns]


def special_ids(token_ids: list[int]) -> list[int]:
    return [token_id for token_id in token_ids if token_id >= NUM_BYTES]


@pytest.mark.parametrize("template", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("num_turns", range(1, 5))
def test_a_template_renders_as_in_transformers(make_chat: MakeChat, template: str, num_turns: int) -> None:
    oracle = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=build_tokenizer(), bos_token="<|begin_of_text|>"
    )
    turns = TURNS[:num_turns] if num_turns > 1 else TURNS[1:2]
    conversation = [{"role": role, "content": text} for role, text in turns]
    expected = oracle.apply_chat_template(
        conversation, chat_template=template, return_dict=False, add_generation_prompt=True
    )
    assert make_chat(template).encode(messages_of(*turns)) == expected
    assert expected.count(BOS_TOKEN_ID) == 1


def test_our_own_format_written_as_a_template_gives_the_same_ids(make_chat: MakeChat, tokenizer: Tokenizer) -> None:
    messages = messages_of(("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello."), ("user", "Bye"))
    assert make_chat(PLAIN).encode(messages) == encode_chat(tokenizer, messages)


def test_the_parts_of_a_message_reach_the_template_as_one_text(make_chat: MakeChat) -> None:
    message = ChatMessage(role="user", content=(TextPart(text="ll"), TextPart(text="ama")))
    assert make_chat(PLAIN).encode([message]) == make_chat(PLAIN).encode(messages_of(("user", "llama")))


@pytest.mark.parametrize("template", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("role", HEADER_OF_ROLE)
def test_no_special_token_can_be_smuggled_in(
    make_chat: MakeChat, tokenizer: Tokenizer, template: str, role: str
) -> None:
    chat = make_chat(template)
    structure = special_ids(chat.encode(messages_of((role, "x"))))
    for name in tokenizer.special_tokens:
        text = f"a{name}{name}b"
        parts = ChatMessage(role=role, content=(TextPart(text=text[:4]), TextPart(text=text[4:])))
        for message in (ChatMessage.of_text(role, text), parts):
            token_ids = chat.encode([message])
            assert special_ids(token_ids) == structure
            said = bytes(token_id for token_id in token_ids if token_id < NUM_BYTES).decode()
            assert shown(text, template, role) in said, "what users write is there, as text"


def shown(text: str, template: str, role: str) -> str:
    """What the template makes of a message."""
    if template is RICH and role == "system":
        return ""
    return text.replace("<|image|>", "[image]") if template is RICH and role != "assistant" else text


words = st.sampled_from(
    ["<|eot|>", "|eot|", "eot", "<|", "|>", "<", ">", "<| e o t |>", ">|toe|<", "<|EOT|>", " ", "x"]
)


@given(contents=st.lists(st.lists(words, max_size=4).map("".join), min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_template_makes_of_what_users_write_stays_text(make_chat: MakeChat, contents: list[str]) -> None:
    chat = make_chat(CARELESS)
    token_ids = chat.encode(messages_of(*(("user", content) for content in contents)))
    assert len(special_ids(token_ids)) == NUM_SPECIAL_IN_CARELESS


@pytest.mark.parametrize("mark", [chr(0xD800) + chr(0xDC08), chr(0xD800), chr(0xDC08)])
def test_the_marks_of_special_tokens_are_no_text_a_user_can_send(make_chat: MakeChat, mark: str) -> None:
    with pytest.raises(ValueError, match=r"messages\[1\]\.content must be valid Unicode: .* surrogates not allowed"):
        make_chat(PLAIN).encode(messages_of(("user", "hi"), ("user", f"a{mark}")))


def test_a_template_that_searches_what_users_write_finds_it(make_chat: MakeChat) -> None:
    template = "{{ bos_token }}{% if '<|eot|>' in messages[0].content %}has {{ messages[0].content }}{% endif %}"
    token_ids = make_chat(template).encode(messages_of(("user", "<|eot|>")))
    assert token_ids == [BOS_TOKEN_ID, *b"has <|eot|>"]


def test_the_longer_of_two_special_tokens_is_meant(tmp_path: Path) -> None:
    inner = build_tokenizer()
    inner.add_special_tokens(["<|eot|>!"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    (tmp_path / "chat.jinja").write_text("<|eot|>!<|eot|>")
    longer = tokenizer.special_token_id("<|eot|>!")
    assert JinjaChat(tmp_path / "chat.jinja", tokenizer).encode(messages_of(("user", "x"))) == [longer, 264]


def test_a_template_needs_none_of_llama_4s_special_tokens(tmp_path: Path) -> None:
    inner = build_tokenizer()
    plain = type(inner)(inner.model)
    plain.pre_tokenizer, plain.decoder = inner.pre_tokenizer, inner.decoder
    plain.add_special_tokens(["<turn>"])
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}\n{% endfor %}")
    encode = chat_encoder(Tokenizer(tmp_path), str(tmp_path / "chat.jinja"))
    assert encode(messages_of(("user", "a"), ("assistant", "<turn>"))) == [
        *(NUM_BYTES, *b"user: a\n"),
        *(NUM_BYTES, *b"assistant: <turn>\n"),
    ]


def test_the_begin_of_text_token_has_its_name_though_only_the_config_knows_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"bos_token_id": 256}')
    (tmp_path / "chat.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    assert JinjaChat(tmp_path / "chat.jinja", Tokenizer(tmp_path)).encode(messages_of(("user", "a"))) == [256, 97]


REFUSING = """\
{%- if messages[0].role != 'user' %}{{ raise_exception('The first message must be ' + 'a user\\'s') }}{% endif %}
{{- messages[0].content }}"""


def test_a_template_that_refuses_is_quoted(make_chat: MakeChat) -> None:
    with pytest.raises(
        ValueError, match="messages are refused by the chat template: The first message must be a user's"
    ):
        make_chat(REFUSING).encode(messages_of(("assistant", "hi")))


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("1 / (messages | length - 2)", "ZeroDivisionError"),
        ("(messages | length > 1) and (1 + messages[0].content)", "TypeError"),
        ("(messages | length > 1) and messages[7].content.x", "refused by the chat template: .*has no element 7"),
        (
            "(messages | length > 1) and messages.append(1)",
            "refused by the chat template: .*unsafe|not safely callable",
        ),
        ("(messages | length > 1) and ''.__class__.__mro__()", "refused by the chat template"),
    ],
)
def test_a_template_that_fails_on_some_messages_fails_them_alone(
    make_chat: MakeChat, expression: str, reason: str
) -> None:
    chat = make_chat("{{ messages[0].content }}{{ " + expression + " }}")
    with pytest.raises(ValueError, match=reason):
        chat.encode(messages_of(("user", "a"), ("user", "b")))
    assert chat.encode(messages_of(("user", "a")))[:1] == [ord("a")]


def test_what_is_wrong_with_messages_is_named_as_without_a_template(make_chat: MakeChat) -> None:
    chat = make_chat(PLAIN)
    image = ChatMessage(role="user", content=(TextPart(text="see"), ImagePart(url="x")))
    for messages, reason in (
        ([], "messages must not be empty"),
        ([image], r"messages\[0\]\.content\[1\] is an image"),
        (messages_of(("wizard", "hi")), r"messages\[0\]\.role must be one of .*, not 'wizard'"),
    ):
        with pytest.raises(ValueError, match=reason):
            chat.encode(messages)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("a\n{% if %}", r"chat\.jinja:2: Expected an expression"),
        ("a\n\n{% for m in messages %}", r"chat\.jinja:3: Unexpected end of template"),
        ("{{ 'x' | no_such_filter }}", r"chat\.jinja:1: No filter named 'no_such_filter'"),
        ("a\n{{ messages[9].content.x }}", r"chat\.jinja:2: cannot render a user's message: .* has no element 9"),
        ("a\n{{ raise_exception('never') }}", r"chat\.jinja:2: cannot render a user's message: never"),
        ("{% include 'other.jinja' %}", r"chat\.jinja:1: cannot render a user's message"),
        ("{{ '<|' + 'eot' + '|>' }}", r"chat\.jinja makes the special token <\|eot\|> out of parts"),
        ("{% for m in messages %}<|{{ 'eot' }}|>{% endfor %}", r"makes the special token <\|eot\|> out of parts"),
    ],
)
def test_a_bad_template_is_named_with_its_line(make_chat: MakeChat, template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_chat(template)


def test_a_template_that_is_no_text_or_not_there_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.jinja is not UTF-8"):
        JinjaChat(tmp_path / "binary.jinja", tokenizer)
    with pytest.raises(FileNotFoundError, match=r"absent\.jinja"):
        JinjaChat(tmp_path / "absent.jinja", tokenizer)


def test_a_template_is_of_no_use_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"chat_template .* the model has no tokenizer\.json"):
        JinjaChat(tmp_path / "chat.jinja", Tokenizer(tmp_path))


def test_there_are_as_many_marks_as_published_special_tokens(tmp_path: Path) -> None:
    """More than fit into one surrogate."""
    inner = build_tokenizer()
    names = [f"<|made_up_{number}|>" for number in range(2048)]
    inner.add_special_tokens(names)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    (tmp_path / "chat.jinja").write_text("".join(names))
    token_ids = JinjaChat(tmp_path / "chat.jinja", tokenizer).encode(messages_of(("user", "x")))
    assert token_ids == [tokenizer.special_tokens[name] for name in names]
    assert SPECIAL_TOKENS["<|eot|>"] not in token_ids
