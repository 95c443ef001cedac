"""Images from strangers: listed once, seen upright, opened as images alone, named when damaged."""

import io
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from resconv import data
from resconv.data.images import EncodedImage, Form, decode
from resconv.errors import DataError


def photo(colour=(200, 30, 30), size=(16, 16), kind="PNG", **more):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind, **more)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(3):
                (folder / split / label / f"{i}.png").write_bytes(photo((i, 30, 30)))
    return folder


def load(folder, **more):
    return data.load(f"folder:{folder}", **more)


def count(folder):
    loaded = load(folder)
    return len(loaded.train), loaded.class_names


def test_a_link_that_leads_back_shows_no_image_twice(photos):
    assert count(photos) == (6, ("cat", "dog"))
    cat = photos / "train" / "cat"
    for name, target in (
        ("self", cat),
        ("up", photos / "train"),
        ("other", photos / "train" / "dog"),
    ):
        (cat / name).symlink_to(target)
    assert count(photos) == (6, ("cat", "dog"))
    more = photos.parent / "more"  # control: a link that leads to other images is followed
    more.mkdir()
    (more / "9.png").write_bytes(photo())
    (cat / "more").symlink_to(more)
    assert count(photos) == (7, ("cat", "dog"))


def test_a_class_may_be_a_link(photos):
    (photos / "elsewhere").mkdir()
    (photos / "train" / "dog").rename(photos / "elsewhere" / "dog")
    (photos / "train" / "dog").symlink_to(photos / "elsewhere" / "dog")
    assert count(photos) == (6, ("cat", "dog"))


def test_what_notebooks_and_file_managers_leave_is_no_class(photos):
    for split in ("train", "val"):
        for name in (".ipynb_checkpoints", ".thumbnails", "__MACOSX"):
            (photos / split / name).mkdir()
    (photos / "train" / "cat" / "._0.png").write_bytes(b"no image")
    (photos / "train" / "cat" / ".hidden").mkdir()
    (photos / "train" / "cat" / ".hidden" / "0.png").write_bytes(photo())
    assert count(photos) == (6, ("cat", "dog"))
    for split in ("train", "val"):
        (photos / split / "emu").mkdir()
        (photos / split / "emu" / "0.png").write_bytes(photo())
    assert count(photos) == (7, ("cat", "dog", "emu"))  # control: a visible one is


def test_a_pipe_is_no_image(photos):
    os.mkfifo(photos / "train" / "cat" / "pipe.png")
    os.symlink("nowhere", photos / "train" / "cat" / "gone.png")
    assert count(photos)[0] == 6
    with pytest.raises(DataError, match=r"pipe\.png is not a readable image .*no file"):
        decode(EncodedImage("pipe.png", photos / "train" / "cat" / "pipe.png"), Form(16))


def test_the_endings_that_are_read_are_named(photos):
    for file in (photos / "train" / "dog").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(
        DataError, match=r"no image in 'dog' \(dog/ holds: 3 of \.heic\). Read are \.jpg, "
    ):
        load(photos)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_seen_as_it_was_held(kind, orientation):
    """Black above, one white corner; PIL's own transposition of the same file is what is right."""
    from PIL import ImageOps

    picture = Image.new("RGB", (32, 32))
    picture.paste((255, 255, 255), (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, kind, exif=exif)
    seen = decode(EncodedImage("x", buffer.getvalue()), Form(32))
    with Image.open(buffer) as opened:
        opened.load()
        right = ImageOps.exif_transpose(opened)
        expected = torch.tensor(list(right.convert("L").tobytes())).view(32, 32)
    assert (seen[0].int() - expected).abs().max() <= 8
    plain = decode(EncodedImage("x", photo_of(picture)), Form(32))
    assert (orientation == 1) == bool((seen[0].int() - plain[0].int()).abs().max() <= 8)


def photo_of(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA", "DDS"])
def test_only_named_formats_are_opened_whatever_a_file_is_called(photos, kind):
    (photos / "train" / "cat" / "0.png").write_bytes(photo(kind=kind))
    with pytest.raises(DataError, match=r"cat/0\.png is not a readable image .*Read are JPEG, PNG"):
        load(photos)
    (photos / "train" / "cat" / "0.png").write_bytes(photo(kind="WEBP"))  # control
    assert count(photos)[0] == 6


def test_no_program_is_started_for_an_image(photos):
    """EPS in a .png would start Ghostscript, were it there; the attempt alone would be seen."""
    file = photos / "train" / "cat" / "0.png"
    code = (
        "import sys, io\n"
        "from PIL import Image\n"
        "from resconv import data\n"
        "started = []\n"
        "sys.addaudithook(lambda e, a: started.append(a) if e == 'subprocess.Popen' else None)\n"
        "try: data.load(f'folder:{sys.argv[1]}')\n"
        "except Exception as error: print(type(error).__name__)\n"
        "mine = len(started)\n"
        "from PIL import EpsImagePlugin\n"
        "EpsImagePlugin.gs_binary = 'true'\n"
        "try: Image.open(sys.argv[2]).load()\n"
        "except Exception: pass\n"
        "print(mine, len(started))\n"
    )
    file.write_bytes(photo(kind="EPS"))
    done = subprocess.run(
        [sys.executable, "-c", code, str(photos), str(file)], capture_output=True, text=True
    )
    assert done.stdout.split()[:2] == ["DataError", "0"], done.stderr
    assert int(done.stdout.split()[2]) >= 1  # control: Pillow by itself does


@pytest.mark.parametrize("cut", [0, 10, 40, 55])
def test_a_damaged_image_is_named(photos, cut):
    file = photos / "train" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"dog/1\.png is not a readable image"):
        load(photos)


def test_an_image_of_more_pixels_than_any_camera_is_not_decoded():
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    with pytest.raises(DataError, match="10,000 x 10,000 pixels; up to 67,108,864 are read"):
        decode(EncodedImage("large", buffer.getvalue()), Form(16, channel_order="L"))


def test_control_characters_in_a_name_do_not_reach_the_terminal(photos):
    for split in ("train", "val"):
        (photos / split / "\x1b[2Jcat").mkdir()
    with pytest.raises(DataError) as error:
        load(photos)
    assert "\x1b" not in str(error.value)
    assert r"\x1b[2Jcat" in str(error.value)


def write(folder, columns, names=("image", "label"), metadata=None):
    folder.mkdir(exist_ok=True)
    table = pa.table(list(columns), names=list(names))
    if metadata is not None:
        table = table.replace_schema_metadata({b"huggingface": metadata})
    for split in ("train", "val"):
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def images(count=4, kind=None, value=None):
    kind = kind or pa.binary()
    content = photo() if value is None else value
    rows = [{"bytes": content, "path": None}] * count
    return pa.array(rows, pa.struct([("bytes", kind), ("path", pa.string())]))


def labels(*values, kind=None):
    return pa.array(values, kind or pa.int64())


GOOD = (0, 1, 0, 1)
TABLES = {
    r"column 'image' is struct<bytes: string": (
        [images(kind=pa.string(), value="/etc/passwd"), labels(*GOOD)],
    ),
    r"Row 3 of .* has the label 18446744073709551615": (
        [images(), labels(0, 1, 0, 2**64 - 1, kind=pa.uint64())],
    ),
    r"labels up to 100,000,000 for 4 images": ([images(), labels(0, 1, 0, 10**8)],),
    r"Row 2 of .* has no label": ([images(), labels(0, 1, None, 1)],),
    r"Row 1 of .* has the label -1": ([images(), labels(0, -1, 0, 1)],),
    r"has 2 columns 'label' \(it has: image, label, label\)": (
        [images(), labels(*GOOD), labels(*GOOD)],
        ("image", "label", "label"),
    ),
    r"has no column 'label'": ([images(), labels(*GOOD)], ("image", "class")),
    r"column 'label' is string": ([images(), labels(*"abab", kind=pa.string())],),
    r"Row 0 of .*train\.parquet is not a readable image": (
        [images(value=b"no image"), labels(*GOOD)],
    ),
    r"declares the class 'a' twice": (
        [images(), labels(*GOOD)],
        ("image", "label"),
        b'{"info": {"features": {"label": {"names": ["a", "a"]}}}}',
    ),
}


@pytest.mark.parametrize("message", TABLES)
def test_a_table_that_cannot_be_right_is_named(message, tmp_path):
    with pytest.raises(DataError, match=message):
        data.load(f"parquet:{write(tmp_path / 'table', *TABLES[message])}")


def test_a_good_table_is_read(tmp_path):
    """The control of those above, with other integers and larger binaries."""
    names = b'{"info": {"features": {"label": {"names": ["cat", "dog"]}}}}'
    columns = [images(kind=pa.large_binary()), labels(*GOOD, kind=pa.uint64())]
    loaded = data.load(f"parquet:{write(tmp_path / 'table', columns, metadata=names)}")
    assert loaded.class_names == ("cat", "dog")
    assert loaded.train.labels.tolist() == list(GOOD)


def test_a_table_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path):
    large = photo() + bytes(2**24)
    rows = images(40, value=large)
    with pytest.raises(DataError, match="unpacks to far more than it is"):
        data.load(f"parquet:{write(tmp_path / 'table', [rows, labels(*GOOD * 10)])}")


def test_the_statistics_of_lazy_images_are_those_of_all_at_once(photos, monkeypatch):
    whole = load(photos)
    monkeypatch.setattr("resconv.data.datasets.MAX_MEMORY", 0)
    lazy = load(photos)
    assert isinstance(lazy.train, data.LazySplit)
    assert isinstance(whole.train, data.Split)
    assert lazy.mean == pytest.approx(whole.mean, abs=1e-12)
    assert lazy.std == pytest.approx(whole.std, abs=1e-12)
