"""Fetch MovieLens-100K: python data/ml-100k/prepare.py [WHEEL] writes items.csv, interactions.csv.

Its licence forbids passing it on. PyPI's recbole 1.2.1 has it: downloaded, not installed."""
import csv
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "recbole==1.2.1"
INSIDE = "recbole/dataset_example/ml-100k/ml-100k."
SHA256 = {"item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
          "inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"}
BY_HAND = (f"by hand, where there is a network: pip download --no-deps {PACKAGE}; "
           "then here: python data/ml-100k/prepare.py recbole-1.2.1-py3-none-any.whl")

def prepare(wheel, folder=HERE):
    """Write the wheel's two tables as CSV files; raises OSError if they are not the known ones."""
    rows = {}
    for name, digest in SHA256.items():
        try:
            content = zipfile.ZipFile(wheel).read(INSIDE + name)
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise OSError(f"{wheel} is not the wheel of {PACKAGE} ({error}); {BY_HAND}") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise OSError(f"{wheel}: {INSIDE}{name} has another SHA-256; {BY_HAND}")
        rows[name] = [line.split("\t") for line in content.decode().splitlines()]
    rows["item"] = [(item, f"{title} ({year})", text) for item, title, year, text in rows["item"]]
    rows["item"][0] = ("item_id", "title", "genres")
    rows["inter"][0] = ("user_id", "item_id", "rating", "timestamp")
    for table, name in (("item", "items.csv"), ("inter", "interactions.csv")):
        part = Path(folder) / f"{name}.part"                   # renamed when it is whole
        with open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows[table])
        part.replace(Path(folder) / name)

def fetch(folder=HERE):
    """Download and prepare the data set unless `folder` holds it already; raises OSError."""
    if (Path(folder) / "interactions.csv").exists():           # written last, so both are whole
        return
    print(f"Fetching ml-100k (2 MB, once) from the PyPI package {PACKAGE} ...", flush=True)
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", place, PACKAGE]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"could not download ml-100k: {done.stderr.splitlines()[-1:]}; {BY_HAND}")
        prepare(next(Path(place).glob("recbole-*.whl")), folder)

if __name__ == "__main__":
    try:
        job = prepare if sys.argv[1:] else fetch
        job(*sys.argv[1:])
    except OSError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
