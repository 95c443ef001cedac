"""Parquet files in the hub's layout: columns ``image`` (struct of bytes and path) and ``label``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resconv.data.images import EncodedImage, decode_all, probe
from resconv.data.splits import NO_VAL_HINT, Source, Split
from resconv.errors import DataError, MissingExtraError

__all__ = ["ParquetSource", "find_parquet"]

_MAX_BYTES = 8 * 1024**3
_VAL_PATTERNS = ("val*.parquet", "test*.parquet")  # the first that matches


@dataclass(frozen=True)
class ParquetSource:
    """Two undecoded splits (``val`` where it was asked for) and what their images are."""

    train: Source
    val: Source | None
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    example: str


@dataclass(frozen=True)
class _Rows:
    """One split as read: its encoded images, labels and declared class names."""

    images: list[EncodedImage]
    labels: Tensor
    class_names: tuple[str, ...] | None


def find_parquet(
    path: Path, *, image_size: int | None, channels: int | None, needs_val: bool
) -> ParquetSource:
    """Read ``train*.parquet`` and ``val*.parquet`` or else ``test*.parquet``, of ``path`` or data/.

    Raises:
        DataError: missing files or columns, a label outside the classes, rows without bytes.
    """
    if not path.is_dir():
        raise DataError(
            f"There is no folder {path}. 'parquet:' takes the folder that holds train*.parquet."
        )
    train = _read_rows(_find_files(path, ("train*.parquet",), needs_val), None)
    names = train.class_names or tuple(str(i) for i in range(int(train.labels.max()) + 1))
    val = None
    if needs_val:
        val = _read_rows(_find_files(path, _VAL_PATTERNS, needs_val), names)
    found = probe(train.images)
    channels, image_size = channels or found.channels, image_size or found.image_size

    def make_source(rows: _Rows) -> Source:
        def read(chosen: Tensor) -> Split:
            encoded = [rows.images[row] for row in chosen.tolist()]
            return Split(decode_all(encoded, channels, image_size), rows.labels[chosen])

        return Source(rows.labels, read)

    return ParquetSource(
        train=make_source(train),
        val=make_source(val) if val else None,
        class_names=names,
        channels=channels,
        image_size=image_size,
        example=train.images[0].place,
    )


def _find_files(path: Path, patterns: tuple[str, ...], needs_val: bool) -> list[Path]:
    for folder in (path, path / "data"):
        for pattern in patterns:
            if files := sorted(folder.glob(pattern)):
                return files
    found = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    hint = NO_VAL_HINT if patterns is _VAL_PATTERNS else ""
    raise DataError(f"{path} has no {' or '.join(patterns)} (it holds: {found}).{hint}")


def _read_rows(files: list[Path], expected: tuple[str, ...] | None) -> _Rows:
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "train", "Reading parquet files") from error
    num_bytes = sum(file.stat().st_size for file in files)
    if num_bytes > _MAX_BYTES:
        raise DataError(
            f"{files[0].parent}: {len(files)} files of {num_bytes / 1024**3:.1f} GiB together; up "
            f"to {_MAX_BYTES // 1024**3} GiB are read into memory. Unpack them into image folders "
            "and use folder:PATH, which decodes lazily."
        )
    images: list[EncodedImage] = []
    labels: list[Tensor] = []
    names = expected
    for file in files:
        try:
            schema = pq.read_schema(file)
            _check_columns(file, schema)
            table = pq.read_table(file, columns=["image", "label"])
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{file} is not a readable parquet file ({error}). Download it again."
            ) from error
        own_names = _read_class_names(schema)
        if names and own_names and own_names != names:
            raise DataError(
                f"{file} declares other classes ({', '.join(own_names[:8])}) than the files read "
                f"before ({', '.join(names[:8])}). Keep files of one dataset in a folder."
            )
        names = names or own_names
        labels.append(_read_labels(file, table["label"], names))
        for row, content in enumerate(pc.struct_field(table["image"], "bytes").to_pylist()):
            if content is None:
                raise DataError(
                    f"Row {row} of {file} has no image bytes. Only images embedded in the file "
                    "are read: save the dataset with its images embedded."
                )
            images.append(EncodedImage(f"Row {row} of {file}", content))
    if not images:
        raise DataError(f"{', '.join(map(str, files[:3]))}: no rows. Download the files again.")
    return _Rows(images, torch.cat(labels), names)


def _check_columns(file: Path, schema: Any) -> None:
    import pyarrow as pa

    missing = [name for name in ("image", "label") if name not in schema.names]
    if missing:
        raise DataError(
            f"{file} has no column {' and no column '.join(map(repr, missing))} (it has: "
            f"{', '.join(schema.names)}). Rename its columns to 'image' and 'label'."
        )
    image = schema.field("image").type
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise DataError(
            f"{file}: column 'image' is {image}, needed is struct<bytes: binary, path: string>, "
            "as the hub saves image sets."
        )
    label = schema.field("label").type
    if not pa.types.is_integer(label):
        raise DataError(
            f"{file}: column 'label' is {label}, needed are integers from 0 (a class's number)."
        )


def _read_class_names(schema: Any) -> tuple[str, ...] | None:
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(str(name) for name in metadata["info"]["features"]["label"]["names"]) or None
    except (KeyError, TypeError, ValueError):
        return None  # written by another tool: the classes are then numbers


def _read_labels(file: Path, column: Any, names: tuple[str, ...] | None) -> Tensor:
    values = [-1 if value is None else value for value in column.to_pylist()]
    labels = torch.tensor(values, dtype=torch.int64)
    wrong = labels < 0 if names is None else (labels < 0) | (labels >= len(names))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        allowed = f"0 to {len(names) - 1} ({len(names)} classes)" if names else "0 and up"
        raise DataError(
            f"Row {row} of {file} has the label {column[row]}, allowed are {allowed}; "
            f"{int(wrong.sum()):,} of {len(labels):,} rows are outside. Correct or drop them."
        )
    return labels
