"""Write the toy world: a small log with exposure bias, and the true tastes behind it.

    python data/toy/prepare.py --out DIR [--items 120 --quality 0 --seed 9]     same bytes always

Half the items of a theme are of one style, half of the other. A user likes one style in each of
three themes: nine in ten of its items, one in ten of the theme's others, and one in a hundred of
all other items. Titles name the theme, not the style. The log shows only a part of that: an item of
rank r in its theme is shown in proportion to 1/r^2.5. So half of the items are in the log of two
users at most: a long tail. Popularity is partly earned (--quality Q): users like the best item of a
favourite theme with a chance 0.3·Q higher, the worst with 0.3·Q lower. Ranks go by (1 - Q) · random
rank + Q · rank in quality: at 0, popularity says nothing about quality. All figures were chosen
with untrained recommenders alone: they compare as on real logs.

    items.csv          item_id, title, genres, theme (which no recommender reads)
    interactions.csv   user_id, item_id, position: shown and liked, in the order of showing
    truth.csv          user_id, liked, shown: item ids; only the evaluation reads it. Liked but
                       never shown is what exposure bias hides.
"""
import argparse
import csv
from pathlib import Path

import numpy as np

# Genre and nouns of each theme; two themes share a genre
THEMES = (("Adventure", ("Harbour", "Tide", "Lighthouse", "Reef")),
          ("Adventure", ("Dune", "Caravan", "Oasis", "Mirage")),
          ("Science", ("Orbit", "Comet", "Nebula", "Signal")),
          ("Science", ("Machine", "Circuit", "Engine", "Automaton")),
          ("Crime", ("Verdict", "Witness", "Alibi", "Jury")),
          ("Crime", ("Vault", "Forger", "Diamond", "Getaway")),
          ("Comedy", ("Recipe", "Bistro", "Supper", "Pepper")),
          ("Comedy", ("Memo", "Meeting", "Elevator", "Intern")),
          ("Fantasy", ("Crown", "Dragon", "Tower", "Spell")),
          ("Fantasy", ("Grove", "Fox", "Lantern", "Thicket")),
          ("Music", ("Aria", "Overture", "Soprano", "Duet")),
          ("Music", ("Trumpet", "Cellar", "Rhythm", "Midnight")))
ADJECTIVES = ("Silent Golden Broken Hidden Last Crimson Endless Little Wild Frozen Lucky Burning "
              "Distant Velvet Second Hollow Gentle Bitter Northern Paper Secret Borrowed Rising "
              "Empty Ancient Rusty Crooked Midwinter Painted Scarlet").split()

def make_titles(items_per_theme, num_themes):
    """(title, genre, theme) of every item; item j of a theme has noun j mod 4; titles differ."""
    rows = []
    for genre, nouns in THEMES[:num_themes]:
        for j in range(items_per_theme):
            adjective = ADJECTIVES[(j // 4 + 7 * j) % len(ADJECTIVES)]
            rows.append((f"{adjective} {nouns[j % 4]}", genre, nouns[0]))
    return rows

def make_user(theme, style, exposure, lift, rng):
    """One user's liked (n,) bool, and shown items in order; theme, style, exposure, lift: (n,)."""
    favourites = rng.permutation(theme[-1] + 1)[:3]
    chance = np.full(len(theme), 0.01)
    for favourite in favourites:
        liked_style = rng.integers(2)
        chance[theme == favourite] = 0.1
        chance[(theme == favourite) & (style == liked_style)] = 0.9
    chance += lift * np.isin(theme, favourites)                # above 1: always, below 0: never
    liked = rng.random(len(theme)) < chance
    left = exposure.copy()                                     # becomes 0 when an item is shown
    mood = favourites[0]
    shown = []
    for _ in range(rng.integers(12, 30)):
        if rng.random() < 0.2:                                 # drawn anew every five items or so
            mood = favourites[rng.integers(len(favourites))]
        # Nine in ten items come from the theme of the mood, the others from anywhere.
        weight = left * (theme == mood) if rng.random() < 0.9 else left
        total = np.cumsum(weight)
        if total[-1] > 0:
            shown.append(int(np.searchsorted(total, rng.random() * total[-1], side="right")))
            left[shown[-1]] = 0
    return liked, shown

def make_world(rng, items_per_theme=60, num_themes=12, quality=0.5):
    """theme, style, exposure and lift, of all items (n,); those of a theme stand together."""
    theme = np.repeat(np.arange(num_themes), items_per_theme)
    places = np.tile(np.arange(items_per_theme), (3, num_themes, 1))    # 0: shown most, or best
    by_chance, by_quality, by_style = rng.permuted(places, axis=2)
    mixed = (1 - quality) * by_chance + quality * by_quality
    ranks = 1 + mixed.argsort(axis=1, kind="stable").argsort(axis=1)
    lift = quality * np.linspace(0.3, -0.3, items_per_theme)[by_quality.ravel()]
    return theme, by_style.ravel() % 2, 1 / ranks.ravel() ** 2.5, lift

def write_csv(path, header, rows):
    """Write one CSV file, whole or not at all; lines end in a line feed on every system."""
    part = path.with_suffix(".part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    part.replace(path)

def write(folder, num_users=1400, items_per_theme=60, num_themes=12, seed=8, quality=0.5):
    """Write the three CSV files of a world (at most of this size) into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    theme, style, exposure, lift = make_world(rng, items_per_theme, num_themes, quality)
    events, truth = [], []
    for user in range(num_users):
        liked, shown = make_user(theme, style, exposure, lift, rng)
        log = [item for item in shown if liked[item]]
        events += [(user, item, position) for position, item in enumerate(log)]
        likes = np.flatnonzero(liked)
        truth.append((user, " ".join(map(str, likes)), " ".join(map(str, shown))))
    items = [(i, *row) for i, row in enumerate(make_titles(items_per_theme, num_themes))]
    write_csv(folder / "items.csv", ["item_id", "title", "genres", "theme"], items)
    write_csv(folder / "interactions.csv", ["user_id", "item_id", "position"], events)
    write_csv(folder / "truth.csv", ["user_id", "liked", "shown"], truth)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder; data/toy holds that of the defaults")
    parser.add_argument("--seed", default=8, type=int, help="of the random numbers (default: 8)")
    parser.add_argument("--users", default=1400, type=int, help="the first ones are the same")
    parser.add_argument("--items", default=60, type=int, help="of a theme (default: 60)")
    parser.add_argument("--quality", default=0.5, type=float, help="Q, 0 to 1 (default: 0.5)")
    args = parser.parse_args()
    right = args.seed >= 0 and args.users > 0 and 4 <= args.items <= 120 and 0 <= args.quality <= 1
    if not right:
        parser.exit(2, "error: --seed ≥ 0, --users ≥ 1, --items 4 to 120, --quality 0 to 1\n")
    if Path(args.out, "items.csv").exists() and not Path(args.out, "truth.csv").exists():
        parser.exit(2, f"error: {args.out} holds other data; write to a new folder\n")
    try:
        write(args.out, args.users, args.items, seed=args.seed, quality=args.quality)
    except OSError as problem:
        parser.exit(2, f"error: {problem}\n")
    print(f"wrote items.csv, interactions.csv and truth.csv to {args.out}")
