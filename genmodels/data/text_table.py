"""Tables of numbers in text files (.csv, .tsv, .txt), with errors that name line and column."""

import csv
import re
import warnings
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np

from ..registry import ConfigError

DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": " "}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
OTHERS = {",": "','", ";": "';'", "\t": "a tab", " ": "a space", "|": "'|'"}


class TextTable:
    """A text file of rows of numbers: UTF-8, with or without header, blank lines ignored.

    Fields may be quoted ("1.5") and surrounded by spaces. The separator " " stands for any run of spaces and tabs.

    Attributes:
        title: how errors call it.
        names: of the columns, None without a header.
        width: number of columns.
    Args:
        path: file.
        delimiter: one character between fields; None for that of the suffix (`DELIMITERS`).
        header: whether the first line names the columns; None to find out: it does if none of its fields is a number.
    Raises:
        ConfigError: if the file holds no row, is not UTF-8, or if its first line leaves open whether it is a header.
    """

    def __init__(self, path: Path, delimiter: str | None = None, header: bool | None = None) -> None:
        self.path, self.title = path, str(path)
        self.delimiter = DELIMITERS[path.suffix.lower()] if delimiter is None else delimiter
        if len(self.delimiter) != 1 or self.delimiter in "\"'\r\n+-." or self.delimiter.isalnum():
            raise ConfigError(
                f"data.delimiter: one character that stands in no number is needed, found {self.delimiter!r}."
            )
        self.skip, self.names = 0, None
        records = self._records()
        number, first = next(records, (0, []))
        if not number:
            raise ConfigError(f"{path} is empty: it has {path.stat().st_size:,} bytes and no line with a number.")
        if self._is_header(first, number) if header is None else header:
            # numpy.savetxt writes its header as a comment: "# a,b" or "# a b"
            first = first[1:] if first[0] == "#" else [first[0].removeprefix("#"), *first[1:]]
            self.names = [field.strip() for field in first]
            if next(records, None) is None:
                raise ConfigError(f"{path} is empty: line {number} is its header, and no row follows.")
            self.skip = number
        self.width = len(first)

    def read(self, columns: list[int]) -> np.ndarray:
        """[N, len(columns)] float64: the chosen columns; the others may hold text.

        Raises:
            ConfigError: naming line and column of the first missing value, text or ragged row.
        """
        found = self._fast(columns)
        return self._careful(columns) if found is None else found

    def place(self, row: int) -> str:
        """Where an editor shows a row (counted from 0)."""
        for k, (number, _) in enumerate(self._rows()):
            if k == row:
                return f"line {number}"
        raise IndexError(f"{self.path} has no row {row}.")

    def label(self, column: int) -> str:
        """How to speak of a column."""
        name = self.names[column] if self.names and column < len(self.names) else ""
        return f"column '{name}'" if name else f"column {column} (counted from 0)"

    def _open(self) -> TextIO:
        return self.path.open(encoding="utf-8-sig", newline="")

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """(line it begins on, fields) of every line that is not blank."""
        with self._open() as file:
            try:
                if self.delimiter == " ":
                    yield from ((k, line.split()) for k, line in enumerate(file, 1) if line.strip())
                    return
                reader, begins = csv.reader(file, delimiter=self.delimiter, skipinitialspace=True), 1
                for fields in reader:
                    if len(fields) > 1 or any(map(str.strip, fields)):
                        yield begins, fields
                    begins = reader.line_num + 1
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{self.path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
                ) from None
            except csv.Error as error:
                raise ConfigError(
                    f"{self.path}, line {begins}: {error}. Look for a quotation mark that is not closed."
                ) from None

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        return ((number, fields) for number, fields in self._records() if number > self.skip)

    def _is_header(self, fields: list[str], number: int) -> bool:
        some = [field.strip() for field in fields if field.strip()]
        numbers = [field for field in some if NUMBER.fullmatch(field)]
        if numbers and len(numbers) < len(some):
            text = next(field for field in some if field not in numbers)
            raise ConfigError(
                f"{self.path}, line {number} holds the number {numbers[0]} and the text {text!r}: it is not clear "
                "whether it names the columns. Say data.header=true or data.header=false."
            )
        return bool(some) and not numbers

    def _fast(self, columns: list[int]) -> np.ndarray | None:
        """NumPy's own reader, or None where it fails or might split a line otherwise than `_records`."""
        whole = columns == list(range(self.width))
        blank = self.delimiter == " "
        if not whole and not self._is_regular():
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = np.loadtxt(
                    str(self.path.absolute()),
                    comments=None,
                    delimiter=None if blank else self.delimiter,
                    skiprows=self.skip,
                    usecols=None if whole else columns,
                    ndmin=2,
                    encoding="utf-8-sig",
                    quotechar=None if blank else '"',
                )
        except (ValueError, Warning):
            return None
        return found if found.shape[1] == len(columns) else None

    def _is_regular(self) -> bool:
        """Whether every line has as many fields as the first one, split as NumPy does."""
        with self._open() as file:
            try:
                rows = map(str.split, file) if self.delimiter == " " else csv.reader(file, delimiter=self.delimiter)
                return set(map(len, rows)) <= {0, self.width}
            except (csv.Error, UnicodeDecodeError):
                return False

    def _careful(self, columns: list[int]) -> np.ndarray:
        """As `read`, line by line."""
        values = array("d")
        for number, fields in self._rows():
            if len(fields) != self.width:
                self._ragged(number, fields)
            for column in columns:
                field = fields[column].strip()
                if not NUMBER.fullmatch(field):
                    self._no_number(number, column, field)
                values.append(float(field))
        return np.frombuffer(values, dtype=np.float64).reshape(-1, len(columns))

    def _ragged(self, number: int, fields: list[str]) -> NoReturn:
        before = "the header has" if self.names else "the first line has"
        mend = " Correct the line, or delete it."
        if self.names and self.width == 1:
            mend = f" If the first line ({self.names[0]!r}) is a remark and no header, delete it."
        advice = self._hint(fields) or mend
        raise ConfigError(f"{self.path}, line {number} has {_count(len(fields))}, but {before} {self.width}.{advice}")

    def _no_number(self, number: int, column: int, field: str) -> NoReturn:
        where = f"{self.path}, line {number}, {self.label(column)}"
        mend = "delete the row, or leave the column out with data.columns."
        if not field:
            raise ConfigError(f"{where}: the value is missing. Fill it in, {mend}")
        text = field if len(field) <= 40 else f"{field[:40]}…"
        commas = " Write decimals with a point, and thousands without a comma."
        decimal = commas if re.fullmatch(r"[+-]?\d+(,\d+)+(\.\d+)?", field) else ""
        advice = self._hint([field]) or f"{decimal} Correct it, {mend}"
        raise ConfigError(f"{where}: {text!r} is no number.{advice}")

    def _hint(self, fields: list[str]) -> str:
        """Another delimiter that the whole line seems to use."""
        head = (self.names or [""])[0].replace(" ", "")  # a name may hold a space
        seen = [name for mark, name in OTHERS.items() if self.width == 1 and mark in head + fields[0].strip()]
        return f" Set data.delimiter if {seen[0]} separates the columns." if seen else ""


def _count(n: int) -> str:
    return f"{n} field{'' if n == 1 else 's'}"
