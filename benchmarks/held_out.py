"""Set a tenth of the training images aside, so that schedules are chosen without the test set.

Every arm on it, the dense start included, is trained on the other nine tenths: a net that has seen the
images it is judged by says nothing.
"""

from pathlib import Path

import numpy
import pyarrow
from pyarrow import parquet

from .arms import CIFAR, HELD_OUT

__all__ = ["write_held_out"]


def write_held_out() -> None:
    """Write train.parquet and test.parquet for the arms on ``HELD_OUT``, unless they are there."""
    source, folder = (Path(spec.removeprefix("parquet:")) for spec in (CIFAR, HELD_OUT))
    if (folder / "test.parquet").is_file():
        return
    table = pyarrow.concat_tables([parquet.read_table(f) for f in sorted(source.glob("train*"))])
    order = numpy.random.default_rng(0).permutation(table.num_rows)
    aside = table.num_rows // 10
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table.take(numpy.sort(order[aside:])), folder / "train.parquet")
    parquet.write_table(table.take(numpy.sort(order[:aside])), folder / "test.parquet")
