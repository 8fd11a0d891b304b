"""Write the toy world: a small catalogue whose users' *true* preferences are known.

    python data/make_toy.py            writes data/toy/*.csv, the same bytes every time

A logging policy with a strong popularity bias decides what a user is shown; the user
likes what fits their taste, shown or not. Only liked items that were shown enter the log:

    interactions.csv   user_id, item_id, position: shown and liked, in the order of showing
    items.csv          item_id, title, genres
    truth.csv          user_id, liked, shown: item ids; liked minus shown is what the user
                       would like but never saw, so exposure bias can be measured
"""
import argparse
import bisect
import csv
import itertools
from pathlib import Path

import numpy as np

# Two themes share a genre, so a genre alone does not give the theme away.
THEMES = {"sea": ("Adventure", "Harbour Tide Lighthouse Reef"), "desert": ("Adventure", "Dune Caravan Oasis Mirage"),
          "space": ("Science", "Orbit Comet Nebula Signal"), "robots": ("Science", "Machine Circuit Engine Automaton"),
          "court": ("Crime", "Verdict Witness Alibi Jury"), "heist": ("Crime", "Vault Forger Diamond Getaway"),
          "kitchen": ("Comedy", "Recipe Bistro Supper Pepper"), "office": ("Comedy", "Memo Meeting Elevator Intern"),
          "castle": ("Fantasy", "Crown Dragon Tower Spell"), "forest": ("Fantasy", "Grove Fox Lantern Thicket"),
          "opera": ("Music", "Aria Overture Soprano Duet"), "jazz": ("Music", "Trumpet Cellar Rhythm Midnight")}
ADJECTIVES = ("Silent Golden Broken Hidden Last Crimson Endless Little Wild Frozen Lucky Burning "
              "Distant Velvet Second Hollow Gentle Bitter Northern Paper Secret Borrowed Rising Empty").split()


def draw(left, right, gone, exposure, before, rng):
    """An item of left … right − 1, none of gone (a sorted list of some of them), drawn in proportion to its exposure.

    before[i] is the exposure of all items before i. A point is drawn on the line of exposures, and jumps over those of
    items that are gone: so a draw costs nothing for the rest of the catalogue.
    """
    place = before[left] + rng.random() * (before[right] - before[left] - sum(exposure[item] for item in gone))
    for item in gone:
        if before[item] <= place:
            place += exposure[item]
    return bisect.bisect_right(before, place) - 1


def make_world(num_users, items_per_theme, num_themes, seed, truth=True):
    """The log and the truth: lists `log`, `liked` and `shown` of item indices for each user.

    Without the truth, whether a user likes an item is drawn for shown items alone, and `liked` holds no others: of 10^5
    items a user likes two thousand.
    """
    rng = np.random.default_rng(seed)
    n = num_themes * items_per_theme
    theme = np.repeat(np.arange(num_themes), items_per_theme)
    # Exposure falls as 1/rank inside a theme; the ranks say nothing about how good an item is.
    rank = np.concatenate([rng.permutation(items_per_theme) for _ in range(num_themes)])
    exposure = (1.0 / (1 + rank)).tolist()
    before = list(itertools.accumulate(exposure, initial=0.0))
    log, liked, shown = [], [], []
    for _ in range(num_users):
        favourites = rng.choice(num_themes, size=min(3, num_themes), replace=False).tolist()
        # A user likes half of each favourite theme and one other item in fifty.
        likes = set()
        if truth:
            likes.update(np.flatnonzero(rng.random(n) < np.where(np.isin(theme, favourites), 0.5, 0.02)).tolist())
        mood, seen = favourites[0], []
        for _ in range(rng.integers(12, 30)):
            if rng.random() < 0.35:                            # moods last about three items
                mood = favourites[rng.integers(len(favourites))]
            # Mostly the current mood; now and then whatever is popular anywhere.
            left, right = (mood * items_per_theme, (mood + 1) * items_per_theme) if rng.random() < 0.9 else (0, n)
            gone = sorted([item for item in seen if left <= item < right])
            if len(gone) < right - left:
                seen.append(draw(left, right, gone, exposure, before, rng))
                if not truth and rng.random() < (0.5 if seen[-1] // items_per_theme in favourites else 0.02):
                    likes.add(seen[-1])
        log.append([item for item in seen if item in likes]), shown.append(seen), liked.append(sorted(likes))
    return log, liked, shown


def titles(num_themes, items_per_theme):
    """(title, genre) of every item; made of a theme's nouns and a common list of adjectives."""
    names = list(THEMES)
    rows = []
    for t in range(num_themes):
        genre, nouns = THEMES[names[t % len(names)]]
        for j in range(items_per_theme):
            noun = nouns.split()[j % 4]
            series = t // len(names) * 10000 + j // len(ADJECTIVES)
            rows.append((f"{ADJECTIVES[j % len(ADJECTIVES)]} {noun}" + (f" {series + 1}" if series else ""), genre))
    return rows


def write(folder, num_users=700, items_per_theme=20, num_themes=12, seed=7):
    """Write the three CSV files of a toy world of any size into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log, liked, shown = make_world(num_users, items_per_theme, num_themes, seed)
    with open(folder / "items.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["item_id", "title", "genres"])
        out.writerows((i, title, genre) for i, (title, genre) in enumerate(titles(num_themes, items_per_theme)))
    with open(folder / "interactions.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["user_id", "item_id", "position"])
        out.writerows((u, i, p) for u, items in enumerate(log) for p, i in enumerate(items))
    with open(folder / "truth.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["user_id", "liked", "shown"])
        out.writerows((u, " ".join(map(str, a)), " ".join(map(str, b))) for u, (a, b) in enumerate(zip(liked, shown)))


def ceiling(log, liked, shown, items_per_theme, seed=0):
    """hidden@10, mean over users, of who knows each user's three favourite themes, and of who knows also what was shown.

    Ten items are drawn from those themes, none that the user had (all but the last of the log, as in a test). Inside a
    theme likes are coin flips, so without knowing them nobody does better on average.
    """
    rng, found = np.random.default_rng(seed), []
    for items, likes, seen in zip(log, liked, shown):
        hidden = set(likes) - set(seen)
        if len(items) < 3 or not hidden:
            continue
        themes = np.argsort(-np.bincount(np.array(likes) // items_per_theme))[:3]
        new = [i for t in themes for i in range(t * items_per_theme, (t + 1) * items_per_theme) if i not in items[:-1]]
        for pool in (new, [i for i in new if i not in seen]):
            found.append(len(hidden & set(rng.choice(pool, min(10, len(pool)), replace=False).tolist())) / len(hidden))
    return float(np.mean(found[::2])), float(np.mean(found[1::2]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=Path(__file__).parent / "toy", help="folder to write (default: data/toy)")
    parser.add_argument("--users", type=int, default=700)
    parser.add_argument("--themes", type=int, default=12)
    parser.add_argument("--items-per-theme", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--ceiling", action="store_true", help="write nothing; print what could be found at best")
    args = parser.parse_args()
    if args.ceiling:
        log, liked, shown = make_world(args.users, args.items_per_theme, args.themes, args.seed)
        themes, both = ceiling(log, liked, shown, args.items_per_theme)
        print(f"hidden@10 of who knows the favourite themes: {themes:.3f}; and what was shown: {both:.3f}")
    else:
        write(args.out, args.users, args.items_per_theme, args.themes, args.seed)
