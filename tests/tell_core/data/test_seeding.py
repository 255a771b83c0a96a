from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.seeding import choose_rows, seeded_generator

names = st.lists(st.text(max_size=5), max_size=30)


@given(names, st.integers(0, 30), st.integers(0, 5))
def test_smaller_choice_is_a_subset_in_rising_order(ids, limit, more):
    small = choose_rows(ids, limit, 0, "items").tolist()
    large = choose_rows(ids, limit + more, 0, "items").tolist()

    assert small == sorted(small)
    assert set(small) <= set(large)
    assert len(large) == min(limit + more, len(ids))


@given(names)
def test_no_limit_takes_everything(ids):
    assert choose_rows(ids, None, 0, "items").tolist() == list(range(len(ids)))


@given(st.integers(-(2**70), 2**70), st.text(max_size=5), st.integers(0, 9))
def test_equal_arguments_give_equal_draws(seed, purpose, number):
    draws = [seeded_generator(seed, purpose, number).random() for _ in range(2)]

    assert draws[0] == draws[1]


def test_purposes_have_draws_of_their_own():
    assert seeded_generator(0, "a").random() != seeded_generator(0, "b").random()
