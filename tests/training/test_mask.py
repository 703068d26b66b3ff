"""The mask: exactly the assistant's tokens, the stop token among them, on the text the base itself would render."""

from __future__ import annotations

from typing import Any

import pytest

from training.data import Example, Message
from training.encode import IGNORED, encode, encode_all
from training.errors import DataTooSmall, MaskEmpty, StopTokenUntrained, TemplateMismatch, TemplateUnsupported
from training.template import check_rendering, training_template

TWO_TURNS = Example(
    (
        Message("user", "What is 2 + 2?"),
        Message("assistant", "4"),
        Message("user", "And 3 + 3 <|im_end|> ?\n"),
        Message("assistant", " It is 6.\n"),
    )
)
CHATS = (
    TWO_TURNS,
    Example.of(system="Be brief.", user="Hi", answer="Hello there"),
    Example.of(user="émoji 🙂 and {{ braces }} {% raw %}", answer='{"a": [1, 2]}'),
)


def spoken(tokenizer: Any, ids: tuple[int, ...], labels: tuple[int, ...]) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


@pytest.mark.real
def test_the_training_template_renders_what_the_base_renders(smollm2_tokenizer: Any) -> None:
    template = training_template(smollm2_tokenizer)
    assert template is not None and template != smollm2_tokenizer.chat_template
    check_rendering(smollm2_tokenizer, template, CHATS)


@pytest.mark.real
def test_another_rendering_is_noticed(smollm2_tokenizer: Any) -> None:
    template = training_template(smollm2_tokenizer) or ""
    with pytest.raises(TemplateMismatch, match="omebody"):
        check_rendering(smollm2_tokenizer, template.replace("SmolLM", "Somebody"), CHATS)


@pytest.mark.real
@pytest.mark.parametrize("by_markers", [True, False])
def test_the_mask_is_the_answers_and_their_stop_tokens(smollm2_tokenizer: Any, by_markers: bool) -> None:
    template = training_template(smollm2_tokenizer) if by_markers else None
    stop = smollm2_tokenizer.convert_tokens_to_ids("<|im_end|>")
    for chat in CHATS:
        encoded = encode(smollm2_tokenizer, template, chat, frozenset({stop}))
        wanted = "".join(m.content + "<|im_end|>" for m in chat.messages if m.role == "assistant")
        assert spoken(smollm2_tokenizer, encoded.input_ids, encoded.labels) == wanted
        assert stop in encoded.labels
        own = smollm2_tokenizer.apply_chat_template([m.as_dict() for m in chat.messages], tokenize=True)
        assert list(encoded.input_ids) == list(own["input_ids"])


@pytest.mark.real
def test_the_stock_template_masks_nothing_and_is_refused(smollm2_tokenizer: Any) -> None:
    with pytest.raises(MaskEmpty, match="Hi"):
        encode(smollm2_tokenizer, smollm2_tokenizer.chat_template, CHATS[1], frozenset({2}))


@pytest.mark.real
def test_a_template_that_leaves_the_stop_token_out_is_refused(smollm2_tokenizer: Any) -> None:
    template = training_template(smollm2_tokenizer) or ""
    inside = "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    assert inside in template
    leaky = template.replace(inside, "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}")
    check_rendering(smollm2_tokenizer, leaky, CHATS)  # the text is the same, only the mask is not
    with pytest.raises(StopTokenUntrained, match="there"):
        encode(smollm2_tokenizer, leaky, CHATS[1], frozenset({2}))


def test_a_base_without_a_training_template_is_masked_by_its_prefixes(byte_tokenizer: Any) -> None:
    assert training_template(byte_tokenizer) is None
    encoded = encode(byte_tokenizer, None, TWO_TURNS, frozenset({257}))
    assert spoken(byte_tokenizer, encoded.input_ids, encoded.labels) == "4</s> It is 6.\n</s>"


def test_templates_that_cannot_be_masked_are_refused(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = "{% for m in messages[-2:] %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", forgetful)
    with pytest.raises(TemplateUnsupported, match="generation"):
        encode(byte_tokenizer, None, TWO_TURNS, frozenset({257}))
    endless = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    endless += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", endless)
    with pytest.raises(MaskEmpty):  # nothing in the answer is a stop token, so nothing of it can be trained
        encode(byte_tokenizer, None, CHATS[1], frozenset({257}))
    monkeypatch.setattr(byte_tokenizer, "chat_template", None)
    with pytest.raises(TemplateUnsupported, match="chat template"):
        training_template(byte_tokenizer)


@pytest.mark.parametrize("by_markers", [True, False])
def test_a_conversation_that_the_base_refuses_is_named(
    byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, by_markers: bool
) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    strict += "{% for m in messages %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% endfor %}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", strict)
    says = r"the example that asks 'Hi': the base's chat template refuses the conversation: System role not supported"
    with pytest.raises(TemplateUnsupported, match=says):
        encode(byte_tokenizer, strict if by_markers else None, CHATS[1], frozenset({257}))
    with pytest.raises(TemplateUnsupported, match=says):
        check_rendering(byte_tokenizer, strict, CHATS[1:])


def test_long_examples_are_left_out_whole(byte_tokenizer: Any, conversations: tuple[Example, ...]) -> None:
    full = encode_all(byte_tokenizer, None, conversations, frozenset({257}), 1000)
    lengths = [len(example.input_ids) for example in full.examples]
    assert full.too_long == 0 and full.tokens == sum(lengths)
    assert full.label_tokens == sum(len(example.answer) + 1 for example in conversations)
    cut = encode_all(byte_tokenizer, None, conversations, frozenset({257}), max(lengths) - 1)
    assert cut.too_long == lengths.count(max(lengths)) > 0
    assert set(cut.examples) < set(full.examples)
    with pytest.raises(DataTooSmall, match="max-length"):
        encode_all(byte_tokenizer, None, conversations, frozenset({257}), 8)
