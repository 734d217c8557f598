"""Runs of several designs in words: the table and the plain sentences of what `rank_statistics.compare` found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

MOVES = 2  # standard errors: a gain of fewer is not told from noise


def comparison_table(compared: Mapping[str, list]) -> list[dict[str, str]]:
    """One row a run: the columns' names and their texts."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else f"{value:{form}}"

    def gain(entry: Mapping) -> str:
        error = entry["standard_error"]
        return f"{entry['difference']:+.2f}" + ("" if error is None else f" ({error:.2f})")

    def golds(entry: Mapping) -> Iterator[tuple[str, str]]:
        labels = last_parts(entry["golds"])
        for name, gold in entry["golds"].items():
            which = "gold" if len(labels) == 1 else f"gold {labels[name]}"
            rho = "undefined" if gold["spearman"] is None else number(gold["spearman"])
            yield f"{which} gain (SE)", gain(gold)
            yield f"SpearmanR{which[4:]} (interval)", rho + (" ({:.2f} to {:.2f})".format(*gold["interval"]) if gold["interval"] else "")
            yield f"{which} peaks at", str(gold["peak"])

    return [
        {
            "run": entry["name"],
            "design": entry["design"],
            "steps": "{} to {}".format(*entry["steps"]),
            "proxy gain (SE)": gain(entry["proxy"]),
            **dict(golds(entry)),
            "tokens": " -> ".join(number(value, ".0f") for value in entry["tokens"]),
            "repetition": " -> ".join(map(number, entry["repetition"] or (None, None))),
            "KL last": number(entry["kl"][1]),
        }
        for entry in compared["runs"]
    ]


def sentences(compared: Mapping[str, list]) -> list[str]:
    """One plain sentence a run and one for each two runs of different designs, as strong as `MOVES` allows; then what they leave open."""
    entries = {entry["name"]: entry for entry in compared["runs"]}
    designs = [entry["design"] for entry in entries.values()]
    called = {
        name: entry["design"] if designs.count(entry["design"]) == 1 else f"{name} ({entry['design']})" for name, entry in entries.items()
    }
    said = [f"{called[name]}: {_movements(entry)}." for name, entry in entries.items()]
    for pair in compared["pairs"]:
        first, second = (entries[name] for name in pair["runs"])
        if first["design"] != second["design"]:
            said += [_apart(called, pair["runs"], gold, gain) for gold, gain in _named_golds(pair["golds"])]
            if first["steps"] != second["steps"]:
                said.append("{} and {} were compared over different steps, {} to {} and {} to {}.".format(
                    *(called[name] for name in pair["runs"]), *first["steps"], *second["steps"]))  # fmt: skip
    if "best_of_n" in compared:
        said += _beside_best_of_n(compared, called)
    for names in compared["unpaired"]:
        said.append("{} and {} answered different prompts, so their gains are not paired.".format(*(called[name] for name in names)))
    return [*said, "Standard errors are over prompts. They say nothing of another seed."]


def _beside_best_of_n(compared: Mapping[str, list], called: Mapping[str, str]) -> Iterator[str]:
    """For each run whose own proxy rose, gold and best-of-n of its design: whether both move gold the same way."""
    words = {1: "rises", 0: "does not move", -1: "falls"}
    for run, chosen in ((run, chosen) for run in compared["runs"] for chosen in compared["best_of_n"] if chosen["design"] == run["design"]):
        for (name, under_ppo), best in zip(_named_golds(run["golds"]), (chosen["golds"][gold] for gold in run["golds"])):
            directions = _direction(under_ppo), _direction(best)
            if run["own"] and None not in directions and _direction(run["proxy"]) == 1:
                agree = "agree" if directions[0] == directions[1] else "do not agree"
                yield (
                    f"Best-of-n and PPO {agree} about {called[run['name']]}: {name} {words[directions[1]]} in the best of {chosen['n']} "
                    f"({best['difference']:+.2f}, {_errors(best)}) and {words[directions[0]]} under PPO."
                )


def _movements(entry: Mapping) -> str:
    """What the proxy and the golds of a run did, and what that shows."""
    golds = _named_golds(entry["golds"])
    parts = [_movement("the proxy", entry["proxy"]), *(_movement(name, gain) for name, gain in golds)]
    shown = _shows(_direction(entry["proxy"]), {_direction(gain) for _, gain in golds}) if entry["own"] else ""
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" + (f": {shown}" if shown else "")


def _shows(proxy: int | None, golds: set[int | None]) -> str:
    """What directions of the proxy and of the golds show of a run that was trained on this proxy."""
    if proxy is None or None in golds:
        return ""
    if proxy < 1:
        return "these prompts do not show that PPO raised its reward"
    if len(golds) > 1:
        return "the golds do not agree"
    (gold,) = golds
    return {-1: "the policy over-optimises the proxy", 0: "these prompts do not show that gold follows", 1: "gold follows the proxy"}[gold]


def _movement(what: str, gain: Mapping) -> str:
    direction, size = _direction(gain), abs(gain["difference"])
    if direction is None:
        return f"{what} changes by {gain['difference']:+.2f} (its standard error is not known)"
    if direction == 0:
        return f"{what} does not move ({gain['difference']:+.2f}, {_errors(gain)})"
    return f"{what} {'rises' if direction > 0 else 'falls'} by {_size(size)} ({_errors(gain)})"


def _apart(called: Mapping[str, str], runs: Sequence[str], gold: str, gain: Mapping) -> str:
    """By how much a gold's gain differs between two runs; `gain` is the second's less the first's."""
    direction, (first, second) = _direction(gain), (called[name] for name in runs)
    name = gold[0].upper() + gold[1:]
    if direction == 0:
        return f"{name} does not tell {first} from {second} ({gain['difference']:+.2f}, {_errors(gain)}), paired by prompt."
    more, less = (second, first) if direction > 0 else (first, second)
    return f"{name} differs between the two by {_size(abs(gain['difference']))} ({_errors(gain)}), paired by prompt, " \
           f"in favour of {more} over {less}."  # fmt: skip


def _direction(gain: Mapping) -> int | None:
    """1 for a rise, -1 for a fall, 0 for less than `MOVES` standard errors; None where no standard error is known."""
    difference, error = gain["difference"], gain["standard_error"]
    if error is None:
        return None
    return 0 if abs(difference) < max(MOVES * error, 1e-9) else 1 if difference > 0 else -1


def _errors(gain: Mapping) -> str:
    """A gain in its standard errors, cut, not rounded, so that none looks larger than it is."""
    difference, error = abs(gain["difference"]), gain["standard_error"]
    if error <= 1e-9 * max(1.0, difference):
        return "the same on every prompt"
    count = difference / error
    return f"{int(count)} SE" if count >= 3 else f"{int(10 * count) / 10:.1f} SE"


def _size(value: float) -> str:
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def _named_golds(golds: Mapping[str, Mapping]) -> list[tuple[str, Mapping]]:
    """Each gold's entry under "gold", or "gold <name>" where there are several."""
    labels = last_parts(golds)
    return [("gold" if len(golds) == 1 else f"gold {labels[name]}", entry) for name, entry in golds.items()]


def last_parts(names: Iterable[str]) -> dict[str, str]:
    """The last part of each name that is a path, if that tells them apart."""
    short = {name: name.rstrip("/").rsplit("/", 1)[-1] for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}
