"""files.py: the rows of a problem file in any of these formats, each with its place in the file.

    .jsonl .ndjson          one object per line      .json           an array of objects
    .csv .tsv               a header, then rows; every cell stays text: 007 is "007"
    .gz after any of these  the same, compressed     .parquet .arrow .feather .ipc   tables
    FOLDER                  written by datasets.save_to_disk
    hf:OWNER/NAME:SPLIT     a set of the Hugging Face hub (hf:OWNER/NAME:CONFIGURATION:SPLIT if it
                            has configurations)

Lines count from 1, as in editors; rows of tables and entries of arrays count from 0. Only the hub
needs the package `datasets`. It could read the other files, too, but it turns a column of 007 and
7.5 into numbers, and does not keep the line of a row.

Left out: streaming, other compressions, spreadsheets.
"""

import csv
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from runtime.cli import UserError, first_line, reason

Rows = Iterator[tuple[str, object]]  # ("line 7", row); an unreadable row: a ValueError in its place
SPREADSHEETS = {".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers"}
ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst", ".lz4"}


def read_rows(source: str) -> Rows:
    """All rows of a file, a folder or a hub set. Raises UserError, at once or while reading."""
    if source.startswith("hf:"):
        return read_hub(source)
    if os.path.isdir(source):
        return read_saved_folder(Path(source))
    check_there(source)
    suffix, packed = kind_of(source)
    if suffix in READERS and not (packed and READERS[suffix] is read_table):
        return READERS[suffix](Path(source))
    raise UserError(f"{source}: {why_not(suffix, packed)}")


def check_there(source: str) -> None:
    """Raises UserError for a file that does not exist."""
    # Path.is_file would raise in a folder without read permission
    if not (source.startswith("hf:") or os.path.isdir(source) or os.path.isfile(source)):
        raise UserError(
            f"{source}: no such problem file; give a .jsonl, .json, .csv or .parquet file, a "
            "folder of datasets.save_to_disk, hf:OWNER/NAME:SPLIT, or toy:8:2000:1"
        )


def kind_of(name: str | Path) -> tuple[str, bool]:
    """(file ending in small letters, compressed?): X.JSONL.gz -> (".jsonl", True)"""
    base = os.path.basename(name).lower()
    _, dot, ending = base.removesuffix(".gz").rpartition(".")
    return dot + ending if dot else "", base.endswith(".gz")


def why_not(suffix: str, packed: bool) -> str:
    """Why files with this ending are not read, and what to do about it."""
    if suffix in SPREADSHEETS:
        return (
            f"{suffix} files are spreadsheets, which are not read; save the sheet as .csv (UTF-8)"
        )
    if suffix in ARCHIVES:
        return f"{suffix} files are archives, which are not read; unpack it first"
    if packed:
        return f"{suffix or 'this kind'} is not read from inside a .gz file; unpack it first"
    known, kind = ", ".join(READERS), f"files ending in {suffix}" if suffix else "such files"
    return f"{kind} are not read; an ending must say what it is: {known} (or .gz of the first five)"


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------
def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked. Raises UserError if it cannot be read or unpacked."""
    _, packed = kind_of(path)
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error


def read_jsonl(path: Path) -> Rows:
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
                yield f"line {number}", ValueError(f"not JSON in UTF-8 ({error})")


def read_json(path: Path) -> Rows:
    """An array of rows, or one object per line: hub sets call these files .json, too."""
    text = b"".join(read_lines(path))
    try:
        rows = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if text.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{" and "Extra data" in str(error):
            yield from read_jsonl(path)
            return
        raise UserError(f"{path}: not JSON in UTF-8 ({first_line(error)})") from error
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: not an array of problems; a file with one object a line must end in .jsonl"
        )
    yield from ((f"entry {i}", row) for i, row in enumerate(rows))


def read_csv(path: Path) -> Rows:
    """Rows of text cells, each with its first line: a cell in quotes may have several lines."""
    texts = decoded_lines(path)
    header = next(texts, "")
    by_count = max(",;\t", key=header.count)  # Excel writes semicolons where the comma is decimal
    delimiter = "\t" if kind_of(path)[0] == ".tsv" else by_count
    csv.field_size_limit((1 << 31) - 1)  # the default, 128 KiB, is less than some worked answers
    reader = csv.reader(itertools.chain([header], texts), delimiter=delimiter, strict=True)
    names: list[str] = []
    start = 1
    try:
        for cells in reader:
            place, start = f"line {start}", reader.line_num + 1
            if not cells:  # an empty line
                continue
            if not names:
                names = [name.strip() for name in cells]
                if twice := {name for name in names if names.count(name) > 1}:
                    raise UserError(f"{path}: two columns are called {min(twice)!r}")
            elif len(cells) == len(names):
                yield place, dict(zip(names, cells, strict=True))
            else:
                yield (
                    place,
                    ValueError(
                        f"{len(cells)} cells where the header has {len(names)} (a cell with a comma"
                        " needs quotes)"
                    ),
                )
    except csv.Error as error:
        what = str(error).replace("\t", "\\t")
        raise UserError(
            f"{path}, line {start}: not CSV ({what}); is a quote left open or not doubled?"
        ) from error


def decoded_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(read_lines(path), 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            message = f"{path}, line {number}: not UTF-8 ({error}); save it as CSV in UTF-8"
            raise UserError(message) from error


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------
def read_table(path: Path, first: int = 0) -> Rows:
    """Rows of a parquet file, or an arrow file of any kind; `first`: number of the first row."""
    import pyarrow  # here, because few users need it
    import pyarrow.feather
    import pyarrow.parquet

    kind = "parquet" if kind_of(path)[0] == ".parquet" else "arrow"
    number = itertools.count(first)
    try:
        with path.open("rb") as file:
            start = file.read(6)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    try:
        if kind == "parquet":
            table = pyarrow.parquet.read_table(path)
        elif start == b"ARROW1":
            table = pyarrow.feather.read_table(path)
        else:  # a stream; `datasets` writes these
            with pyarrow.OSFile(str(path)) as stream:
                table = pyarrow.ipc.open_stream(stream).read_all()
        table.validate(full=True)  # arrow does not check: a damaged file could crash the process
        if table.num_rows > 8 * (size := path.stat().st_size):
            raise ValueError(f"it claims {table.num_rows} rows in {size} bytes")
        for batch in table.to_batches():  # as Python objects, rows take many times the memory
            yield from ((f"row {next(number)}", row) for row in batch.to_pylist())
    except Exception as error:  # pyarrow raises a dozen types for a broken file
        raise UserError(f"{path}: not a readable {kind} file ({first_line(error)})") from error


def read_saved_folder(folder: Path) -> Rows:
    """A folder of datasets.save_to_disk: state.json, which lists arrow files."""
    if os.path.isfile(folder / "dataset_dict.json"):  # Path.is_file may raise
        many = "|".join(sorted(state.parent.name for state in folder.glob("*/state.json")))
        raise UserError(f"{folder}: holds several splits; give one: {folder}/{many}")
    if not os.path.isfile(folder / "state.json"):
        raise UserError(f"{folder}: no such problem file; it is a folder, but not of save_to_disk")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [file["filename"] for file in state["_data_files"]]
        # only files in the same folder: we do not know who wrote state.json
        if not all(name == os.path.basename(name) for name in names):
            raise ValueError("it names files elsewhere")
        if state.get("_indices_data_files"):
            raise ValueError("its rows are given by indices; save it again after flatten_indices()")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/state.json: cannot be used ({first_line(error)})") from error
    first = 0
    for name in names:
        for place, row in read_table(folder / name, first):
            yield place, row
            first += 1


def read_hub(source: str) -> Rows:
    """hf:OWNER/NAME:SPLIT or hf:OWNER/NAME:CONFIGURATION:SPLIT through the package `datasets`."""
    name, *rest = source.removeprefix("hf:").split(":")
    if not name or len(rest) not in (1, 2) or not all(rest):
        raise UserError(f"{source}: write hf:OWNER/NAME:SPLIT or hf:OWNER/NAME:CONFIGURATION:SPLIT")
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source}: needs the package datasets; install it with: pip install datasets"
        ) from error
    try:
        datasets.disable_progress_bars()
        found = datasets.load_dataset(name, *rest[:-1], split=rest[-1])
        yield from ((f"row {i}", row) for i, row in enumerate(found))
    except Exception as error:  # no such set or split, no network, or the set is a script
        raise UserError(f"{source}: cannot be loaded ({first_line(error)})") from error


READERS = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_table,
    ".arrow": read_table,
    ".feather": read_table,
    ".ipc": read_table,
}
