import pyarrow as pa
import pyarrow.parquet as pq

from flows.curation_commands import SHOWN_ROWS, print_evidence


def write_rejects(directory, texts):
    """The files that curation leaves, with these rejects and nothing else."""
    rows = [
        {"source": "[/s]", "file": "/d/a.jsonl", "line": line, "reason": "bad_json",
         "detail": "", "value": None, "text": text}
        for line, text in enumerate(texts, start=1)
    ]  # fmt: skip
    schema = pa.schema(
        [(name, pa.string()) for name in ("source", "file", "reason", "detail", "text")]
        + [("line", pa.int64()), ("value", pa.float64())]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), directory / "rejects.parquet")


def test_text_that_a_table_or_terminal_would_obey_is_printed_as_it_stands(tmp_path, capsys):
    write_rejects(tmp_path, ["[/b] [red]x[/red]", "\x1b[31mred\x07", "two\nlines"])

    print_evidence(tmp_path, "rejects", as_json=False)

    printed = capsys.readouterr().out
    assert "[/b] [red]x[/red]" in printed
    assert "[/s]" in printed
    assert "\x1b" not in printed and "\x07" not in printed
    assert "two lines" in printed


def test_long_lists_and_texts_are_cut_on_the_console_and_whole_as_json(tmp_path, capsys):
    write_rejects(tmp_path, ["y" * 400] * (SHOWN_ROWS + 5))

    print_evidence(tmp_path, "rejects", as_json=False)
    table = capsys.readouterr().out
    print_evidence(tmp_path, "rejects", as_json=True)
    document = capsys.readouterr().out

    assert f"{SHOWN_ROWS} of {SHOWN_ROWS + 5} rows" in table
    assert "y" * 400 not in table
    assert document.count("y" * 400) == SHOWN_ROWS + 5


def test_nothing_set_aside_is_said(tmp_path, capsys):
    write_rejects(tmp_path, [])

    print_evidence(tmp_path, "rejects", as_json=False)

    assert capsys.readouterr().out == "no rejects\n"
