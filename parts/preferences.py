"""Preference pairs: reading them, choosing those to train on, damaging answers, ranking a prompt's answers, counting who is right."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from parts.errors import InputError
from parts.rows import read_rows

FOREIGN, REPETITION, CUT = DAMAGES = ("another prompt's answer", "repetition", "cut")


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer; `kind` is "preference" or the damage done to the worse one."""

    instruction: str
    chosen: str
    rejected: str
    kind: str = "preference"
    systems: tuple[str, ...] = ()

    @property
    def longer_wins(self) -> bool:
        return len(self.chosen) > len(self.rejected)

    @property
    def similar_length(self) -> bool:
        """Whether the lengths in characters are within 25% of the longer one."""
        shorter, longer = sorted((len(self.chosen), len(self.rejected)))
        return shorter >= 0.75 * longer


def read_pairs(path: str) -> list[Pair]:
    """Preference pairs of a file; a line says which rows were left out.

    A preference is 1 or 2. One in between, as AlpacaEval's weighted annotators give it, is for its nearer side; 1.5 and 0 are ties, null and
    NaN no preference, and such rows are left out.

    Raises:
        InputError: the row whose preference is none of these, or no pair.
    """
    pairs, counts, weighted = [], Counter(), 0
    rows = read_rows(path, {"instruction": None, "output_1": None, "output_2": None})
    for number, row in enumerate(rows, start=1):
        given = row.get("preference", "missing")
        if given is None or given != given:
            counts["without a preference"] += 1
            continue
        if isinstance(given, bool) or not isinstance(given, int | float) or not (given == 0 or 1 <= given <= 2):
            raise InputError(f"{path}: row {number}: field 'preference' is {given!r}, expected 1 or 2, or a number between them")
        if given in (0, 1.5):
            counts["a tie"] += 1
            continue
        side = 1 if given < 1.5 else 2
        weighted += given not in (1, 2)
        answers = (row["output_1"], row["output_2"])
        systems = tuple(row[field] for field in ("generator_1", "generator_2") if field in row)
        if strange := [name for name in systems if not isinstance(name, str | None)]:
            raise InputError(f"{path}: row {number}: a generator is {type(strange[0]).__name__}, expected a name")
        pairs.append(Pair(row["instruction"], answers[side - 1], answers[2 - side], systems=systems))
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    if not pairs:
        raise InputError(f"{path}: no row prefers an answer ({reasons})")
    if reasons or weighted:
        between = f"{weighted} between 1 and 2 count for their nearer side" if weighted else ""
        print(
            f"{path}: {len(pairs)} of {len(rows)} pairs"
            + "".join(f"; {what}" for what in (reasons and f"left out: {reasons}", between) if what)
        )
    return pairs


def damage(pair: Pair, other_answer: str, kind: str, rng: random.Random) -> Pair:
    """`pair` with its worse answer replaced by a damaged text."""
    if kind == FOREIGN:
        rejected = other_answer
    else:
        words = pair.chosen.split(" ")
        kept = words[: max(1, int(len(words) * rng.uniform(0.2, 0.6)))]
        rejected = " ".join(kept)
        if kind == REPETITION:
            phrase = " ".join(kept[-rng.randint(3, 25) :])
            while len(rejected) < len(pair.chosen):
                rejected += " " + phrase
    return Pair(pair.instruction, pair.chosen, rejected, kind)


def damaged_pairs(pairs: list[Pair], kinds: Sequence[str], rng: random.Random) -> list[Pair]:
    """Every pair damaged, `kinds` in turn; the foreign answer is the preferred one of the next pair of another prompt."""
    result = []
    for number, pair in enumerate(pairs):
        others = (pairs[(number + step) % len(pairs)] for step in range(1, len(pairs)))
        other = next((other.chosen for other in others if other.instruction != pair.instruction), None)
        result.append(damage(pair, other or "", kinds[number % len(kinds)] if other is not None else CUT, rng))
    return result


def select_pairs(pairs: list[Pair], count: int, fits: Callable[[Pair], bool], rng: random.Random, balanced: bool = True) -> list[Pair]:
    """`count` pairs that fit, drawn at random; `balanced`: the longer answer wins one half and the shorter the other."""
    pairs = rng.sample(pairs, len(pairs))
    if not balanced:
        return list(islice(filter(fits, pairs), count))
    halves = [list(islice((pair for pair in pairs if pair.longer_wins is longer and fits(pair)), count // 2)) for longer in (True, False)]
    each = min(map(len, halves))
    return rng.sample(halves[0][:each] + halves[1][:each], 2 * each)


def by_prompt(pairs: list[Pair], most: int) -> list[list[Pair]]:
    """The pairs of each prompt, up to `most` together, prompts in order of first appearance."""
    prompts: dict[str, list[Pair]] = {}
    for pair in pairs:
        prompts.setdefault(pair.instruction, []).append(pair)
    return [group[start : start + most] for group in prompts.values() for start in range(0, len(group), most)]


def implied(comparisons: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """If a beats b and b beats c, adds a beats c, unless c beats a is given. A comparison is (better, worse)."""
    follow = {(better, worse) for better, middle in comparisons for other, worse in comparisons if middle == other and better != worse}
    return comparisons | {(better, worse) for better, worse in follow if (worse, better) not in comparisons}


def encode_rankings(
    groups: list[list[Pair]], encode: Callable[[str, str], list[int]], rng: random.Random, damaged_texts: bool = True
) -> list[dict]:
    """Each group of one prompt's pairs as token ids of its texts, and who beats whom: preferences, foreign answers, other damages.

    The damaged texts, where wanted, are those of the group's first pair. A foreign answer is worse than all of the group's; the
    preferred answer that repeats itself or ends early is worse than it was whole.
    """
    first = [group[0] for group in groups]
    damages: list[list[Pair]] = []
    if damaged_texts:
        damages = [damaged_pairs(first, (FOREIGN,), rng), damaged_pairs(first[::-1], (FOREIGN,), rng)[::-1]]
        damages.append(damaged_pairs(first, (REPETITION, CUT), rng))
    rankings = []
    for group, *damaged in zip(groups, *damages):
        texts = list(dict.fromkeys(text for pair in group for text in (pair.chosen, pair.rejected)))
        comparisons = {"preference": implied({(texts.index(pair.chosen), texts.index(pair.rejected)) for pair in group})}
        for place, pair in enumerate(damaged, start=len(texts)):
            better = range(len(texts)) if pair.kind == FOREIGN else [texts.index(pair.chosen)]
            comparisons.setdefault(pair.kind, set()).update((one, place) for one in better if pair.rejected != texts[one])
        texts += [pair.rejected for pair in damaged]
        rankings.append(
            {
                "sequences": [encode(group[0].instruction, text) for text in texts],
                "comparisons": [{"kind": kind, "pairs": sorted(ordered)} for kind, ordered in comparisons.items()],
            }
        )
    return rankings


def heldout_sample(pairs: list[Pair], count: int) -> list[Pair]:
    """What accuracy is measured on: `count` random pairs, `count // 2` more of similar length, `count // 2` damaged ones.

    Pairs of equal answers are left out: no score can tell which one is preferred.
    """
    rng = random.Random(0)
    pairs = [pair for pair in rng.sample(pairs, len(pairs)) if pair.chosen != pair.rejected]
    measured, rest = pairs[:count], pairs[count:]
    similar = [replace(pair, kind="similar length") for pair in rest if pair.similar_length][: count // 2]
    return measured + similar + [pair for pair in damaged_pairs(measured[: count // 2], DAMAGES, rng) if pair.rejected != pair.chosen]


def accuracies(pairs: list[Pair], margins: list[float], heldout_systems: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """How often margins are positive: of all preferences, those of similar length, by whether the longer wins, of each damage.

    Returns:
        {group: {"accuracy", "longer_wins", "n"}}, without empty groups; "longer_wins" is what "the longer answer wins" gets right. The
        accuracy of "both lengths alike" is the mean of where the longer and where the shorter wins, as if there were as many of each.
    """
    rows = list(zip(pairs, margins))
    preferences = [row for row in rows if row[0].kind == "preference"]
    longer, shorter = "longer answer preferred", "shorter answer preferred"
    groups = {
        "all preferences": preferences,
        "of systems never trained on": [row for row in preferences if set(row[0].systems) & set(heldout_systems)],
        "lengths within 25%": [row for row in rows if row[0].kind in ("preference", "similar length") and row[0].similar_length],
        longer: [row for row in preferences if row[0].longer_wins],
        shorter: [row for row in preferences if not row[0].longer_wins],
    }
    for kind in DAMAGES:
        groups[f"against {kind}"] = [row for row in rows if row[0].kind == kind]
    found = {
        name: {
            "accuracy": sum(margin > 0 for _, margin in group) / len(group),
            "longer_wins": sum(pair.longer_wins for pair, _ in group) / len(group),
            "n": len(group),
        }
        for name, group in groups.items()
        if group
    }
    if longer in found and shorter in found:
        alike = {"accuracy": (found[longer]["accuracy"] + found[shorter]["accuracy"]) / 2, "longer_wins": 0.5, "n": len(preferences)}
        found["both lengths alike"] = alike
    return found
