"""Files such as users have, made small: pictures, CIFAR-10's archive, MNIST's files, UCI tables in their formats."""

import atexit
import functools
import gzip
import io
import pickle
import struct
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = "cifar-10-batches-py"
BATCHES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")


def picture(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    """[height, width, channels] uint8 with the levels 0 and 255 among others."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    pixels[0, 0], pixels[0, 1] = 0, 255
    return pixels


def write_pictures(folder: Path, count: int = 60, height: int = 8, width: int = 8, classes: int = 2) -> Path:
    """PNG files in `classes` sub-folders."""
    for k in range(count):
        place = folder / f"class{k % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(k, height, width)).save(place / f"{k:03}.png")
    return folder


class _Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2 wrote it: strings without an encoding, numpy's old module names."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, text: str | bytes) -> None:
        raw = text.encode("ascii") if isinstance(text, str) else text
        short = len(raw) < 256
        self.write((b"U" + bytes([len(raw)]) if short else b"T" + struct.pack("<i", len(raw))) + raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, thing: object, name: str | None = None) -> None:
        name = name or thing.__qualname__
        module = "numpy.core.multiarray" if name == "_reconstruct" else thing.__module__
        self.write(f"c{module}\n{name}\n".encode())
        self.memoize(thing)

    dispatch[type] = dispatch[type(len)] = dispatch[type(picture)] = save_global


def python2_pickle(value: object) -> bytes:
    out = io.BytesIO()
    _Python2Pickler(out, 2).dump(value)
    return out.getvalue()


def cifar_batch(name: str, count: int = 20) -> dict[bytes, object]:
    """A batch with `count` random images in place of 10,000."""
    rng = np.random.default_rng(BATCHES.index(name))
    data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    data[:, 0], data[:, -1] = 0, 255
    return {
        b"batch_label": f"{name} of 5".encode(),
        b"labels": rng.permutation(np.arange(count) % 10).tolist(),
        b"data": data,
        b"filenames": [f"image_s_{k:06}.png".encode() for k in range(count)],
    }


def cifar_files(**changed: bytes | None) -> dict[str, bytes]:
    """The pickled batches by name; a batch that is changed to None is left out."""
    files = {name: python2_pickle(cifar_batch(name)) for name in BATCHES if name not in changed}
    return files | {name: content for name, content in changed.items() if content is not None}


def write_cifar_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo(FOLDER)
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


IMAGENET = (*(f"train_data_batch_{k}" for k in range(1, 11)), "val_data")


def imagenet_batch(name: str, count: int = 10, side: int = 32) -> dict[str, object]:
    """A batch with `count` random images in place of 128,116, labels among 1 and 1000, and the mean of all."""
    rng = np.random.default_rng([2017, IMAGENET.index(name)])
    data = rng.integers(0, 256, (count, 3 * side * side), dtype=np.uint8)
    data[:, 0], data[:, -1] = 0, 255
    labels = [1, 1000, *rng.integers(1, 1001, count - 2).tolist()]
    return {"data": data, "labels": labels, "mean": data.mean(0)}


def imagenet_files(form: str = "pickle", side: int = 32, **changed: bytes | None) -> dict[str, bytes]:
    """The contents of the eleven batches by the names of their files; one that is changed to None is left out."""
    made = {}
    for name in IMAGENET:
        if form == "npz":
            out = io.BytesIO()
            np.savez(out, **imagenet_batch(name, side=side))
            made[f"{name}.npz"] = out.getvalue()
        else:
            made[name] = pickle.dumps(imagenet_batch(name, side=side), 3)
    return {name: content for name, content in (made | changed).items() if content is not None}


def write_imagenet(folder: Path, files: dict[str, bytes] | None = None, zipped: bool = False, side: int = 32) -> Path:
    """The files in a folder for training and one for validation, or in an archive each, as they are published."""
    form = "_npz" if files and all(name.endswith(".npz") for name in files) else ""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files or imagenet_files(side=side)).items():
        place = f"Imagenet{side}_{'val' if name.startswith('val') else 'train'}{form}"
        if zipped:
            with zipfile.ZipFile(folder / f"{place}.zip", "a", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(f"{place}/{name}" if form else name, content)
        else:
            (folder / place).mkdir(exist_ok=True)
            (folder / place / name).write_bytes(content)
    return folder


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the format of MNIST's files."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def mnist_arrays(train: int = 90, test: int = 20, size: tuple[int, int] = (8, 8)) -> dict[str, np.ndarray]:
    """Random images and labels by the ends of the names of their files."""
    rng = np.random.default_rng(0)
    made = {}
    for split, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, *size), dtype=np.uint8)
        images[:, 0, 0], images[:, 0, -1] = 0, 255
        made |= {f"{split}-images-idx3-ubyte": images, f"{split}-labels-idx1-ubyte": rng.permutation(count) % 10}
    return made


def write_mnist(folder: Path, size: tuple[int, int] = (8, 8), compress: bool = True, **changed: bytes | None) -> Path:
    """MNIST's four files, of which some may be changed, by names with _ for -, or left out if None."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: idx(array) for name, array in mnist_arrays(size=size).items()}
    files |= {name.replace("_", "-"): content for name, content in changed.items()}
    for name, content in files.items():
        if content is not None:
            place = folder / (f"{name}.gz" if compress else name)
            place.write_bytes(gzip.compress(content, mtime=0) if compress else content)
    return folder


def write_table(path: Path) -> Path:
    """Three columns of numbers and one of four classes."""
    random = np.random.default_rng(0)
    np.savetxt(path, np.c_[random.normal(3, 2, (300, 3)), random.integers(0, 4, 300)], delimiter=",")
    return path


def write_arrays(folder: Path) -> dict[str, str]:
    """Images as one .npy file, and their labels."""
    random = np.random.default_rng(0)
    made = {"path": random.integers(0, 256, (120, 3, 4, 6), dtype=np.uint8), "labels": random.integers(0, 5, 120)}
    for name, array in made.items():
        np.save(folder / f"{name}.npy", array)
    return {name: str(folder / f"{name}.npy") for name in made}


def riff(samples: bytes, bits: int = 16, channels: int = 1, rate: int = 8000, tag: int = 1, **other: bytes) -> bytes:
    """A WAV file; `other` chunks by name stand before the samples, and tag 0xFFFE + t writes t as an extension."""
    width, wide = channels * bits // 8, tag >= 0xFFFE
    body = struct.pack("<HHIIHH", 0xFFFE if wide else tag, channels, rate, rate * width, width, bits)
    body += (
        struct.pack("<HHIH", 22, bits, 0, tag - 0xFFFE) + bytes.fromhex("000000001000800000aa00389b71") if wide else b""
    )
    chunks = {b"fmt ": body} | {name.encode(): value for name, value in other.items()} | {b"data": samples}
    packed = b"".join(n + struct.pack("<I", len(v)) + v + b"\0" * (len(v) % 2) for n, v in chunks.items())
    return b"RIFF" + struct.pack("<I", 4 + len(packed)) + b"WAVE" + packed


def write_sounds(folder: Path, count: int = 20, samples: int = 2300, rate: int = 8000) -> Path:
    """16-bit WAV files of noise of different loudness, the first of them in a sub-folder; file k has samples + k."""
    for k in range(count):
        path = folder / ("deep" if k == 0 else "") / f"{k:03}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = np.random.default_rng(k).normal(0, 1000 + 200 * k, samples + k).round().astype("<i2")
        path.write_bytes(riff(levels.tobytes(), rate=rate))
    return folder


def _write_csv(path: Path, names: list[str], rows: np.ndarray) -> None:
    lines = [",".join(names), *(",".join(map(repr, row)) for row in rows.tolist())]
    path.write_text("\n".join(lines) + "\n")


def gas_columns(random: np.random.RandomState, rows: int = 500, pairs: int = 8) -> dict[str, np.ndarray]:
    """Time, two concentrations and `pairs` pairs of sensors that agree but for a little noise."""
    z, columns = random.randn(rows, pairs), {"Time": np.arange(rows, dtype=float)}
    columns |= {"Meth": random.rand(rows), "Eth": random.rand(rows)}
    for j in range(pairs):
        columns |= {f"s{j}a": z[:, j] + 0.05 * random.randn(rows), f"s{j}b": 2 * z[:, j] + 0.1 * random.randn(rows)}
    return columns


def hepmass_rows(random: np.random.RandomState, rows: int, features: int = 27, frequent: int = 6) -> np.ndarray:
    """Labels 0 and 1 and the features, of which the last `frequent` are often at their least."""
    x = random.randn(rows, features)
    x[:, features - frequent :] = x[:, features - frequent :].clip(-0.5)
    return np.c_[random.randint(0, 2, rows), x]


def write_uci(folder: Path, table: str, rows: int = 400) -> Path:
    """The files of one of the five tables as they lie in the published archive (of GAS the export), with few rows."""
    random, place = np.random.RandomState(7), folder / {"bsds300": "BSDS300"}.get(table, table)
    place.mkdir(parents=True)
    if table == "power":
        np.save(place / "data.npy", random.rand(rows, 8) * [5, 1, 10, 20, 40, 40, 30, 1440])
    if table == "gas":
        columns = gas_columns(random, rows)
        _write_csv(place / "ethylene_CO.csv", list(columns), np.stack(list(columns.values()), 1))
    if table == "hepmass":
        names = ["# label", *(f"f{k}" for k in range(27))]
        _write_csv(place / "1000_train.csv", names, hepmass_rows(random, rows))
        test = np.c_[hepmass_rows(random, rows // 2), np.zeros(rows // 2)]
        _write_csv(place / "1000_test.csv", [*names, "mass"], test)
    if table == "miniboone":
        np.save(place / "data.npy", random.lognormal(size=(rows, 43)))
    if table == "bsds300":
        import h5py

        with h5py.File(place / "BSDS300.hdf5", "w") as file:
            for split, share in (("train", 1.0), ("validation", 0.1), ("test", 0.2)):
                file[split] = 0.1 * random.randn(int(rows * share), 63)
    return folder


def write_physionet(folder: Path, count: int = 60, which: str = "a", **changed: str | None) -> Path:
    """Records and outcomes of a set in the format of the challenge; of a record `changed` by name, r132500, the text.

    Record k has 2 + k % 5 times with two variables each.
    """
    random, place = np.random.default_rng(0 if which == "a" else 1), folder / f"set-{which}"
    place.mkdir(parents=True, exist_ok=True)
    first, outcomes = (
        (132500 if which == "a" else 142500),
        ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"],
    )
    for k in range(count):
        number = first + k
        lines = ["Time,Parameter,Value", f"00:00,RecordID,{number}", f"00:00,Age,{40 + k}", f"00:00,Gender,{k % 2}"]
        lines += [f"00:00,Height,{-1 if k % 3 else 170.2}", f"00:00,ICUType,{1 + k % 4}", "00:00,Weight,80.5"]
        for hour in np.sort(random.choice(np.arange(1, 48), 2 + k % 5, replace=False)):
            time = f"{hour:02}:{random.integers(60):02}"
            lines += [f"{time},HR,{random.integers(50, 120)}", f"{time},Temp,{36 + random.random():.1f}"]
        text = changed.get(f"r{number}", "\n".join(lines) + "\n")
        if text is not None:
            (place / f"{number}.txt").write_text(text)
        outcomes.append(f"{number},6,1,5,-1,{int(k % 7 == 0)}")
    (folder / f"Outcomes-{which}.txt").write_text("\n".join(outcomes) + "\n")
    return folder


TS_HEADER = """# made for tests
@problemName Toy
@timeStamps false
@missing true
@univariate false
@dimensions 2
@equalLength false
@classLabel true up down flat
@data
"""


def write_uea(folder: Path, problem: str = "Toy", train: int = 40, test: int = 20, **changed: str) -> Path:
    """The two files of a problem with two channels, three classes, lengths 3 … 7 and some values unknown."""
    random, place = np.random.default_rng(3), folder / problem
    place.mkdir(parents=True, exist_ok=True)
    for part, count in (("TRAIN", train), ("TEST", test)):
        lines = []
        for k in range(count):
            values = [[f"{v:.4f}" for v in random.normal(5, 2, 3 + k % 5)] for _ in range(2)]
            if k % 4 == 0:
                values[0][1] = "?"
            lines.append(":".join(",".join(row) for row in values) + ":" + ("up", "down", "flat")[k % 3])
        (place / f"{problem}_{part}.ts").write_text(changed.get(part, TS_HEADER + "\n".join(lines) + "\n"))
    return folder


def fits_card(key: str, value: object, comment: str = "") -> bytes:
    """A line of the header of a FITS file."""
    if isinstance(value, bool):
        text = f"{'T' if value else 'F':>20}"
    else:
        text = f"'{value:<8}'" if isinstance(value, str) else f"{value!r:>20}"
    return f"{key:<8}= {text}{' / ' + comment if comment else ''}".ljust(80).encode("ascii")


def fits_unit(array: np.ndarray | None, bits: int = -32, first: bool = True, **cards: object) -> bytes:
    """A header and its data as stored numbers, each filled up to blocks of 2880 bytes; without an array, no data.

    Args:
        bits: BITPIX, which says how numbers are stored.
        first: the primary unit; else an extension of the kind IMAGE.
        cards: further values of the header.
    """
    kind = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}[bits]
    shape = () if array is None else array.shape
    lines = [fits_card("SIMPLE", True, "a standard file") if first else fits_card("XTENSION", "IMAGE", "a/b")]
    lines += [fits_card("BITPIX", bits), fits_card("NAXIS", len(shape))]
    lines += [fits_card(f"NAXIS{k}", n) for k, n in enumerate(reversed(shape), 1)]
    lines += [] if first else [fits_card("PCOUNT", 0), fits_card("GCOUNT", 1)]
    lines += [b"COMMENT = none".ljust(80), *(fits_card(key, value) for key, value in cards.items()), b"END".ljust(80)]
    content = b"" if array is None else array.astype(kind).tobytes()
    header = b"".join(lines)
    return header + b" " * (-len(header) % 2880) + content + bytes(-len(content) % 2880)


def write_fits(folder: Path, count: int = 12, height: int = 8, width: int = 12) -> Path:
    """Maps of noise, the names and sub-folder of which are those of a simulation of lensing."""
    place = folder / "Maps10"
    place.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        values = np.random.default_rng(k).normal(0, 0.02, (height, width))
        (place / f"WLconv_z1.00_{k:04}r.fits").write_bytes(fits_unit(values))
    return folder


@functools.cache
def examples() -> dict[str, dict]:
    """Arguments of data sets that are read from files, or are large, by name; the files go when the process ends."""
    place = tempfile.TemporaryDirectory(prefix="genmodels-tests-")
    atexit.register(place.cleanup)
    folder = Path(place.name)
    (folder / "phi4").mkdir()
    return {
        "image_folder": {"path": str(write_pictures(folder / "pictures")), "val": 8, "test": 8},
        "cifar10": {
            "path": str(write_cifar_archive(folder / "cifar-10-python.tar.gz", cifar_files())),
            "val": 10,
            "checksum": "ignore",
        },
        "imagenet32": {"path": str(write_imagenet(folder / "imagenet32")), "val": 10, "checksum": "ignore"},
        "mnist": {"path": str(write_mnist(folder / "mnist")), "val": 10},
        "wav_folder": {
            "path": str(write_sounds(folder / "sounds")),
            "segment": 500,
            "rate": 8000,
            "condition": {"name": "log_mel", "bands": 8, "window": 128, "hop": 32},
            "val": 3,
            "test": 3,
        },
        "table": {"path": str(write_table(folder / "rows.csv")), "condition": 3, "classes": 4},
        "array": {**write_arrays(folder), "flip": True},
        "uci": {"table": "miniboone", "path": str(write_uci(folder / "uci", "miniboone"))},
        "physionet": {"path": str(write_physionet(folder / "physionet"))},
        "uea": {"path": str(write_uea(folder / "uea")), "problem": "Toy"},
        "phi4": {"size": 4, "count": 40, "reference": 20, "cache": str(folder / "phi4")},
        "gaussian_field": {"size": (4, 6), "count": 100, "reference": 60},
        "lognormal_field": {"size": 8, "count": 100, "reference": 60},
        "fields": {"path": str(write_fits(folder / "maps")), "crop": 4, "val": 2, "test": 2},
        "spiral_sde": {"count": 400},
        "lorenz": {"count": 100},
        "van_der_pol": {"count": 40},
    }
