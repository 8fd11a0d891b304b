"""Data sets: a folder with items.csv and interactions.csv becomes a Dataset."""
import csv
import difflib
import runpy
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

class InputError(ValueError):
    """Something the user can mend: the message names the file, the line and the cure."""

def check(right, message):
    """Raise InputError with this message unless all is right."""
    if not right:
        raise InputError(message)

@dataclass(eq=False)                    # an object equals itself alone: caches may hold it
class Dataset:
    """Histories of B users over a catalogue of n items; an item is its row number in items.csv."""
    item_ids: list      # n strings
    titles: list        # n strings: title, else keywords, else id
    texts: list         # n strings: all text columns joined
    histories: list     # B lists of items: oldest first, no repeats
    liked: list         # B lists of bool: rated at least 70 % of the highest rating
    train: list         # histories without their last two items
    truth: dict         # toy: "liked", "shown": B sets of items; "theme": n strings; else empty
    sizes: dict         # for results.json: name or folder, sizes, a checksum of the content

def _rows(path, *columns):
    """Yield (place, {column: text}) for each row of a CSV file; place names file and line."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            there = reader.fieldnames or []
            check(len({*there}) == len(there), f"{path}, line 1: two columns have the same name")
            for name in columns:
                check({*name.split(" or ")} & {*there}, f"{path}, line 1: there is no column {name}"
                      f", only {there}; add it, with commas and no spaces between")
            ids = [name for name in ("user_id", "item_id") if name in there]
            for row in reader:     # key None: a field too many; value None: a field too few
                place = f"{path}, line {reader.line_num}"
                check(None not in (*row, *row.values()), f"{place} needs as many fields as line 1")
                for name in ids:
                    row[name] = row[name].strip()
                    check(row[name], f"{place}: {name} is blank; write an id")
                yield place, row
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"{path}: {error}; it has to be a CSV file, saved as UTF-8") from None

def _read_users(path, index):
    """{user: {item: liked}}, oldest first, of users with three items; index: {item id: item}."""
    events = []
    for place, row in _rows(path, "user_id", "item_id", "position or timestamp"):
        item = row["item_id"]
        check(item in index, f"{place}: items.csv has no item {item!r}; add it there")
        try:
            position = float(row.get("position", row.get("timestamp")))
            rating = float(row.get("rating", 1))
            check(abs(position + rating) < float("inf"), "inf and nan are not allowed")
        except ValueError as error:
            raise InputError(f"{place}: {error}; write a number like 12 or 3.5") from None
        tie = zlib.crc32(f"{row['user_id']}\t{item}".encode())   # ml-100k: half the times are ties
        events.append((row["user_id"], position, tie, index[item], rating))
    highest = max([rating for *_, rating in events], default=0)
    users = {}
    for user, _, _, item, rating in sorted(events):
        users.setdefault(user, {}).setdefault(item, rating >= 0.7 * highest)
    repeats = len(events) - sum(map(len, users.values()))
    kept = {user: liked for user, liked in users.items() if len(liked) >= 3}
    check(kept, f"{path}: no user has three different items; add interactions")
    print(f"dropped: {repeats} repeats of an item, {len(users) - len(kept)} users with < 3 items")
    return kept

def load_data(name, quick=False):
    """The Dataset of a folder or name (OSError: no download); quick: of at most 100 users."""
    named = name in ("toy", "ml-100k")
    folder = Path(__file__).parent / name if named else Path(name)
    if name == "ml-100k":
        runpy.run_path(str(folder / "prepare.py"))["fetch"]()
    check(folder.is_dir(), f"no folder {folder}; --data takes toy, ml-100k or a folder")
    items = {}
    for place, row in _rows(folder / "items.csv", "item_id"):
        check(row["item_id"] not in items, f"{place}: item {row['item_id']!r} stands twice")
        items[row["item_id"]] = row
    titles = [row.get("title") or row.get("keywords") or item for item, row in items.items()]
    first = next(iter(items.values()), {})
    columns = [name for name in ("title", "keywords", "genres", "category") if name in first]
    texts = [" ".join(filter(None, map(row.get, columns))).strip() for row in items.values()]
    index = {item: number for number, item in enumerate(items)}
    users = _read_users(folder / "interactions.csv", index)
    if quick:
        users = dict([*users.items()][::(len(users) + 99) // 100])
    truth = {}
    path = folder / "truth.csv"                      # only a simulated world has one
    for column in ("liked", "shown") if path.exists() else ():
        ids = {row["user_id"]: row[column].split() for _, row in _rows(path, "user_id", column)}
        check(ids.keys() >= users.keys(), f"{path}: a user of interactions.csv has no line; add it")
        odd = set().union(*map(ids.get, users)) - index.keys()
        check(not odd, f"{path}: {column}: items.csv has no item {min(odd, default='')!r}; add it")
        truth[column] = [set(map(index.get, ids[user])) for user in users]
        truth["theme"] = [row.get("theme", "") for row in items.values()]
    histories = [list(liked) for liked in users.values()]
    likes = [list(liked.values()) for liked in users.values()]
    train = [history[:-2] for history in histories]
    content = repr((list(items), texts, histories, likes, *truth.values()))
    sizes = {"name": name if named else str(folder.resolve()), "quick": quick,
             "users": len(users), "items": len(items), "interactions": sum(map(len, histories)),
             "checksum": zlib.crc32(content.encode())}
    print("{name}: {users} users, {items} items, {interactions} interactions".format(**sizes),
          "; text of the items: ", ", ".join(columns) or "none", sep="")
    return Dataset(list(items), titles, texts, histories, likes, train, truth, sizes)

def find_item(name, ids, titles):
    """Index of the item with this id or title; raises InputError that names near matches."""
    plain = [title.casefold() for title in titles]
    for wanted, known in ((name, ids), (name.casefold(), plain)):
        if known.count(wanted) == 1:
            return known.index(wanted)
    close = difflib.get_close_matches(name.casefold(), plain, 3, 0.4)
    near = [f"{titles[i]} (id {ids[i]})" for i, title in enumerate(plain) if title in close]
    raise InputError(f"no single item has the id or title {name!r}; near: {near[:5]}")

def read_ids(path, item_ids):
    """Own semantic IDs, n lists of codes, from a CSV file: item_id and a column for each code.
    If some are equal, all get one more code (0, 1, 2 … among equal ones), as in TIGER. If a code is
    n or more, each level is renumbered without gaps, in its order: 70000, 9, 70000 → 1, 0, 1."""
    found = {}                                       # item id → codes
    for place, row in _rows(path, "item_id"):
        item = row.pop("item_id")
        check(item not in found, f"{place}: item {item!r} stands twice")
        small = [text.isdecimal() and len(text) < 10 for text in row.values()]
        check(all(small) and 0 < len(small) < 7, f"{place}: write 1 to 6 codes from 0 to 999999999")
        found[item] = list(map(int, row.values()))
    missing = [item for item in item_ids if item not in found]
    check(not missing, f"{path}: no line for {len(missing)} items of items.csv, {missing[:3]}…")
    ids = [found[item] for item in item_ids]
    seen = dict.fromkeys(map(tuple, ids), 0)         # ID → how many items had it so far
    if len(seen) < len(ids):
        print(f"{path}: {len(ids) - len(seen)} items have the ID of another; all get one more code")
        for codes in ids:
            seen[tuple(codes)] += 1
            codes.append(seen[tuple(codes)] - 1)
    if max(map(max, ids)) >= len(ids):               # gaps cost memory: a table has K columns
        levels = [np.unique(column, return_inverse=True)[1] for column in np.array(ids).T]
        ids = np.stack(levels, 1).tolist()
    return ids
