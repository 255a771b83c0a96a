import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tell_core.data.small_world import (
    PRIVATE_CIPHER,
    TASK_CHAIN,
    TASK_REQUEST,
    WorldSize,
    build_skills,
    general_requests,
    pretrain_requests,
    use_frequencies,
    write_world,
    zipf_frequencies,
)
from tell_core.errors import DataError

SIZE = WorldSize(num_pretrain=300, num_general=300, num_task_train=120, num_task_test=40)
FILES = ("pretrain", "general", "task_train", "task_test")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, list[dict]]:
    paths = write_world(tmp_path_factory.mktemp("world"), SIZE, seed=3)
    return {
        name: [json.loads(line) for line in paths[name].read_text().splitlines()] for name in FILES
    }


def words_of(rows: list[dict]) -> set[str]:
    return {row["prompt"].rpartition(" ")[2] for row in rows}


@given(st.text(alphabet="ABCDEFGH", min_size=4, max_size=6), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_ciphers_replace_letter_by_letter_and_can_be_undone(word: str, seed: int):
    skills = build_skills(np.random.default_rng(seed))

    for name in ("shift", "mirror", "code", PRIVATE_CIPHER):
        table = {letter: skills[name](letter) for letter in "ABCDEFGH"}
        assert sorted(table.values()) == sorted(table)
        assert skills[name](word) == "".join(table[letter] for letter in word)


@given(st.integers(1, 20), st.floats(0, 2))
def test_zipf_frequencies_fall_and_sum_to_one(count: int, exponent: float):
    shares = list(zipf_frequencies([str(k) for k in range(count)], exponent).values())

    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)


def test_the_private_cipher_stands_in_task_data_only(world):
    for name in ("pretrain", "general"):
        assert not any(PRIVATE_CIPHER in row["prompt"] for row in world[name])
        assert not any(PRIVATE_CIPHER in row["skills"] for row in world[name])
    for name in ("task_train", "task_test"):
        assert all(PRIVATE_CIPHER in row["skills"] for row in world[name])


def test_words_of_the_test_split_occur_nowhere_else(world):
    tested = words_of(world["task_test"])

    assert len(tested) == SIZE.num_task_test
    for name in ("pretrain", "general", "task_train"):
        assert not tested & words_of(world[name])


def test_pretraining_shows_single_skills_only(world):
    assert all(len(row["skills"]) == 1 for row in world["pretrain"])
    assert any(len(row["skills"]) > 1 for row in world["general"])


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path):
    first = write_world(tmp_path / "a", SIZE, seed=5)
    second = write_world(tmp_path / "b", SIZE, seed=5)
    other = write_world(tmp_path / "c", SIZE, seed=6)

    assert all(first[name].read_bytes() == second[name].read_bytes() for name in FILES)
    assert first["general"].read_bytes() != other["general"].read_bytes()


def test_every_quantum_but_the_private_cipher_is_shared(tmp_path: Path):
    paths = write_world(tmp_path, SIZE, seed=0)
    quanta = json.loads(paths["quanta"].read_text())["quanta"]
    groups = {entry["name"]: entry["group"] for entry in quanta}

    assert groups[f"skill:{PRIVATE_CIPHER}"] == "specific"
    assert all(groups[f"skill:{name}"] == "shared" for name in TASK_CHAIN)
    assert groups["format:json"] == groups["composition"] == "shared"


def test_use_frequencies_agree_with_what_was_drawn(world):
    stated = use_frequencies(general_requests(SIZE))

    for skill in ("reverse", "rotate", "shift"):
        drawn = sum(skill in row["skills"] for row in world["general"]) / SIZE.num_general
        assert drawn == pytest.approx(stated[f"skill:{skill}"], abs=0.1)


def test_requests_of_each_kind_of_data_sum_to_one():
    for requests in (general_requests(SIZE), pretrain_requests(SIZE)):
        assert sum(requests.values()) == pytest.approx(1)
        assert TASK_REQUEST not in requests


def test_the_tokenizer_is_lossless_and_loads(tmp_path: Path, world):
    paths = write_world(tmp_path, SIZE, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(paths["base_init"])

    for row in world["task_train"][:20]:
        for text in (row["prompt"], row["response"]):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text


def test_more_words_than_exist_are_refused(tmp_path: Path):
    with pytest.raises(DataError):
        write_world(tmp_path, WorldSize(min_letters=1, max_letters=1))
