"""Batch files: every row gets its answer in its place, or the file is refused."""

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tell_core.data.tables import check_output, read_prompts, write_predictions
from tell_core.errors import DataError, InputError

PROMPTS = st.lists(
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(str.strip),
    min_size=1,
    max_size=8,
)


def lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(PROMPTS, st.sampled_from([".jsonl", ".parquet"]))
def test_what_is_written_is_read_back_with_its_answers(tmp_path: Path, prompts, ending):
    rows = [{"prompt": prompt, "n": n} for n, prompt in enumerate(prompts)]
    out = tmp_path / f"out{ending}"

    write_predictions(rows, [prompt[::-1] for prompt in prompts], out)
    found = read_prompts(out)

    assert [row["prompt"] for row in found] == prompts
    assert [row["prediction"] for row in found] == [prompt[::-1] for prompt in prompts]


def test_a_csv_file_keeps_its_columns_and_gets_one_more(tmp_path: Path):
    (tmp_path / "in.csv").write_text("prompt,id\nhello,7\n")

    write_predictions(read_prompts(tmp_path / "in.csv"), ["world"], tmp_path / "out.csv")

    table = pd.read_csv(tmp_path / "out.csv")
    assert table.to_dict("records") == [{"prompt": "hello", "id": 7, "prediction": "world"}]


@pytest.mark.parametrize("bad", [{"question": "a"}, {"prompt": None}, {"prompt": " "}, [1]])
def test_a_row_without_a_prompt_is_refused_with_its_line(tmp_path: Path, bad):
    path = lines(tmp_path / "in.jsonl", [{"prompt": "a"}, bad])

    with pytest.raises(DataError, match=r"in\.jsonl, line 2"):
        read_prompts(path)


def test_another_column_can_hold_the_prompts(tmp_path: Path):
    path = lines(tmp_path / "in.jsonl", [{"question": "a"}])

    assert read_prompts(path, "question") == [{"question": "a"}]


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_prompts(tmp_path / "none.jsonl")


@pytest.mark.parametrize("name", ["out.txt", "nowhere/out.csv"])
def test_an_output_that_cannot_be_written_is_refused_before_anything(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="--output"):
        check_output(tmp_path / name)
