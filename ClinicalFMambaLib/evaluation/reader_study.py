"""A blinded reader study: the model and the best other fusion of the same cases, in random order, for Likert ratings.

Readers get the folder ``reader-study``: a picture for each item and a table to fill in. Which item is which method
stands in ``reader-study-key.csv`` beside it, which stays with the organiser.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import NOTICE
from ..cases import Case
from ..errors import InputError
from ..files import write_text
from ..preview import enlarged, save_sheet
from .evaluate import MODEL, Measured, Row, interval, method_title, patient_means, summarise
from .pictures import Example, make_example
from .report import mean_ranks

# What readers rate from 1 (poor) to 5 (excellent).
QUESTIONS = ("detail of A", "detail of B", "contrast", "freedom from artefacts", "overall")
_KEY = ("item", "patient", "case", "method")
_INSTRUCTIONS = f"""Blinded reading of fused images. {NOTICE}

Each NNN.png shows two registered sources, A and B, and one image fused from them. The same sources come twice, fused by
two methods. Rate each item on its own, in the order of the numbers, in your copy of ratings.csv:

{"".join(f"- {question}: 1 (poor) to 5 (excellent)" + chr(10) for question in QUESTIONS)}
Write your name or number into the column reader. Leave a cell empty where you cannot tell.
"""


class ReaderStudy:
    """Collects cases while they are measured, then writes the items.

    Args:
        cases: all that will be measured; ``count`` of them are drawn, from as many patients as there are.
        sources: names of the two sources.
        out: folder of ``reader-study/`` and ``reader-study-key.csv``.
        seed: of the draw and of the order of the items.

    Raises:
        InputError: there is a study already.
    """

    def __init__(self, cases: Sequence[Case], count: int, sources: Sequence[str], out: Path, seed: int = 0):
        self.folder, self.key = out / "reader-study", out / "reader-study-key.csv"
        if self.folder.exists():
            raise InputError(f"{self.folder} already holds a reader study; choose another folder, or remove it")
        self.sources, self._random = sources, random.Random(seed)
        by_patient: dict[str, list[Case]] = {}
        for case in self._random.sample(list(cases), len(cases)):
            by_patient.setdefault(case.patient, []).append(case)
        queues, chosen = list(by_patient.values()), []
        while len(chosen) < min(count, len(cases)):
            for queue in queues:
                if queue and len(chosen) < count:
                    chosen.append(queue.pop().name)
        self._chosen, self._examples = set(chosen), []

    def keep(self, measured: Measured) -> None:
        """Take what the study shows of one case; for the argument ``keep`` of :func:`.evaluate.evaluate`."""
        if measured.case.name in self._chosen:
            self._examples.append(make_example(measured, self.sources, ""))

    def write(self, rows: Sequence[Row]) -> None:
        """Draw the items of the model and of the fusion that has the best mean rank beside it.

        Raises:
            InputError: no other fusion was measured, or no metric that tells which is the best.
        """
        others = [method for method in mean_ranks(summarise(rows)) if method != MODEL]
        if not others:
            raise InputError("a reader study needs another fusion to compare with, and a metric to choose it by")
        # a case comes once in each half, so that nobody compares its two items side by side
        halves: tuple[list, list] = ([], [])
        for example in self._random.sample(self._examples, len(self._examples)):
            for half, method in zip(halves, self._random.sample([MODEL, others[0]], 2)):
                half.append((example, method))
        items = [*halves[0], *halves[1]]
        self.folder.mkdir()
        names = [f"{number:03d}" for number in range(1, len(items) + 1)]
        for name, (example, method) in zip(names, items):
            self._draw(self.folder / f"{name}.png", name, example, method)
        head = ("item", "reader", *QUESTIONS, "remarks")
        write_text(self.folder / "ratings.csv", _table(head, ((name, *[""] * (len(head) - 1)) for name in names)))
        write_text(self.folder / "instructions.txt", _INSTRUCTIONS)
        key = ((name, example.patient, example.case, method) for name, (example, method) in zip(names, items))
        write_text(self.key, _table(_KEY, key))

    def _draw(self, path: Path, name: str, example: Example, method: str) -> None:
        pictures = [example.pictures[title] for title in (*list(example.pictures)[:2], method)]
        titles = [f"A: {self.sources[0]}", f"B: {self.sources[1]}", "fused"]
        save_sheet(path, [[enlarged(picture) for picture in pictures]], [""], titles, f"Item {name}")


def read_ratings(key: Path, ratings: Sequence[Path]) -> str:
    """Unblind the readers' tables: mean rating of each method, and the paired difference, with intervals over patients.

    A case counts by the mean of its readers, a patient by the mean of its cases.

    Args:
        key: ``reader-study-key.csv``.
        ratings: one filled-in ``ratings.csv`` for each reader.

    Returns:
        A table in Markdown.

    Raises:
        InputError: a table that cannot be read, an item that the key does not know, a rating that is not 1 to 5.
    """
    known = {row["item"]: row for row in _read(key, _KEY)}
    rows, readers = [], set()
    for path in ratings:
        for line in _read(path, ("item", *QUESTIONS)):
            if line["item"] not in known:
                raise InputError(f"{path}: there is no item {line['item']!r} in {key}")
            item = known[line["item"]]
            values = {question: _rating(path, line, question) for question in QUESTIONS}
            rows.append(Row(item["method"], item["patient"], item["case"], values))
        readers.add(str(path))
    methods = list(dict.fromkeys(sorted((row.method for row in rows), key=lambda method: method != MODEL)))
    lines = ["| question | " + " | ".join(method_title(m) for m in methods) + " | difference | 95 % interval |"]
    lines.append("|---" * (len(methods) + 3) + "|")
    for question in QUESTIONS:
        rated = [row for row in rows if not np.isnan(row.values[question])]
        means = [patient_means(rated, method, question) for method in methods]
        both = [patient for patient in means[0] if all(patient in mean for mean in means)]
        cells = [f"{np.mean(list(mean.values())):.2f}" if mean else "" for mean in means]
        differences = np.array([means[0][patient] - means[-1][patient] for patient in both])
        low, high = interval(differences)
        cells.append(f"{differences.mean():+.2f}" if both else "")
        cells.append("too few patients" if np.isnan(low) else f"{low:+.2f} to {high:+.2f}")
        lines.append(f"| {question} | " + " | ".join(cells) + " |")
    patients = len({row.patient for row in rows})
    return "\n".join([f"{len(readers)} readers, {len(known)} items, {patients} patients.", "", *lines, "", NOTICE])


def _table(head: Sequence[str], rows) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, found = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV table ({error}); save it as UTF-8 CSV") from error
    if missing := [name for name in columns if name not in found]:
        raise InputError(f"{path}: the column {missing[0]!r} is missing; use the table that the study came with")
    if not rows:
        raise InputError(f"{path} has no row below its header")
    return rows


def _rating(path: Path, line: dict[str, str], question: str) -> float:
    text = (line[question] or "").strip()
    if not text:
        return np.nan
    if text not in {"1", "2", "3", "4", "5"}:
        raise InputError(f"{path}, item {line['item']}: {question} is {text!r}; it should be 1 to 5, or empty")
    return float(text)
