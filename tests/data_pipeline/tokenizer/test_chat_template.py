"""Chat templates run in a sandbox, and say what they reject."""

import json

import pytest

from amfm.data_pipeline.tokenizer.chat_template import ChatTemplate, read_template

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}<assistant>"
)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_a_template_gets_messages_and_special_tokens():
    assert ChatTemplate(TEMPLATE, {"eos_token": "</s>"}).render(MESSAGES) == "<user>hi</s><assistant>ho</s><assistant>"


def test_a_template_is_found_where_transformers_writes_it(tmp_path):
    assert read_template(tmp_path) is None
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert read_template(tmp_path) is None
    settings.write_text(json.dumps({"eos_token": "<end>", "chat_template": "a{{ eos_token }}"}))
    assert read_template(tmp_path).render(MESSAGES) == "a<end>"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert read_template(tmp_path).render(MESSAGES) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_template(tmp_path).render(MESSAGES) == "file"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[9].content.x }}",
        "{{ 1 // 0 }}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_one_message(source):
    with pytest.raises(ValueError, match="the model's chat template rejects these messages"):
        ChatTemplate(source, {}).render(MESSAGES)


def test_a_template_that_is_none_is_named():
    with pytest.raises(ValueError, match="chat template cannot be read"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize("depth", [25, 120])
def test_a_template_with_too_many_loops_in_each_other_is_one_message(depth):
    with pytest.raises(ValueError, match="chat template cannot be read: too many"):
        ChatTemplate("{% for turn in messages %}" * depth + "{% endfor %}" * depth, {})
