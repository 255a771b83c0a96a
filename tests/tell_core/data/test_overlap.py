from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.overlap import normalised_key


@given(st.text(st.characters(codec="utf-8")))
def test_case_and_white_space_do_not_change_the_key(text):
    assert normalised_key(f" {text}\n") == normalised_key(text)
    assert normalised_key(text.casefold()) == normalised_key(text)


def test_other_words_have_another_key():
    assert normalised_key("Straße  a") == normalised_key("STRASSE A")
    assert normalised_key("a b") != normalised_key("ab")
