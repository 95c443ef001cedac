"""What the fuzzing makes: for each kind of file a good one, random changes of it, and its reader."""

import copy
import functools
import io
import json
import math
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

import resconv
from resconv import data, nets
from resconv.analysis.input_spec import make_inputs
from resconv.errors import RunError
from resconv.latency.table import LatencyTable, TimedNet, processor
from resconv.planning.plan import Plan
from resconv.run.config import Config
from resconv.run.folder import RunFolder
from resconv.run.mark import MARK, Record
from resconv.run.metrics import History
from resconv.run.report.table import rows
from resconv.selection.outcome import Snapshot
from resconv.storage.runtimes import open_file
from resconv.storage.schema import read_header, seal
from resconv.train.checkpoints import CHECKPOINT_FILES, LAST, Checkpoints, choose_checkpoint

__all__ = ["CANARY", "KINDS", "Kind"]

CANARY = "canary"  # the folder that code hidden in a file would make
Mutate = Callable[[bytes, random.Random], bytes]
_HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, math.nan, math.inf, "", "x", "\ud800"),
    *("\x1b[2J\x07", "a" * 5000, "../../etc", "1", [], {}, [[]], [None], {"a": 1}, [1e9] * 3),
)
_NUMBERS = (b"\x00" * 8, b"\xff" * 8, b"\x80")
_NUMBERS += (struct.pack("<q", 2**40), struct.pack("<i", 2**31 - 1))


@dataclass(frozen=True)
class Kind:
    """``make`` fills a folder and returns the file that is changed; ``read`` is what a command does.

    ``read`` gets the folder and returns a fault ("" for none) where the file was taken.
    """

    make: Callable[[Path], Path]
    mutate: Mutate
    read: Callable[[Path], str]
    share: int = 1


def any_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to eight random changes."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, end = rng.randrange(len(out) + 1), rng.randrange(len(out) + 1)
        what = rng.randrange(7)
        if what < 3 and at < len(out):
            out[at] = rng.choice((out[at] ^ (1 << rng.randrange(8)), 0, 255, rng.randrange(256)))
        elif what == 3:
            number = rng.choice(_NUMBERS)
            out[at : at + len(number)] = number
        elif what == 4:
            del out[at : at + min(64, abs(end - at))]
        elif what == 5:
            out[at:at] = out[end : end + rng.randrange(256)]
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def any_json(content: bytes, rng: random.Random) -> bytes:
    """Return JSON with one to four values or keys changed, or a file that is none."""
    if rng.random() < 0.2:
        return any_bytes(content, rng)
    if rng.random() < 0.03:
        deep = rng.choice((20, 2000, 200_000))
        return b"[" * deep + b"]" * deep
    tree = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = []
        todo = [tree]
        while todo:
            inner = todo.pop()
            keys = inner if isinstance(inner, dict) else range(len(inner))
            places += [(inner, k) for k in keys]
            todo += [inner[k] for k in keys if isinstance(inner[k], dict | list)]
        if not places:
            return json.dumps(rng.choice(_HOSTILE)).encode("utf-8", "surrogatepass")
        holder, key = rng.choice(places)
        value, what = copy.deepcopy(rng.choice(_HOSTILE)), rng.randrange(6)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[rng.choice(("unknown", "\ud800", "", "\x1b[2J"))] = holder[key]
        elif what == 2 and isinstance(holder[key], int | float):
            holder[key] = holder[key] * rng.choice((-1, 0, 2, 1000, 10**9))
        else:
            holder[key] = value
    return json.dumps(tree).encode()


def sealed_json(content: bytes, rng: random.Random) -> bytes:
    """Change a header; every second one gets its checksum made anew, as an attacker would."""
    changed = any_json(content, rng)
    if rng.random() < 0.5:
        try:
            return json.dumps(seal(json.loads(changed))).encode()
        except (ValueError, AttributeError, TypeError, RecursionError):
            pass
    return changed


def any_safetensors(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return any_bytes(content, rng)
    size = int.from_bytes(content[:8], "little")
    header = any_json(content[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def any_archive(content: bytes, rng: random.Random) -> bytes:
    """Change a torch file: its bytes, one of its entries, how it is packed, or what it would run."""
    what = rng.randrange(8)
    if what < 2:
        return any_bytes(content, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        pickles = [n for n in names if n.endswith((".pkl", ".pt", ".json"))] or names
        chosen = rng.choice(pickles if what < 6 else names)
        for name in names:
            inner = old.read(name)
            if name == chosen:
                run = b"cos\nmkdir\n(S'" + CANARY.encode() + b"'\ntR."
                inner = run if what == 2 else any_bytes(inner, rng)
            new.writestr(name, inner, zipfile.ZIP_DEFLATED if what == 7 else zipfile.ZIP_STORED)
    return out.getvalue()


def any_image(content: bytes, rng: random.Random) -> bytes:
    """Change one of the images of all formats, most of all its start, where the sizes are."""
    kind = rng.choice(("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "EPS", "ICO", "TGA"))
    turned = Image.Exif()
    turned[0x0112] = rng.randrange(10)
    buffer = io.BytesIO()
    extra = {"exif": turned} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    mode = rng.choice(("RGB", "L", "P", "1", "RGBA")) if kind == "PNG" else "RGB"
    Image.open(io.BytesIO(content)).convert(mode).save(buffer, kind, **extra)
    whole = buffer.getvalue()
    start = rng.choice((64, len(whole)))
    return any_bytes(whole[:start], rng) + whole[start:]


def any_table(content: bytes, rng: random.Random) -> bytes:
    """Change a parquet file: its bytes, or the types and values of its columns."""
    if rng.random() < 0.7:
        end = rng.choice((0, len(content) - 800))  # the description stands at the end
        return content[:end] + any_bytes(content[end:], rng)
    kind = rng.choice((pa.int8(), pa.uint64(), pa.int64(), pa.float32(), pa.string()))
    label = rng.choice((0, 1, 2, 127, 10**8, 2**40, 2**64 - 1, -1, None))
    good = pq.read_table(io.BytesIO(content))["image"].to_pylist()[0]["bytes"]
    kinds = ((pa.string(), "/etc/passwd"), (pa.int32(), 7), (pa.list_(pa.int8()), [1]))
    inner, value = rng.choice((*kinds, (pa.binary(), good), (pa.large_binary(), good)))
    try:
        images = pa.array([{"bytes": value}] * 4, pa.struct([("bytes", inner)]))
        labels = pa.array([str(label) if kind == pa.string() else label, *([None] * 3)], kind)
    except (pa.ArrowException, OverflowError, TypeError):
        return any_bytes(content, rng)
    names = rng.choice((["image", "label"], ["image", "image"], ["label", "image"], ["a", "label"]))
    out = io.BytesIO()
    pq.write_table(pa.table([images, labels], names=names), out)
    return out.getvalue()


_GIB_TENSOR = {"shape": [2**28], "dtype": "float32"}
# What a description of a few bytes can ask for: none of it may be made.
LARGE: dict[str, dict[str, Any]] = {
    "four tensors of 1 GiB": {"inputs": {"tuple": [_GIB_TENSOR] * 4}},
    "20,000 edits": {"edits": [{"op": "identity", "path": "conv1"}] * 20_000},
    **{
        what: {"source": {"name": name, "kwargs": kwargs}}
        for what, name, kwargs in (
            ("a window of 96", "timm:swin_tiny_patch4_window7_224", {"window_size": 96}),
            ("a million times as deep", "timm:efficientnet_b0", {"depth_multiplier": 1e6}),
            ("layers without end", "timm:convnext_atto", {"depths": [500] * 4}),
            ("a large net in a small file", "torchvision:vgg16", {}),
            ("a wide net", "timm:vit_tiny_patch16_224", {"embed_dim": 12288}),
            ("large images", "timm:vit_tiny_patch16_224", {"img_size": 16_000}),
        )
    },
}


def large_header(content: bytes, rng: random.Random) -> bytes:
    """Let the description of a saved net ask for much, with a checksum that is right."""
    return json.dumps(seal(json.loads(content) | rng.choice(list(LARGE.values())))).encode()


def large_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Return a header of 99 MB, or one that gives a few bytes a size of terabytes."""
    if rng.random() < 0.5:
        header = b"{" + b" " * (99 * 10**6) + b"}"
        return len(header).to_bytes(8, "little") + header
    size = int.from_bytes(content[:8], "little")
    tree = json.loads(content[8 : 8 + size])
    for entry in tree.values():
        entry["shape"] = [2**40]
    header = json.dumps(tree).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


@functools.cache
def _packed_zeros() -> bytes:
    """Return a torch file of 2 MB with 2 GiB of zeros in it."""
    small, out = io.BytesIO(), io.BytesIO()
    torch.save({"fc.weight": torch.zeros(2**12)}, small)
    with zipfile.ZipFile(small) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as entry:
                if name.endswith("/data/0"):
                    for _ in range(2**7):
                        entry.write(bytes(2**24))
                else:
                    entry.write(old.read(name))
    return out.getvalue()


def large_archive(content: bytes, rng: random.Random) -> bytes:
    """Return a torch file that unpacks to far more than it is, or whose tensors are views without end."""
    if rng.random() < 0.5:
        return _packed_zeros()
    out = io.BytesIO()
    wide = torch.zeros(1).expand(2**33)
    torch.save(dict.fromkeys(torch.load(io.BytesIO(content), weights_only=True), wide), out)
    return out.getvalue()


def _net() -> Any:
    torch.manual_seed(0)
    return nets.create("resnet20", num_classes=4).eval()


_X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _compact() -> Any:
    gated = resconv.convert(_net(), _X)
    chosen = list(resconv.gates(gated))[2:5]
    with torch.no_grad():
        for name in chosen:
            gate = resconv.gates(gated)[name]
            gate.scale.zero_()
            if gate.control is not None:
                gate.control.fill_(1.0)
    return resconv.prune(gated, Plan(tuple(chosen))), Plan(tuple(chosen))


def make_weights(folder: Path, name: str) -> Path:
    path = folder / name
    state = _net().state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


_KEPT: dict[str, Any] = {}


def read_weights(folder: Path, name: str) -> str:
    """Load weights; a net that was refused its weights must be what it was."""
    if "net" not in _KEPT:
        _KEPT["net"], _KEPT["state"] = _net(), copy.deepcopy(_net().state_dict())
    net, state = _KEPT["net"], _KEPT["state"]
    try:
        nets.load_weights(net, folder / name)
    except BaseException:
        if any(not torch.equal(v, state[k]) for k, v in net.state_dict().items()):
            net.load_state_dict(state)
            return "changed though it failed"
        raise
    fault = "" if all(bool(p.isfinite().all()) for p in net.parameters()) else "NaN was taken"
    net.load_state_dict(state)
    return fault


def make_saved(folder: Path, name: str) -> Path:
    net, plan = _compact()
    resconv.save(net, folder, plan=plan, example_inputs=_X)
    _KEPT["seal"] = json.loads((folder / "model.json").read_bytes())["header_sha256"]
    return folder / name


def read_saved(folder: Path) -> str:
    """Load a saved net: what is not refused is the net that was saved."""
    if "compact" not in _KEPT:
        _KEPT["compact"] = _compact()[0](_X)
    net = resconv.load(folder)
    inputs = read_header(folder).inputs
    make_inputs(inputs, torch.Generator()) if inputs else None
    resealed = json.loads((folder / "model.json").read_bytes())["header_sha256"] != _KEPT["seal"]
    return "" if resealed or torch.equal(net(_X), _KEPT["compact"]) else "another net"


def make_file(folder: Path, name: str) -> Path:
    return resconv.export(_compact()[0], folder / name, _X).path


def read_file(folder: Path, name: str, trust: bool = False) -> str:
    opened = open_file(folder / name, trust_source=trust)
    spec = opened.inputs
    if spec is not None and len(str(spec)) < 200 and str(spec).count("shape") == 1:
        opened.run(_X)
    return ""


_METRICS = json.loads("""{
"top1_dense": 90.0, "top1_gated": 89.5, "top1_pruned": 89.5, "top1_finetuned": null, "epochs_dense": 3,
"epochs_sparse": 5, "epochs_finetune": 0, "machine": "x", "date": "y", "macs_dense": 900, "macs_compact": 400,
"num_params_dense": 90, "num_params_compact": 40, "seconds": {"dense": 1.0}, "num_units": 9, "num_zero": 4,
"latency": {"torch": {"dense_ms": 2.0, "compact_ms": 1.0, "ratio": 0.5}},
"peak_memory_bytes": {"dense": 4096, "compact": 2048},
"verify": {"max_abs_error": 1e-6, "max_rel_error": 1e-6, "tolerance": 1e-4},
"measured": {"batch": 1, "threads": 1, "repeats": 50, "image_size": 8}}""")


def make_run(folder: Path, name: str) -> Path:
    """Write what a run leaves, and return one file of it."""
    config = Config.of(model="resnet20", data="digits", macs=0.5, epochs=3, sparse_lr=0.1)
    run = RunFolder.begin(folder / "run", config)
    run.add_metrics(**_METRICS)
    record = Record({"macs": 0.5}, {"images": "0" * 64}, {}, {name: "0" * 64}, ["top1_dense"])
    for stage in ("dense", "sparse", "plan"):
        run.finish(stage, record)
    steps = [Snapshot(s, {"a": 1.0, "b": 0.5}, {"a": 1.0}, 0.9, None) for s in (0, 9)]
    run.write_history(History(tuple(steps)))
    Plan(("a", "b"), 900, 400, 90, 40, {"a": 0.0, "b": 0.0, "c": 1.0}, 2.0, 1.1, 1.0).save(
        run / "plan.json"
    )
    net = TimedNet(("a",), 1.5, 2.0, 1.4)
    LatencyTable(
        "torch", 1, 1, "cpu", processor(), torch.__version__, 2.0, {"a": 0.5}, 0.1, (net,)
    ).save(run / "latency.json")
    return run / name


def read_run(folder: Path) -> str:
    """Read every file of a run as the commands do."""
    run = RunFolder.open(folder / "run")
    run.config()
    rows(run.metrics())
    run.done()
    run.history()
    Plan.load(run / "plan.json")
    LatencyTable.load(run / "latency.json")
    return ""


def _photo(value: int) -> bytes:
    buffer = io.BytesIO()
    picture = Image.linear_gradient("L").resize((24, 16)).point(lambda p: (p + value) % 256)
    picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def make_images(folder: Path) -> Path:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            place = folder / split / label
            place.mkdir(parents=True)
            (place / "0.png").write_bytes(_photo(len(label + split)))
    return folder / "train" / "cat" / "0.png"


def make_table(folder: Path) -> Path:
    images = [{"bytes": _photo(i), "path": None} for i in range(8)]
    table = pa.table({"image": images, "label": [i % 2 for i in range(8)]})
    for name in ("train.parquet", "val.parquet"):
        pq.write_table(table, folder / name)
    return folder / "train.parquet"


def read_data(folder: Path, kind: str) -> str:
    loaded = data.load(f"{kind}:{folder}", image_size=16)
    return "" if all(math.isfinite(n) for n in (*loaded.mean, *loaded.std)) else "no statistics"


def make_checkpoints(folder: Path, name: str) -> Path:
    for epoch in (1, 2):
        state = {"Bound": {"bound": "mine", "random": []}}
        Checkpoints().save_checkpoint({"epoch": epoch, "callbacks": state}, folder / LAST)
    for path in folder.iterdir():  # what a resume moves or removes is there again for the next
        _KEPT[path.name] = path.read_bytes()
    return folder / name


def read_checkpoints(folder: Path, name: str) -> str:
    """Choose the checkpoint to go on from: a whole one, or none and why."""
    said: list[str] = []
    found = choose_checkpoint(folder, "mine", said.append)
    epoch = None if found is None else torch.load(found, weights_only=True)["epoch"]
    changed = (folder / name).is_file() and (folder / name).read_bytes() != _KEPT[name]
    for other in CHECKPOINT_FILES:
        if other != name:
            (folder / other).write_bytes(_KEPT[other])
    if epoch is None or (changed and name == LAST):
        raise RunError(" ".join(said))
    return "" if epoch in (1, 2) else "another checkpoint"


def _weights(name: str, mutate: Mutate, share: int) -> Kind:
    return Kind(lambda f: make_weights(f, name), mutate, lambda f: read_weights(f, name), share)


def _file(name: str, mutate: Mutate, share: int, trust: bool = False) -> Kind:
    return Kind(lambda f: make_file(f, name), mutate, lambda f: read_file(f, name, trust), share)


def _run(name: str) -> Kind:
    return Kind(lambda f: make_run(f, name), any_json, read_run, 6)


def _refused(kind: Kind) -> Kind:
    """Return a kind whose mutants must all be refused; the file itself is read as ever."""

    def read(folder: Path) -> str:
        return kind.read(folder) or ("taken" if _KEPT.pop("mutated", False) else "")

    def mutate(content: bytes, rng: random.Random) -> bytes:
        _KEPT["mutated"] = True
        return kind.mutate(content, rng)

    return Kind(kind.make, mutate, read, kind.share)


KINDS = {
    "weights .safetensors": _weights("net.safetensors", any_safetensors, 8),
    "weights .pt": _weights("net.pt", any_archive, 8),
    "model.json": Kind(lambda f: make_saved(f, "model.json"), sealed_json, read_saved, 4),
    "model.safetensors": Kind(
        lambda f: make_saved(f, "model.safetensors"), any_safetensors, read_saved, 2
    ),
    "weights .safetensors, large": _refused(_weights("net.safetensors", large_safetensors, 1)),
    "weights .pt, large": _refused(
        Kind(
            # What takes long to pack is packed before the first one is opened.
            lambda f: make_weights(f, "net.pt" if _packed_zeros() else ""),
            large_archive,
            lambda f: read_weights(f, "net.pt"),
        )
    ),
    "model.json, large": _refused(
        Kind(lambda f: make_saved(f, "model.json"), large_header, read_saved)
    ),
    **{
        n: Kind(partial(make_checkpoints, name=n), m, partial(read_checkpoints, name=n), 2)
        for n, m in ((LAST, any_archive), ("checkpoints.json", any_json))
    },
    ".onnx": _file("net.onnx", any_bytes, 3),
    ".pt2, not trusted": _file("net.pt2", any_archive, 1),
    ".pt2, trusted": _file("net.pt2", any_bytes, 1, True),
    **{n: _run(n) for n in ("config.json", MARK, "plan.json", "latency.json")},
    **{n: _run(n) for n in ("metrics.json", "scales.json")},
    "images": Kind(make_images, any_image, lambda f: read_data(f, "folder"), 12),
    "parquet": Kind(make_table, any_table, lambda f: read_data(f, "parquet"), 8),
}
