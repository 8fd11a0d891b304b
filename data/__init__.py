"""Data sets: a folder with items.csv and interactions.csv becomes a Dataset.

Users are sorted by id, a user's items by position, equal positions by a checksum of both ids: half
of ml-100k's ratings share their time with another one, and its low item ids are popular items.
"""
import csv
import difflib
import math
import runpy
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


class InputError(ValueError):
    """Something the user can mend: the message names the file, the line and the cure."""


@dataclass
class Dataset:
    """Histories of B users over a catalogue of n items; an item is its row number in items.csv."""
    name: str
    item_ids: list = field(default_factory=list)     # n strings
    titles: list = field(default_factory=list)       # n strings: title, else keywords, else id
    texts: list = field(default_factory=list)        # n strings: all text columns joined
    user_ids: list = field(default_factory=list)     # B strings, sorted
    histories: list = field(default_factory=list)    # B lists of items: oldest first, no repeats
    liked: list = field(default_factory=list)        # B lists of bool: rated >= 70 % of the maximum
    train: list = field(default_factory=list)        # histories without their last two items
    dropped_repeats: int = 0                         # interactions with an item seen before
    dropped_users: int = 0                           # users with fewer than three items
    truth: dict = field(default_factory=dict)        # toy: {"liked": B sets, "shown": B sets}

    @property
    def sizes(self):
        """Name and sizes for results.json, with a checksum of the content."""
        content = repr((self.item_ids, self.texts, self.histories, self.liked)).encode()
        return {"name": self.name, "users": len(self.histories), "items": len(self.item_ids),
                "interactions": sum(map(len, self.histories)), "checksum": zlib.crc32(content)}


def _rows(path, *columns):
    """Yield (place, {column: text}) for each row of a CSV file; place names file and line."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            for name in columns:
                if not set(name.split(" or ")).intersection(reader.fieldnames or []):
                    raise InputError(f"{path}, line 1: there is no column {name}; add it")
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():        # too many fields, or too few
                    raise InputError(f"{place} needs as many fields as line 1; quote commas")
                yield place, row
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"{path}: {error}; it has to be a CSV file, saved as UTF-8") from None


def _number(text, place):
    """The finite number that a field holds; a whole number stays exact."""
    try:
        number = int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        number = math.nan
    if not abs(number) < math.inf:
        raise InputError(f"{place}: {text[:40]!r} is not a finite number; write it like 12 or 3.5")
    return number


def _read_users(data, index, path):
    """Fill in users, histories and likes; index: {item id: row number}."""
    users = {}                                       # user → [(position, tie, item, rating)]
    highest = -math.inf
    for place, row in _rows(path, "user_id", "item_id", "position or timestamp"):
        user = row["user_id"]
        item = row["item_id"]
        if item not in index:
            raise InputError(f"{place}: items.csv has no item {item!r}; add it there")
        position = _number(row.get("position", row.get("timestamp")), place)
        rating = _number(row.get("rating", "1"), place)
        highest = max(highest, rating)
        tie = zlib.crc32(f"{user}\t{item}".encode())
        users.setdefault(user, []).append((position, tie, index[item], rating))
    for user in sorted(users):
        liked = {}                                   # item → liked; the first place counts
        for _, _, item, rating in sorted(users[user]):
            liked.setdefault(item, rating >= 0.7 * highest)
        data.dropped_repeats += len(users[user]) - len(liked)
        data.dropped_users += len(liked) < 3
        if len(liked) >= 3:
            data.user_ids.append(user)
            data.histories.append(list(liked))
            data.liked.append(list(liked.values()))
            data.train.append(list(liked)[:-2])
    if not data.histories:
        raise InputError(f"{path}: no user has three different items; add interactions")


def load_data(name):
    """The Dataset of "toy", "ml-100k" (fetched the first time) or a folder; raises InputError."""
    folder = Path(__file__).parent / name if name in ("toy", "ml-100k") else Path(name)
    if name == "ml-100k":
        try:
            runpy.run_path(str(folder / "prepare.py"))["fetch"]()
        except OSError as error:
            raise InputError(error) from None
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; --data takes toy, ml-100k or a folder of CSV files")
    data = Dataset(folder.resolve().name)
    index = {}
    for place, row in _rows(folder / "items.csv", "item_id"):
        item = row["item_id"]
        if item in index:
            raise InputError(f"{place}: item {item!r} stands twice; keep one line of it")
        index[item] = len(index)
        title = row.get("title") or row.get("keywords") or item
        texts = [row.get(column) for column in ("title", "keywords", "genres", "category")]
        data.titles.append(" ".join(title.split()))
        data.texts.append(" ".join(filter(None, texts)))
    data.item_ids = list(index)
    _read_users(data, index, folder / "interactions.csv")
    if (folder / "truth.csv").exists():                        # of a simulated world
        rows = {row["user_id"]: row for _, row in _rows(folder / "truth.csv", "user_id")}
        for column in ("liked", "shown"):
            lists = [rows[user][column].split() for user in data.user_ids]
            data.truth[column] = [set(map(index.get, items)) for items in lists]
    print("{name}: {users} users, {items} items, {interactions} interactions".format(**data.sizes),
          f"(dropped: {data.dropped_repeats} repeats of an item, "
          f"{data.dropped_users} users with fewer than three items)")
    return data


def find_item(name, ids, titles):
    """Index of the item with this id or title; raises InputError that names near matches."""
    if name in ids:
        return ids.index(name)
    wanted = name.casefold()
    plain = [title.casefold() for title in titles]
    if plain.count(wanted) == 1:
        return plain.index(wanted)
    close = difflib.get_close_matches(wanted, plain, 3, 0.4)
    near = [f"{titles[i]!r} (id {ids[i]})" for i, title in enumerate(plain) if title in close]
    raise InputError(f"{plain.count(wanted) or 'no'} items have the id or title {name!r}; "
                     f"give one id; near: {', '.join(near[:5]) or 'none'}")


def read_ids(path, item_ids):
    """Own semantic IDs (n lists of whole numbers): a CSV file with item_id and one to six codes.

    Where items share an ID, all IDs get one more code (0, 1, 2 … among equal ones), as in TIGER.
    """
    found = dict.fromkeys(item_ids)                  # item id → codes, None until they are read
    for place, row in _rows(path, "item_id"):
        item = row.pop("item_id")
        if item not in found or found[item]:
            raise InputError(f"{place}: item {item!r} is unknown or stands twice; drop this line")
        if not 1 <= len(row) <= 6 or not all(map(str.isdecimal, row.values())):
            raise InputError(f"{place}: an ID is one to six whole numbers >= 0; mend this line")
        found[item] = list(map(int, row.values()))
    for item, codes in found.items():
        if codes is None:
            raise InputError(f"{path}: item {item!r} has no line; add one")
    ids = list(found.values())
    count = Counter(map(tuple, ids))
    shared = sum(number for number in count.values() if number > 1)
    if shared:
        print(f"{path}: {shared} items share their ID; one more code was appended to all IDs")
        for codes in reversed(ids):                  # the last of equal ones gets the highest code
            count[tuple(codes)] -= 1
            codes.append(count[tuple(codes)])
    return ids
