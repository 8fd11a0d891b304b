"""Write the toy world: a small log with exposure bias, and the true tastes behind it.

    python data/toy/prepare.py        writes three files next to this one, always the same bytes

The four nouns of a theme make two pairs. A user likes one pair in each of three themes: nine in
ten of its items, one in ten of the theme's others, and one in a hundred of all other items.
The log shows only a part of that. An item of rank r in its theme is shown in proportion to 1/r²,
and the ranks are drawn at random: they say nothing about how well an item is liked.

    items.csv          item_id, title, genres
    interactions.csv   user_id, item_id, position: shown and liked, in the order of showing
    truth.csv          user_id, liked, shown: item ids. Liked but never shown is what exposure
                       bias hides. Only the evaluation reads this file, no recommender does.
"""
import argparse
import csv
from pathlib import Path

import numpy as np

# Genre and nouns of each theme. Two themes share a genre, and no title names the pair.
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
              "Empty").split()


def make_titles(items_per_theme, num_themes):
    """(title, genre) of every item; item j of a theme has noun j mod 4."""
    rows = []
    for theme in range(num_themes):
        genre, nouns = THEMES[theme % len(THEMES)]
        for j in range(items_per_theme):
            # In larger worlds words repeat, and a number keeps the titles different.
            number = theme // len(THEMES) * items_per_theme + j // len(ADJECTIVES) + 1
            title = f"{ADJECTIVES[j % len(ADJECTIVES)]} {nouns[j % 4]}"
            rows.append((title if number == 1 else f"{title} {number}", genre))
    return rows


def make_user(theme, pair, exposure, rng):
    """One user's liked (n,) bool, and shown items in order; theme, pair and exposure are (n,)."""
    favourites = rng.permutation(theme[-1] + 1)[:3]
    chance = np.full(len(theme), 0.01)
    for favourite in favourites:
        liked_pair = rng.integers(2)
        chance[theme == favourite] = 0.1
        chance[(theme == favourite) & (pair == liked_pair)] = 0.9
    liked = rng.random(len(theme)) < chance
    left = exposure.copy()                                     # becomes 0 when an item is shown
    mood = favourites[0]
    shown = []
    for _ in range(rng.integers(12, 30)):
        if rng.random() < 0.35:                                # a mood lasts about three items
            mood = favourites[rng.integers(len(favourites))]
        # Nine in ten items come from the theme of the mood, the others from anywhere.
        weight = left * (theme == mood) if rng.random() < 0.9 else left
        total = np.cumsum(weight)
        if total[-1] > 0:
            shown.append(int(np.searchsorted(total, rng.random() * total[-1], side="right")))
            left[shown[-1]] = 0
    return liked, shown


def write_csv(path, header, rows):
    """Write one CSV file; its lines end in a line feed on every system."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write(folder, num_users=700, items_per_theme=20, num_themes=12, seed=7):
    """Write the three CSV files of a world of any size into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    theme = np.repeat(np.arange(num_themes), items_per_theme)
    pair = np.tile(np.arange(items_per_theme) % 4 // 2, num_themes)
    ranks = [1 + rng.permutation(items_per_theme) for _ in range(num_themes)]
    exposure = 1 / np.concatenate(ranks) ** 2
    events, truth = [], []
    for user in range(num_users):
        liked, shown = make_user(theme, pair, exposure, rng)
        log = [item for item in shown if liked[item]]
        events += [(user, item, position) for position, item in enumerate(log)]
        likes = np.flatnonzero(liked)
        truth.append((user, " ".join(map(str, likes)), " ".join(map(str, shown))))
    items = [(i, *row) for i, row in enumerate(make_titles(items_per_theme, num_themes))]
    write_csv(folder / "items.csv", ["item_id", "title", "genres"], items)
    write_csv(folder / "interactions.csv", ["user_id", "item_id", "position"], events)
    write_csv(folder / "truth.csv", ["user_id", "liked", "shown"], truth)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    write(Path(__file__).parent)
