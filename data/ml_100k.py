"""Fetch MovieLens-100K and write it as data/ml-100k/interactions.csv and items.csv.

    python data/ml_100k.py [RECBOLE_WHEEL]

Its licence forbids passing the ratings on, so they are not part of this repository. The PyPI package
recbole 1.2.1 carries them; it is downloaded, never installed, and the two files are checked by SHA-256.
"""
import csv
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parent / "ml-100k"
PACKAGE = "recbole==1.2.1"
INSIDE = "recbole/dataset_example/ml-100k/ml-100k."
SHA256 = {"inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
          "item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"}
BY_HAND = (f"on a machine with a network: pip download --no-deps {PACKAGE}; "
           "then here: python data/ml_100k.py recbole-1.2.1-py3-none-any.whl")


def download(folder):
    """The path of the package's wheel, downloaded by pip into `folder`; raises OSError when that fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise OSError(f"could not download ml-100k ({reason}); {BY_HAND}")
    return next(Path(folder).glob("recbole-*.whl"))


def unpack(wheel):
    """{'inter': rows, 'item': rows} of the wheel's two tables; raises OSError if they are not the known ones."""
    tables = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, digest in SHA256.items():
                content = archive.read(INSIDE + name)
                if hashlib.sha256(content).hexdigest() != digest:
                    raise OSError(f"{wheel}: {INSIDE}{name} is not the file this was written for (SHA-256 differs)")
                tables[name] = list(csv.reader(io.StringIO(content.decode()), delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    except (zipfile.BadZipFile, KeyError, FileNotFoundError) as error:
        raise OSError(f"{wheel} is not the wheel of {PACKAGE} ({error}); {BY_HAND}") from None
    return tables


def write(tables, folder=FOLDER):
    """Write the two CSV files, each under a temporary name that is renamed when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [("item_id", "title", "genres")] + [(i, f"{title} ({year})", genres) for i, title, year, genres in tables["item"]]
    events = [("user_id", "item_id", "rating", "timestamp")] + tables["inter"]
    for name, rows in (("items.csv", items), ("interactions.csv", events)):
        with open(folder / f"{name}.part", "w", newline="", encoding="utf-8") as f:
            csv.writer(f, lineterminator="\n").writerows(rows)
        os.replace(folder / f"{name}.part", folder / name)


def fetch(folder=FOLDER):
    """Make sure that `folder` holds the data set, downloading it the first time; raises OSError."""
    if (folder / "interactions.csv").exists():                 # renamed last, so both are whole
        return folder
    print(f"Fetching ml-100k (2 MB, once) from the PyPI package {PACKAGE} into {folder} ...", flush=True)
    with tempfile.TemporaryDirectory() as place:
        write(unpack(download(place)), folder)
    return folder


if __name__ == "__main__":
    try:
        if len(sys.argv) > 1:
            write(unpack(sys.argv[1]))
        else:
            fetch()
    except OSError as error:
        sys.exit(f"error: {error}")
