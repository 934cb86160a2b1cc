"""Every kind of file gives the same rows, each with its true place; what is not read says why."""

import csv
import gzip
import io
import json
import sys

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cli import UserError
from runtime.files import read_rows

ROWS = [
    {"problem": "What is 6 + 1?", "answer": "007"},
    {"problem": 'Two\nlines, a comma; and "quotes"', "answer": "7.50"},
    {"problem": "Ein Ü, ein 😀", "answer": "\\frac{1}{2}"},
]


def as_csv(rows, delimiter=",", **options) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_stream(table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def write(folder, name: str, content: bytes):
    path = folder / name
    path.write_bytes(content)
    return path


def write_every_kind(folder) -> dict:
    """name -> the places of its rows"""
    jsonl = "\n".join(json.dumps(row) for row in ROWS).encode()
    array = json.dumps(ROWS, ensure_ascii=False).encode()
    table = pyarrow.Table.from_pylist(ROWS)
    lines, cells = ["line 1", "line 2", "line 3"], ["line 2", "line 3", "line 5"]
    entries, rows = [f"entry {i}" for i in range(3)], [f"row {i}" for i in range(3)]
    contents = {
        "a.jsonl": (jsonl, lines),
        "crlf.jsonl": (jsonl.replace(b"\n", b"\r\n"), lines),
        "bom.jsonl": (b"\xef\xbb\xbf" + jsonl, lines),
        "a.ndjson": (jsonl, lines),
        "..jsonl": (jsonl, lines),
        "A.JSONL": (jsonl, lines),
        "a.jsonl.gz": (gzip.compress(jsonl), lines),
        "A.JSON.GZ": (gzip.compress(array), entries),
        "a.json": (array, entries),
        "bom.json": (b"\xef\xbb\xbf" + array, entries),
        "lines.json": (jsonl, lines),  # what hub sets call .json
        "a.csv": (as_csv(ROWS), cells),
        "bom.csv": (b"\xef\xbb\xbf" + as_csv(ROWS), cells),
        "lf.csv": (as_csv(ROWS, lineterminator="\n"), cells),
        "excel.csv": (as_csv(ROWS, ";"), cells),
        "a.csv.gz": (gzip.compress(as_csv(ROWS)), cells),
        "a.tsv": (as_csv(ROWS, "\t"), cells),
        "a.tsv.gz": (gzip.compress(as_csv(ROWS, "\t")), cells),
        "a.arrow": (as_stream(table), rows),
        "a.ipc": (as_stream(table), rows),
    }
    for name, (content, _) in contents.items():
        write(folder, name, content)
    pyarrow.parquet.write_table(table, folder / "X.PARQUET", row_group_size=2)
    pyarrow.feather.write_feather(table, folder / "a.feather")
    pyarrow.feather.write_feather(table, folder / "file.arrow", compression="uncompressed")
    return {name: places for name, (_, places) in contents.items()} | dict.fromkeys(
        ("X.PARQUET", "a.feather", "file.arrow"), rows
    )


def test_every_kind_of_file_gives_the_same_rows_with_their_places(tmp_path):
    kinds = write_every_kind(tmp_path)
    for name, places in kinds.items():
        got = list(read_rows(str(tmp_path / name)))
        assert [row for _, row in got] == ROWS, name
        assert [place for place, _ in got] == places, name


def test_the_line_of_a_csv_row_is_the_one_it_begins_on(tmp_path):
    text = b'problem,answer\n\n"a\n\nb",1\n\n\nc,2\n"d\n",\n'
    got = list(read_rows(str(write(tmp_path, "p.csv", text))))
    assert got == [
        ("line 3", {"problem": "a\n\nb", "answer": "1"}),
        ("line 8", {"problem": "c", "answer": "2"}),
        ("line 9", {"problem": "d\n", "answer": ""}),
    ]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=5), st.sampled_from(",;\t"))
def test_any_text_survives_a_csv_and_stands_on_its_line(tmp_path_factory, pairs, delimiter):
    rows = [{"problem": problem, "answer": answer} for problem, answer in pairs]
    content = as_csv(rows, delimiter, quoting=csv.QUOTE_ALL)
    path = write(tmp_path_factory.mktemp("csv"), "p.csv", content)
    got = list(read_rows(str(path)))
    assert [row for _, row in got] == rows
    lines = content.split(b"\n")  # as editors count them
    for place, row in got:
        first = row["problem"].replace('"', '""').split("\n")[0]
        assert lines[int(place.removeprefix("line ")) - 1].decode().startswith('"' + first)


@pytest.mark.parametrize(
    "text, place, message",
    [
        (b"problem,answer\na,1,2\nb,3\n", "line 2", "3 cells where the header has 2"),
        (b"problem,answer\na\nb,3\n", "line 2", "1 cells where the header has 2"),
    ],
)
def test_a_csv_row_of_another_length_is_a_malformed_row(tmp_path, text, place, message):
    first, second = read_rows(str(write(tmp_path, "p.csv", text)))
    assert first[0] == place and isinstance(first[1], ValueError) and message in str(first[1])
    assert second == ("line 3", {"problem": "b", "answer": "3"})


UNREADABLE = {
    "p.xlsx": (b"PK", "spreadsheets, which are not read; save the sheet as .csv (UTF-8)"),
    "P.XLS": (b"", ".xls files are spreadsheets"),
    "p.zip": (b"PK", "archives, which are not read; unpack it first"),
    "p.tar.gz": (b"", ".tar files are archives"),
    "p.jsonl.zst": (b"", ".zst files are archives"),
    "p.parquet.gz": (b"", ".parquet is not read from inside a .gz file; unpack it first"),
    "p.gz": (b"", "this kind is not read from inside a .gz file"),
    "p.txt": (b"7", "files ending in .txt are not read; an ending must say what it is: .jsonl"),
    "p": (b"7", "such files are not read; an ending must say what it is: .jsonl"),
    "short.jsonl.gz": (gzip.compress(b"[" * 999)[:-12], "cannot be read (Compressed file ended"),
    "no.jsonl.gz": (b'{"problem": 1}', "cannot be read (Not a gzipped file"),
    "broken.json.gz": (gzip.compress(b"[]" * 9)[:12] + b"\xff" * 20, "cannot be read ("),
    "open.csv": (b'problem,answer\na,1\n"b,2\nc,3\n', "line 3: not CSV ("),
    "quote.csv": (b'problem,answer\na,1\n"b"c,2\n', "line 3: not CSV ("),
    "latin1.csv": (b"problem,answer\na,1\n\xfc,2\n", "line 3: not UTF-8 ("),
    "utf16.csv": ("problem,answer\na,1\n".encode("utf-16"), "line 1: not UTF-8 ("),
    "twice.csv": (b"answer,answer\na,1\n", "two columns are called 'answer'"),
    "p.parquet": (b"PAR1nonsense", "not a readable parquet file ("),
    "empty.parquet": (b"", "not a readable parquet file ("),
    "p.arrow": (b"ARROW1nonsense", "not a readable arrow file ("),
    "empty.arrow": (b"", "not a readable arrow file ("),
    "object.json": (b"{}", "not an array"),
    "two.json": (b'[{"problem": "a"}] []', "not JSON in UTF-8 (Extra data"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_one_line_that_is_true(tmp_path, name):
    content, message = UNREADABLE[name]
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as stop:
        list(read_rows(str(path)))
    line = str(stop.value)
    assert line.startswith(str(path)) and message in line and "\n" not in line and len(line) < 500


def test_a_table_that_claims_more_rows_than_its_file_can_hold_is_refused(tmp_path):
    """A damaged length of a column of nothing would fill the memory with rows."""
    table = pyarrow.table({"problem": pyarrow.nulls(10**6)})
    path = write(tmp_path, "p.arrow", as_stream(table))
    assert path.stat().st_size < 1000
    with pytest.raises(UserError, match="not a readable arrow file .it claims 1000000 rows in "):
        list(read_rows(str(path)))


def test_a_table_with_broken_text_in_it_is_refused(tmp_path):
    broken = pyarrow.StringArray.from_buffers(2, *pyarrow.array([b"\xff", b"a"]).buffers()[1:])
    for name in ("p.arrow", "p.parquet"):
        path = write(tmp_path, name, as_stream(pyarrow.table({"problem": broken})))
        if name == "p.parquet":
            pyarrow.parquet.write_table(pyarrow.table({"problem": broken}), path)
        with pytest.raises(UserError, match="not a readable .* file .*(UTF|utf)"):
            list(read_rows(str(path)))


# --- folders of datasets.save_to_disk -------------------------------------------------------------
def save_to_disk(folder, shards: list[list[dict]], **state):
    """What the package writes: arrow streams, and their names in state.json."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        write(folder, name, as_stream(pyarrow.Table.from_pylist(rows)))
    files = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(files | state))
    return folder


def test_a_saved_folder_is_read_without_the_package_and_counts_rows_through(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import would raise
    folder = save_to_disk(tmp_path / "set", [ROWS[:2], ROWS[2:]])
    assert list(read_rows(str(folder))) == [(f"row {i}", row) for i, row in enumerate(ROWS)]


def test_folders_that_cannot_be_read_say_so(tmp_path):
    save_to_disk(tmp_path / "both" / "train", [ROWS])
    save_to_disk(tmp_path / "both" / "test", [ROWS])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    outside = [{"filename": "../both/train/data-00000-of-00001.arrow"}]
    save_to_disk(tmp_path / "outside", [ROWS], _data_files=outside)
    save_to_disk(tmp_path / "indices", [ROWS], _indices_data_files=[{"filename": "indices.arrow"}])
    save_to_disk(tmp_path / "missing", [ROWS], _data_files=[{"filename": "data.arrow"}])
    save_to_disk(tmp_path / "half", [ROWS], _data_files=7)
    for name, message in {
        "": "no such problem file; it is a folder",
        "both": "holds several splits; give one: ",
        "outside": "state.json: cannot be used (it names files elsewhere)",
        "indices": "flatten_indices()",
        "missing": "data.arrow: cannot be read (No such file",
        "half": "state.json: cannot be used (",
    }.items():
        with pytest.raises(UserError) as stop:
            list(read_rows(str(tmp_path / name)))
        assert message in str(stop.value) and "\n" not in str(stop.value), name


# --- the hub --------------------------------------------------------------------------------------
def test_a_hub_set_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets; .* pip install datasets"):
        list(read_rows("hf:openai/gsm8k:main:test"))


@pytest.mark.parametrize(
    "source", ["hf:", "hf:openai/gsm8k", "hf:a/b:", "hf:a/b::test", "hf:a:b:c:d"]
)
def test_a_hub_name_of_another_form_says_how_to_write_it(source):
    with pytest.raises(UserError, match="write hf:OWNER/NAME:SPLIT or"):
        list(read_rows(source))


def test_with_the_package_its_own_folders_and_sets(tmp_path, monkeypatch):
    """Runs where the package is installed: a folder stands in for the hub, which it loads alike."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    shuffled = made.shuffle(seed=1)
    shuffled.save_to_disk(str(tmp_path / "shuffled"))
    datasets.DatasetDict(train=made).save_to_disk(str(tmp_path / "dict"))
    assert [row for _, row in read_rows(str(tmp_path / "saved"))] == ROWS
    assert [row for _, row in read_rows(str(tmp_path / "shuffled"))] == list(shuffled)
    assert [row for _, row in read_rows(str(tmp_path / "dict" / "train"))] == ROWS
    with pytest.raises(UserError, match="holds several splits; give one: .*dict/train"):
        list(read_rows(str(tmp_path / "dict")))
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub", "train.jsonl", "\n".join(map(json.dumps, ROWS)).encode())
    got = list(read_rows(f"hf:{tmp_path / 'hub'}:train"))
    assert got == [(f"row {i}", row) for i, row in enumerate(ROWS)]
    with pytest.raises(UserError, match="cannot be loaded") as stop:
        list(read_rows(f"hf:{tmp_path / 'hub'}:test"))
    assert "\n" not in str(stop.value)
