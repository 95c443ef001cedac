"""Parquet files in the hub's layout: columns ``image`` (struct of bytes and path) and ``label``.

The reader is our own, on pyarrow: the hub's ``datasets`` writes every set a second time, as Arrow files in its cache,
and says of a damaged or odd one that "an error occurred", where here the file, the row and the column are named.
"""

from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from resconv.data.images import EncodedImage
from resconv.data.splits import NO_VAL_HINT, Listed
from resconv.errors import DataError, MissingExtraError
from resconv.json_files import parse_json

__all__ = ["find_parquet", "numbered"]

_MAX_BYTES = 8 * 1024**3
_BATCH = 512  # rows that are unpacked at a time
# Images are packed already: what a file unpacks to is about its own size.
_LEAST, _RATIO = 256 * 1024**2, 16
_MAX_LABEL = 2**31
_VAL_PATTERNS = ("val*.parquet", "test*.parquet")  # the first that matches


def find_parquet(path: Path, *, needs_val: bool) -> tuple[Listed, Listed | None, tuple[str, ...]]:
    """Read ``train*.parquet`` and ``val*.parquet`` or else ``test*.parquet``, of ``path`` or data/.

    Returns:
        The images of train, of val where it is needed, and the classes.

    Raises:
        DataError: missing files or columns, a label outside the classes, rows without bytes.
    """
    if not path.is_dir():
        raise DataError(
            f"There is no folder {path}. 'parquet:' takes the folder that holds train*.parquet."
        )
    train, names = _read_rows(_find_files(path, ("train*.parquet",), needs_val), None)
    names = names or numbered(str(path), train.labels)
    val = None
    if needs_val:
        val, _ = _read_rows(_find_files(path, _VAL_PATTERNS, needs_val), names)
    return train, val, names


def numbered(place: str, labels: Tensor) -> tuple[str, ...]:
    """Return numbers as the names of classes that nothing declares."""
    count = int(labels.max()) + 1
    if count > len(labels):
        raise DataError(
            f"{place} has labels up to {count - 1:,} for {len(labels):,} images, and declares no class "
            "names: most classes would have no image. Number the classes from 0 without gaps."
        )
    return tuple(str(i) for i in range(count))


def _find_files(path: Path, patterns: tuple[str, ...], needs_val: bool) -> list[Path]:
    for folder in (path, path / "data"):
        for pattern in patterns:
            if files := sorted(folder.glob(pattern)):
                return files
    found = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    hint = NO_VAL_HINT if patterns is _VAL_PATTERNS else ""
    raise DataError(f"{path} has no {' or '.join(patterns)} (it holds: {found}).{hint}")


def _read_rows(
    files: list[Path], expected: tuple[str, ...] | None
) -> tuple[Listed, tuple[str, ...] | None]:
    try:
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
    left = min(_MAX_BYTES, _LEAST + _RATIO * num_bytes)
    for file in files:
        try:
            opened = pq.ParquetFile(file)
            schema = opened.schema_arrow
            _check_columns(file, schema)
            own_names = _read_class_names(file, schema)
            if names and own_names and own_names != names:
                raise DataError(
                    f"{file} declares other classes ({', '.join(own_names[:8])}) than the files "
                    f"read before ({', '.join(names[:8])}). Keep files of one dataset in a folder."
                )
            names = names or own_names
            for part in opened.iter_batches(_BATCH, columns=["image", "label"]):
                first = len(images)
                labels.append(_read_labels(file, part.column(1), names, first))
                contents = pc.struct_field(part.column(0), "bytes").to_pylist()
                images += _encoded(file, contents, first)
                left -= sum(map(len, contents))
                if left < 0:
                    raise DataError(
                        f"{file} unpacks to far more than it is ({file.stat().st_size:,} bytes): no "
                        "images do. Save them encoded, as JPEG or PNG."
                    )
        except DataError:
            raise
        except Exception as error:  # pyarrow has many for a damaged file
            raise DataError(
                f"{file} is not a readable parquet file ({type(error).__name__}: "
                f"{str(error)[:200]}). Download it again."
            ) from error
    if not images:
        raise DataError(f"{', '.join(map(str, files[:3]))}: no rows. Download the files again.")
    return Listed(images, torch.cat(labels)), names


def _encoded(file: Path, contents: list[bytes | None], first: int) -> list[EncodedImage]:
    for row, content in enumerate(contents, first):
        if content is None:
            raise DataError(
                f"Row {row} of {file} has no image bytes. Only images embedded in the file are "
                "read: save the dataset with its images embedded."
            )
    return [
        EncodedImage(f"Row {row} of {file}", content)
        for row, content in enumerate(contents, first)
        if content is not None
    ]


def _check_columns(file: Path, schema: Any) -> None:
    import pyarrow as pa

    for name in ("image", "label"):
        if schema.names.count(name) != 1:
            found = ", ".join(schema.names[:12])
            raise DataError(
                f"{file} has {schema.names.count(name) or 'no'} column{'s' * (name in schema.names)} "
                f"{name!r} (it has: {found}). Give it one column 'image' and one 'label'."
            )
    image = schema.field("image").type
    inner = [image.field(i) for i in range(image.num_fields)] if pa.types.is_struct(image) else []
    kinds = [field.type for field in inner if field.name == "bytes"]
    # Text in their place would be a path, and not the file's to name.
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    if len(kinds) != 1 or not any(is_kind(kinds[0]) for is_kind in binary):
        raise DataError(
            f"{file}: column 'image' is {str(image)[:120]}, needed is struct<bytes: binary, path: "
            "string>, as the hub saves image sets."
        )
    label = schema.field("label").type
    if not pa.types.is_integer(label):
        raise DataError(
            f"{file}: column 'label' is {str(label)[:120]}, needed are integers from 0 (a class's "
            "number)."
        )


class _Label(TypedDict):
    names: list[str]


class _Features(TypedDict):
    label: _Label


class _Info(TypedDict):
    features: _Features


class _Metadata(TypedDict):
    info: _Info


def _read_class_names(file: Path, schema: Any) -> tuple[str, ...] | None:
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None  # written by another tool: the classes are then numbers
    try:
        metadata = parse_json(text, _Metadata, str(file), DataError)
    except DataError:
        return None  # labels without declared names
    names = tuple(metadata["info"]["features"]["label"]["names"])
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{file} declares the class {twice[:60]!r} twice. Give each one name.")
    return names or None


def _read_labels(file: Path, column: Any, names: tuple[str, ...] | None, first: int) -> Tensor:
    values = column.to_pylist()
    most = len(names) if names else _MAX_LABEL
    wrong = [i for i, v in enumerate(values) if v is None or not 0 <= v < most]
    if wrong:
        allowed = f"0 to {len(names) - 1} ({len(names)} classes)" if names else "0 and up"
        found = "no label" if values[wrong[0]] is None else f"the label {values[wrong[0]]}"
        raise DataError(
            f"Row {first + wrong[0]} of {file} has {found}, allowed are {allowed}; {len(wrong):,} of "
            f"the {len(values):,} rows around it are outside. Correct or drop them."
        )
    return torch.tensor(values, dtype=torch.int64)
