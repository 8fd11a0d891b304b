"""Convert Amazon Beauty: python data/beauty/prepare.py FOLDER writes three CSV files next to this.

FOLDER holds files that LETTER's authors publish on GitHub (HonghuiBao2000/LETTER, data/Beauty,
commit 8d0154e28de37dbb6e24871c508ad8ddb1921cda). The last one may be missing.
    Beauty.inter.json   {user: [oldest item, …, newest item]}                → interactions.csv
    Beauty.index.json   {item: ["<a_183>", "<b_70>", "<c_232>", "<d_6>"]}    → letter_ids.csv
    Beauty.item.json    {item: {"title": …, "brand": …, "categories": …}}    → text in items.csv"""
import csv
import hashlib
import json
import sys
from pathlib import Path

SHA256 = {"inter": "8809584b8b78fa6561771c88911ed65bd716fc9926fca1e581e6a1ab578ccfd5",
          "index": "be3fb890e59b5443824cdebc560ef349191b97f20d3aecad4727de2d6b212c82"}
BY_HAND = ("download Beauty.inter.json and Beauty.index.json from https://github.com/"
           "HonghuiBao2000/LETTER (folder data/Beauty), then: python data/beauty/prepare.py FOLDER")

def read(folder, name):
    """The dict in a JSON file; raises OSError if it cannot be read or is not as published."""
    path = Path(folder) / f"Beauty.{name}.json"
    content = path.read_bytes()
    if name in SHA256 and hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise OSError(f"{path} has another SHA-256")
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise OSError(f"{path}: {error}") from None

def plain(value):
    """One line of text from a string or a list, which may hold lists; "" from None."""
    parts = map(plain, value) if isinstance(value, list) else str(value or "").split()
    return " ".join(parts)

def prepare(source=".", folder=Path(__file__).parent):
    """Write the three CSV files; raises OSError if `source` lacks one of the known files."""
    text = read(source, "item") if (Path(source) / "Beauty.item.json").exists() else {}
    keys = {"title": "title", "brand": "keywords", "categories": "category"} if text else {}
    items = [["item_id", *keys.values()]]
    ids = [["item_id", "code_1", "code_2", "code_3", "code_4"]]
    events = [["user_id", "item_id", "position"]]
    for item, codes in read(source, "index").items():
        ids.append([item, *[code[3:-1] for code in codes]])               # "<a_183>" → 183
        items.append([item, *[plain(text.get(item, {}).get(key)) for key in keys]])
    for user, history in read(source, "inter").items():
        events += [[user, item, position] for position, item in enumerate(history)]
    if not text:
        print("no Beauty.item.json, no text for content IDs: use --ids data/beauty/letter_ids.csv")
    for table, name in ((items, "items"), (ids, "letter_ids"), (events, "interactions")):
        part = Path(folder) / f"{name}.csv.part"                          # renamed when it is whole
        with open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
        part.replace(Path(folder) / f"{name}.csv")

if __name__ == "__main__":
    try:
        prepare(*sys.argv[1:])
    except OSError as problem:
        print(f"error: {problem}; {BY_HAND}", file=sys.stderr)
        sys.exit(2)
