"""What comes from outside: data folders, settings, titles; what cannot be right is refused with the cure.

A data folder holds:

    interactions.csv   user_id, item_id, position or timestamp; optional rating
    items.csv          item_id, then any of title, keywords, genres, category (text)

Ids are any strings. Rows come in any order: users are sorted by id, a user's items by position, so the order of the
rows changes nothing. Equal positions are ordered by a checksum of the ids. Half of ml-100k's ratings carry the same
time as the one before; there, an order by item id (low ones are popular) would move NDCG@10 of the CM from .11 to .09,
its reverse to .15: the split would measure the tie-break.
"""
import argparse
import csv
import difflib
import json
import math
import re
import tempfile
import unicodedata
import zlib
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path

from data import ml_100k

TEXT_COLUMNS = ("title", "keywords", "genres", "category")
# The least and the most of a setting that is a number, where it is not from 1 (or just above 0) to a million.
LIMITS = {"codes": (1, 65536), "width": (32, 8192), "layers": (1, 100), "dropout": (0, 0.99), "lam": (-1, 10 ** 6),
          "trajectories": (0, 1000), "debias": (0, 10)}
LARGEST_JSON = 2 ** 28                                         # bytes: the IDs and titles of two million items


class InputError(ValueError):
    """Something the user can mend: the message names the file, the line and the cure."""


@dataclass
class Dataset:
    """Users' histories over a catalogue; an item is its row number in items.csv."""
    name: str
    item_ids: list                     # n strings
    titles: list                       # n strings: the title, else the keywords, else the id
    texts: list                        # n strings: all text columns joined
    user_ids: list                     # B strings, sorted
    histories: list                    # B lists of item indices, oldest first, no repeats, three or more
    liked: list                        # B lists of bool: liked, or only clicked (by the rating; all liked without one)
    train: list = field(default_factory=list)   # histories without their last two items, the validation and test targets
    dropped_repeats: int = 0           # interactions with an item that the user had already
    dropped_users: int = 0             # users left with fewer than three items
    truth: dict = field(default_factory=dict)   # toy only: {"liked": B sets, "shown": B sets}

    @property
    def sizes(self):
        """What results.json says of the data; the checksum tells other data of the same size apart."""
        content = repr((self.item_ids, self.texts, self.histories, self.liked))
        return {"name": self.name, "users": len(self.histories), "items": len(self.item_ids),
                "interactions": sum(map(len, self.histories)), "checksum": zlib.crc32(content.encode())}


def one_line(text):
    """Text for the screen: line ends, control characters and what cannot be encoded become spaces."""
    return re.sub("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", str(text))


def read_json(path):
    """The JSON object in a file; raises InputError if there is none."""
    try:
        if Path(path).stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON} bytes")
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is a list or a single value")
        return value
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file of this program: {error}") from None


def _rows(path, required):
    """Yield (line number, {column: stripped value}) of a CSV file with these columns."""
    end = 0
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.reader(f, strict=True)
            header = None
            for row in reader:
                line, end = end + 1, reader.line_num           # a quoted field may hold line ends: a row's first line counts
                row = [value.strip() for value in row]
                if "\0" in "".join(row):
                    raise UnicodeError                         # UTF-16, or no text at all
                if not any(row):
                    continue                                   # a blank line
                if header is None:
                    header = [name.lower() for name in row]
                    _check_header(path, header, required)
                elif len(row) != len(header):
                    raise InputError(f"{path}, line {line}: {len(row)} fields, the header has {len(header)}; "
                                     "quote a field that holds a comma or a quote")
                else:
                    yield line, dict(zip(header, row))
            if header is None:
                raise InputError(f"{path} is empty; its first line names the columns, {', '.join(required)} among them")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a data folder holds interactions.csv and items.csv") from None
    except UnicodeError:
        bad = (n for n, raw in enumerate(Path(path).read_bytes().split(b"\n"), 1)
               if b"\0" in raw or raw.decode("utf-8", "ignore").encode() != raw)
        raise InputError(f"{path}, line {next(bad, 1)}: not UTF-8 text; unpack the file if it is compressed, "
                         "or save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {end + 1}: {error}; close every quote, and double those inside quotes") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _check_header(path, header, required):
    twice = [name for name in header if name and header.count(name) > 1]   # a nameless column holds nothing of ours
    if twice:
        raise InputError(f"{path}: column {twice[0][:40]!r} stands twice in the first line; rename or drop one")
    for name in required:
        if name not in header:
            raise InputError(f"{path}: no column {name!r} in the first line, which reads {','.join(header)[:200]!r}; "
                             "it names the columns, with commas between them")


def _number(text, path, line, column):
    """A finite int or Decimal: exact, where a float would make equal times of two nanoseconds, or of 2^53 and the next."""
    try:
        value = int(text) if text.lstrip("+-").isdecimal() else Decimal(text)
        if "_" in text or not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, ArithmeticError):
        raise InputError(f"{path}, line {line}: {column} {text[:40]!r} is not a finite number; write it like 12 or 3.5 "
                         "(a date as seconds)") from None


def _read_items(path):
    ids, titles, texts = [], [], []
    seen = set()
    for line, row in _rows(path, ["item_id"]):
        item = row["item_id"]
        if not item:
            raise InputError(f"{path}, line {line}: item_id is empty")
        if item in seen:
            raise InputError(f"{path}, line {line}: item {item[:40]!r} stands twice; give each item one row")
        seen.add(item)
        ids.append(item)
        titles.append(" ".join(one_line(row.get("title") or row.get("keywords") or item).split()))
        texts.append(" ".join(row[c] for c in TEXT_COLUMNS if row.get(c)))
    if not ids:
        raise InputError(f"{path} has a header but no items")
    return ids, titles, texts


def _read_events(path, index):
    """{user: [(position, tie-break, item, rating or None)]}, unsorted."""
    events = {}
    order = None
    for line, row in _rows(path, ["user_id", "item_id"]):
        order = order or next((c for c in ("position", "timestamp") if c in row), None)
        if order is None:
            raise InputError(f"{path}: no column 'position' or 'timestamp' in the first line; one of them gives the order")
        user, item = row["user_id"], row["item_id"]
        if not user:
            raise InputError(f"{path}, line {line}: user_id is empty")
        if item not in index:
            raise InputError(f"{path}, line {line}: item {item[:40]!r} is not in items.csv; add it there or drop the row")
        rating = float(_number(row["rating"], path, line, "rating")) if "rating" in row else None
        tie = zlib.crc32(f"{user}\t{item}".encode())
        events.setdefault(user, []).append((_number(row[order], path, line, order), tie, index[item], rating))
    if not events:
        raise InputError(f"{path} has a header but no interactions")
    return events


def read_folder(folder):
    """The Dataset of a folder; raises InputError on anything that cannot be right."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; --data takes toy, ml-100k or a folder with interactions.csv and items.csv")
    item_ids, titles, texts = _read_items(folder / "items.csv")
    events = _read_events(folder / "interactions.csv", {item: i for i, item in enumerate(item_ids)})
    data = Dataset(one_line(folder.resolve().name), item_ids, titles, texts, [], [], [])
    ratings = [r for rows in events.values() for *_, r in rows if r is not None]
    if ratings and max(ratings) < 0:
        raise InputError(f"{folder / 'interactions.csv'}: all ratings are negative, and to like is to give 70 % of the "
                         "highest; add a number to all, or drop the column")
    # Liked: at least 70 % of the highest rating, which is 4 and 5 of 5; anything less is only a click.
    threshold = 0.7 * max(ratings) if ratings else None
    for user in sorted(events):
        kept = {}                                              # item → liked; the first place counts
        for *_, item, rating in sorted(events[user]):
            kept.setdefault(item, rating is None or rating >= threshold)
        data.dropped_repeats += len(events[user]) - len(kept)
        if len(kept) < 3:
            data.dropped_users += 1
            continue
        data.user_ids.append(user), data.histories.append(list(kept)), data.liked.append(list(kept.values()))
    if not data.histories:
        raise InputError(f"{folder}: no user has three different items, so nothing is left to train and test on")
    data.train = [history[:-2] for history in data.histories]
    if (folder / "truth.csv").exists():
        data.truth = _read_truth(folder / "truth.csv", item_ids, data.user_ids)
    return data


def _read_truth(path, item_ids, user_ids):
    index = {item: i for i, item in enumerate(item_ids)}
    rows = {row["user_id"]: row for _, row in _rows(path, ["user_id", "liked", "shown"])}
    try:
        return {c: [{index[i] for i in rows[u][c].split()} for u in user_ids] for c in ("liked", "shown")}
    except KeyError as missing:
        raise InputError(f"{path}: user or item {missing} is missing; write it again with data/make_toy.py") from None


def load_data(name):
    """The Dataset that --data names; ml-100k is fetched the first time."""
    here = Path(__file__).parent
    if name == "ml-100k":
        ml_100k.fetch()
    data = read_folder({"toy": here / "toy", "ml-100k": ml_100k.FOLDER}.get(name, name))
    print(f"{data.name}: {len(data.histories)} users, {len(data.item_ids)} items, {sum(map(len, data.histories))} interactions "
          f"(dropped: {data.dropped_repeats} repeats of an item, {data.dropped_users} users with fewer than three items)")
    return data


def parse_arguments(argv, Settings, presets, quick):
    """Flags to (Settings, the other arguments): one flag for each field of Settings, and the few that are no settings.

    presets: {name of a data set: settings that differ there}; quick: what --quick sets.
    """
    parser = argparse.ArgumentParser(description="GFlowGR: fine-tune a generative recommender with a GFlowNet",
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {one_line(message)}; --help lists what there is\n")
    for f in fields(Settings):
        special = "".join(f"; {data}: {preset[f.name]}" for data, preset in presets.items() if f.name in preset)
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), metavar=type(f.default).__name__.upper(),
                            help=f.metadata["help"] + (f" (default: {f.default}{special})" if f.default != "" else ""))
    parser.add_argument("--quick", action="store_true", help="a smoke run in seconds: one epoch of everything")
    parser.add_argument("--resume", action="store_true", help="keep the finished rows in --out and go on")
    parser.add_argument("--sweep", metavar="STUDY", help="run one of the paper's studies: lam, trajectories, positions, reward, sampler, gamma, debias")
    parser.add_argument("--oracle", action="store_true", help="train on four users with TB alone until P = R/Z, and draw it")
    parser.add_argument("--benchmark", action="store_true", help="measure speed: decoding, packing, a step, growth, 10^5 items")
    parser.add_argument("--recommend", nargs="+", metavar="TITLE_OR_ID", help="print ten titles for this history, and stop")
    parser.add_argument("--model", metavar="DIR", help="the saved model for --recommend, such as runs/toy/tb-42")
    args = parser.parse_args(argv)
    chosen = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name) is not None}
    preset = presets.get(chosen.get("data", Settings.data), {})
    settings = Settings(**{**preset, **(quick if args.quick else {}), **chosen})
    settings.out = settings.out or f"runs/{Path(settings.data).resolve().name}{'-quick' if args.quick else ''}"
    if bool(args.recommend) != bool(args.model):
        parser.error("--recommend and --model go together")
    return settings, args


def check(settings, methods, samplers, devices):
    """Methods and seeds as lists; InputError for a setting that makes no sense, before anything is written.

    methods, samplers: all there are, methods in the table's order; devices: those of this machine.
    """
    asked = settings.methods.split(",")
    for method in asked:
        if method not in methods:
            raise InputError(f"--methods: unknown method {method!r}; choose of {', '.join(methods)}")
    asked += [method.split("+")[0] for method in asked]        # tb+cm is the model of tb
    if settings.sampler not in samplers:
        raise InputError(f"--sampler: unknown sampler {settings.sampler!r}; choose of {', '.join(samplers)}")
    if set(asked) - {"pop", "cm"}:
        asked.append("sft")                                    # all the others start from it
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in settings.seeds.split(",")))
        weights = [float(w) for w in settings.weights.split(",")]
    except ValueError as error:
        raise InputError(f"--seeds takes whole numbers and --weights numbers, with commas between them: {error}") from None
    if not all(0 <= seed < 2 ** 63 for seed in seeds):
        raise InputError(f"--seeds {settings.seeds}: they must not be negative, and lie below 2^63")
    if len(weights) != 3 or not all(0 <= w <= 10 ** 6 for w in weights) or not any(weights):
        raise InputError(f"--weights {settings.weights}: give three numbers, none negative, not all 0: w_a,w_ŷ,w_s")
    for f in fields(settings):
        value = getattr(settings, f.name)
        least, most = LIMITS.get(f.name, (1 if isinstance(value, int) else 1e-12, 10 ** 6))
        if isinstance(value, str) and value.encode(errors="ignore").decode() != value:
            raise InputError(f"--{f.name.replace('_', '-')} {value!r} is not UTF-8; rename it")
        if not isinstance(value, str) and not least <= value <= most:
            raise InputError(f"--{f.name.replace('_', '-')} {value}: it is at least {least} and at most {most}")
    if settings.ids not in ("content", "mixed") or settings.width % 32:
        raise InputError(f"--ids is content or mixed, not {settings.ids!r}; "
                         f"--width is a multiple of 32, not {settings.width}")
    if settings.trajectories == 0 and {"sdpo", "vargrad"} & set(asked):
        raise InputError("--trajectories 0 leaves sdpo and vargrad nothing to compare with; give at least 1")
    if settings.device != "auto" and settings.device not in devices:
        raise InputError(f"--device {settings.device} is not here; choose of auto, {', '.join(devices)}")
    return [m for m in methods if m in asked], seeds


def check_size(settings, data):
    """Raises InputError where --codes does not suit the number of items."""
    n, K = len(data.item_ids), settings.codes
    if n > K ** 3:
        raise InputError(f"{n} items do not fit into {K}^3 semantic IDs; raise --codes")
    if (2 + min(n, K) + min(n, K * K)) * K > 2 ** 28:          # the tree's table of children, in the worst case 2 GB
        raise InputError(f"a tree of {n} items with {K} codes a level is too large; lower --codes")


def check_out(settings, data, resume):
    """Raises InputError where --out cannot be written, or holds a run that this one does not compare with."""
    out = Path(settings.out)
    if (out / "items.csv").exists():
        raise InputError(f"--out {out} is a data folder, in which nothing is changed; choose another")
    if (out / "results.json").exists():
        old = read_json(out / "results.json")
        old, sizes = old.get("settings"), old.get("data")
        if not isinstance(old, dict) or not isinstance(sizes, dict):
            raise InputError(f"{out / 'results.json'} is not a results file of this program; choose another --out")
        for f in fields(settings):
            name, value = f.name, getattr(settings, f.name)
            before = old.get(name, f.default)                  # of an earlier version, which did not have it
            if name not in ("methods", "seeds", "out", "device") and before != value:
                raise InputError(f"{out} holds a run with --{name.replace('_', '-')} {before}, not {value}; "
                                 "choose another --out, or delete that folder")
        if any(sizes.get(name, value) != value for name, value in data.sizes.items()):
            raise InputError(f"{out} holds a run on other data: the files in {settings.data} have changed; "
                             "choose another --out, or delete that folder")
    elif resume and any(out.glob("*/row.json")):
        raise InputError(f"{out} holds rows but no results.json, so their settings are unknown; run without --resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise InputError(f"cannot write into --out {out}: {error.strerror}; choose another") from None


def read_row(path, method, seed, users):
    """The row.json of a finished row; InputError where it is damaged, or of another method, seed or number of users."""
    row = read_json(path)
    try:
        figures = [row["metrics"][name] for name in ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "coverage@10")]
        figures += [row["seconds"]["train"]] + [point["ndcg@10"] for point in row["curve"]]
        fits = ((row["method"], row["seed"], len(row["ranks"])) == (method, seed, users)
                and set(row["ranks"]) <= set(range(11)) and all(math.isfinite(x) for x in figures))
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise InputError(f"{path} is not a row of this run; delete it, and --resume makes it again")
    return row


def find_item(name, ids, titles):
    """Index of the item with this id or title; InputError, with near matches, if there is none or more than one."""
    def plain(text):                                           # case, spaces and the form of an é make no difference
        return " ".join(unicodedata.normalize("NFC", text).casefold().split())
    if name.strip() in ids:
        return ids.index(name.strip())
    plain_titles = [plain(title) for title in titles]
    found = [i for i, title in enumerate(plain_titles) if title == plain(name)]
    if len(found) == 1:
        return found[0]
    near = [titles[plain_titles.index(t)][:80] for t in difflib.get_close_matches(plain(name)[:80], plain_titles, 3, 0.4)]
    hint = f"; near: {', '.join(map(repr, near))}" if near else ""
    raise InputError(f"several items have the title {name!r}: give one's id, {', '.join(ids[i] for i in found[:5])}" if found
                     else f"no item has the id or title {name[:80]!r}{hint}")
