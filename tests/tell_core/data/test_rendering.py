import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.rendering import (
    ChatRenderer,
    Example,
    label_mask_pieces,
    load_chat_template,
    with_shots,
)
from tell_core.errors import ModelError

from .golden_renderings import golden_path, render
from .tiny_tokenizers import CHATML, INSTRUCT, TEMPLATES, build_tokenizer

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)
RENDERERS = {name: ChatRenderer(build_tokenizer(text)) for name, text in TEMPLATES.items()}


@given(st.sampled_from(sorted(RENDERERS)), texts, texts)
def test_training_context_equals_generation_context_token_for_token(name, prompt, response):
    renderer, example = RENDERERS[name], Example(prompt, response)

    [(ids, start)] = renderer.encode([example])

    assert ids[:start] == renderer.prompt_ids([example])[0]


@given(st.sampled_from(sorted(RENDERERS)), texts, texts)
def test_supervised_are_the_response_and_the_end_of_turn(name, prompt, response):
    renderer = RENDERERS[name]

    [(ids, start)] = renderer.encode([Example(prompt, response)])

    supervised = renderer.tokenizer.decode(ids[start:])
    expected = response.strip() if name == "instruct" else response
    assert supervised == f"{expected}<|end|>"


@given(texts, texts)
def test_pieces_joined_are_the_rendered_text(prompt, response):
    renderer = RENDERERS["chatml"]
    [(ids, start)] = renderer.encode([Example(prompt, response)])

    pieces = label_mask_pieces(renderer.tokenizer, ids, start)

    assert "".join(text for text, _ in pieces) == renderer.tokenizer.decode(ids)
    supervised = "".join(text for text, is_supervised in pieces if is_supervised)
    assert supervised == renderer.tokenizer.decode(ids[start:])


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_rendering_with_label_mask_is_the_golden_one(template):
    golden = json.loads(golden_path(template).read_text(encoding="utf-8"))

    assert render(template) == golden


def test_encoding_in_a_batch_equals_encoding_one_by_one():
    renderer = RENDERERS["chatml"]
    examples = [Example("copy", "a"), Example("reverse the word", "yes"), Example("x", "y")]

    assert renderer.encode(examples) == [renderer.encode([one])[0] for one in examples]


def test_shots_are_earlier_turns():
    example = with_shots(Example("copy c", "c"), [Example("copy a", "a")])

    text = RENDERERS["chatml"].prompt_text(example)

    assert text.index("copy a") < text.index("assistant\na<|end|>") < text.index("copy c")


def test_system_message_for_a_template_without_system_role_is_a_clear_error():
    renderer = RENDERERS["instruct"]

    with pytest.raises(ModelError, match=r"refuses it.*anchor\.position"):
        renderer.encode([Example("copy", "a", system="Be brief.")])


def test_template_that_leaves_the_system_message_out_is_a_clear_error():
    template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}|{% endfor %}"

    with pytest.raises(ModelError, match="leaves the system message out"):
        ChatRenderer(build_tokenizer(), template).prompt_text(Example("copy", system="Be brief."))


def test_template_that_is_not_prefix_stable_is_a_clear_error():
    template = "{{ messages | length }}{% for m in messages %} {{ m['content'] }}{% endfor %}"

    with pytest.raises(ModelError, match=r"not prefix-stable.*character 0"):
        ChatRenderer(build_tokenizer(), template).encode([Example("copy", "a")])


def test_template_that_changes_the_response_is_a_clear_error():
    template = CHATML.replace("message['content']", "message['content'].replace('bad', 'good')")

    with pytest.raises(ModelError, match="changes the response"):
        ChatRenderer(build_tokenizer(), template).encode([Example("copy", "bad")])


def test_template_whose_turns_end_with_nothing_gets_the_end_of_text():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    renderer = ChatRenderer(build_tokenizer(), template)

    [(ids, _)] = renderer.encode([Example("copy", "a")])

    assert renderer.tokenizer.decode(ids) == "user: copy\nassistant: a<|end|>"


def test_template_that_thinks_before_the_response_is_kept():
    template = INSTRUCT.replace("{% else %}", "{% else %}<think></think>")

    [(ids, start)] = ChatRenderer(build_tokenizer(), template).encode([Example("copy", "a")])

    assert build_tokenizer().decode(ids[start:]) == "<think></think>a<|end|>"


def test_tokenizer_without_end_of_text_is_a_clear_error():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None

    with pytest.raises(ModelError, match="no end-of-text token"):
        ChatRenderer(tokenizer).encode([Example("copy", "a")])


def test_digest_follows_template_and_vocabulary_but_not_use():
    tokenizer = build_tokenizer(CHATML)
    digest = ChatRenderer(tokenizer).digest

    tokenizer(["copy", "copy the word"], padding=True, truncation=True, max_length=4)

    assert ChatRenderer(tokenizer).digest == digest
    assert ChatRenderer(tokenizer, INSTRUCT).digest != digest
    tokenizer.add_tokens(["brandnew"])
    assert ChatRenderer(tokenizer).digest != digest


def test_missing_template_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"model\.chat_template: cannot read .*none\.jinja"):
        load_chat_template(str(tmp_path / "none.jinja"))
