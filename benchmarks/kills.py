"""SIGKILLs at file events and at random moments; after each the same command again: the end must be that of the run left alone.

    python benchmarks/kills.py                          # all scenarios; the log goes to assets/killed_run/kills.txt
    python benchmarks/kills.py --scenarios ppo pruning --log=kills.txt

Each try starts a command, kills it, starts it again (every other try kills it twice), and compares every file with those of the run that
was left alone, byte for byte; times in metrics are left out. Nothing may be left beside them: no lock, no partial file. Rollouts are also
looked at between a kill and the next start: no rows stand beside a record of others.

A file event is what Python tells its audit hooks: a file opened for writing, made, renamed, cut or removed. The process dies before it.
A warm parent forks, so that a try takes as long as the command's own work on a two-layer model.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from conftest import ROWS, save_tiny_gold, save_tiny_model  # noqa: E402

from parts import runs  # noqa: E402
from parts.cli import Settings, parse_settings, setting  # noqa: E402
from parts.errors import InputError, run_main  # noqa: E402
from parts.files import digest, file_digest  # noqa: E402

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


@dataclass
class KillSettings(Settings):
    scenarios: list[str] = setting([], "which to run; empty means all")
    log: str = setting("assets/killed_run/kills.txt", "file that receives a line a try", written=True)
    share: float = setting(1.0, "share of the tries to make", above=0, most=1)
    seed: int = setting(0, "seed of the moments", least=0)


@dataclass(frozen=True)
class Scenario:
    """A command, and how often it is killed.

    Args:
        script, words: the command.
        events, moments: tries that die at a file event, spread over all of them, and at a random moment.
        before: commands whose outputs are there at the start.
        processes: how many run it together.
        holds: raises AssertionError where what is on disk between two starts is wrong.
    """

    script: str
    words: list[str]
    events: int
    moments: int
    before: list[tuple[str, list[str]]] = field(default_factory=list)
    processes: int = 1
    holds: Callable[[], None] = lambda: None


# --------------------------------------------------------------------------------------------------------------- children


def count_events(place: Path, deadly: int) -> Callable[[], int]:
    """Count this process's file events below `place`, and die at the one numbered `deadly` (from 1; 0: never)."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = args
            if not flags & WRITES:
                return
        elif event in CHANGES:
            path = args[0]
        else:
            return
        inside = isinstance(path, str | os.PathLike) and (str(path).startswith(str(place)) or not Path(path).is_absolute())
        if inside and "__pycache__" not in str(path):
            count += 1
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def start(scenario: tuple[str, list[str]], place: Path, log: Path, deadly: int = 0, environment: dict[str, str] | None = None) -> int:
    """Fork, run a command in the child, and return the child's number. Its output goes to `log`, the count of its events to `log`.events."""
    script, words = scenario
    if child := os.fork():
        return child
    code = 1
    try:
        os.setsid()
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment or {})
        os.chdir(REPOSITORY)
        sys.argv = [f"{script}.py", *words]
        events = count_events(place, deadly)
        run_main(import_module(script).main)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - a child says all, and never goes on in the parent's place
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 0 and os.environ.get("RANK", "0") == "0":
            Path(f"{log}.events").write_text(str(events()), encoding="utf-8")
        os._exit(code)


def tail(log: Path) -> str:
    """The end of what the children said, on one line."""
    return " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-600:]


def run(scenario: Scenario, place: Path, log: Path, deadly: int = 0, after: float | None = None) -> list[int]:
    """Run a command to its end, or kill it at an event of its first process or after some seconds; exit codes, negative for signals."""
    environments: list[dict[str, str]] = [{}]
    if scenario.processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {
            "WORLD_SIZE": str(scenario.processes),
            "LOCAL_WORLD_SIZE": str(scenario.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(scenario.processes)]
    command = (scenario.script, scenario.words)
    children = [start(command, place, log, deadly if rank == 0 else 0, own) for rank, own in enumerate(environments)]
    codes: dict[int, int] = {}
    begun = time.monotonic()
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
        late = after is not None and time.monotonic() - begun > after
        if late or any(codes.values()):  # a launcher kills the others, too
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
        if time.monotonic() - begun > 120:
            raise TimeoutError(f"{scenario.script}: hangs")
    return [codes[child] for child in children]


# -------------------------------------------------------------------------------------------------------------- comparing


def contents(place: Path) -> dict[str, str]:
    """Every path below a folder with a digest of what is there; seconds in metrics and their order within a line do not count."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_dir():
            found[name] = "folder"
        elif path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[name] = digest([{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows])
        else:
            found[name] = file_digest(path)
    return found


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """What is missing, left over, or other."""
    return (
        [f"missing {name}" for name in expected if name not in found]
        + [f"left over {name}" for name in found if name not in expected]
        + [f"other {name}" for name in expected if name in found and found[name] != expected[name]]
    )


# -------------------------------------------------------------------------------------------------------------- scenarios


def make_scenarios(place: Path, inputs: Path) -> dict[str, Scenario]:
    """The commands, in `place`, on the small models and rows of `inputs`."""

    def ppo(**more: object) -> list[str]:
        settings = {
            "exp_name": "run", "model_name": inputs / "model", "chat_template_name": "tokenizer", "dataset_path": inputs / "rows.json",
            "dev_prompt_path": inputs / "rows.json", "output_dir": place / "run", "log_with": "none", "overall_steps": 3, "save_freq": 1,
            "output_max_length": 8, "batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "ppo_epochs": 1,
            "learning_rate": "1e-3", "lora_r": 2, "resume_from_checkpoint": "auto", **more,
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in settings.items()]

    def rollouts(**more: object) -> list[str]:
        settings = {"base_model_name": inputs / "model", "data_path": inputs / "eval.json", "max_new_tokens": 8, "batch_size": 2, **more}
        return ["--peft_model_name", f"{place}/run_step_*", *(f"--{name}={value}" for name, value in settings.items())]

    def rows_match_records() -> None:
        for file in place.glob("run_step_*/alpaca-eval-*.meta.json"):
            rows = file.with_name(file.name.replace(".meta.json", ".json"))
            if rows.is_file():
                known = [json.loads(path.read_text(encoding="utf-8")) for path in (rows, file)]
                draws[known[1]["seed"]] = draws.get(known[1]["seed"], {})
                assert draws[known[1]["seed"]].setdefault(rows.name, known[0]) == known[0], f"{rows.name}: rows of another seed's record"

    draws: dict[int, dict[str, list]] = {}
    trained, drawn = ("run_ppo", ppo()), ("evaluation", rollouts())
    scored = ["--output_dir", str(place), "--model_prefix=run", "--include_start=true", f"--gold_model={inputs / 'gold'}", "--batch_size=2"]
    return {
        "ppo": Scenario("run_ppo", ppo(), 40, 12),
        "pruning": Scenario("run_ppo", ppo(save_total_limit=1), 20, 8),
        "all weights": Scenario("run_ppo", ppo(use_peft="false", overall_steps=2), 10, 4),
        "two processes": Scenario("run_ppo", ppo(overall_steps=2), 8, 8, processes=2),
        "rollouts": Scenario("evaluation", rollouts(), 20, 10, [trained], holds=rows_match_records),
        "rollouts overwritten": Scenario(
            "evaluation", rollouts(seed=7, overwrite="true"), 20, 10, [trained, drawn], holds=rows_match_records
        ),
        "scoring": Scenario("eval_monotonicity", scored, 20, 10, [trained, drawn]),
    }


def try_scenario(
    name: str, scenario: Scenario, place: Path, share: float, rng: random.Random, say: Callable[[str], None]
) -> tuple[int, int]:
    """Run a scenario alone, then kill it again and again. Returns the numbers of kills and of tries that ended otherwise."""
    log, initial, alone = (place.with_name(f"{place.name}.{what}") for what in ("log", "initial", "alone"))

    def restore() -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(initial, place)

    for folder in (place, initial, alone):
        shutil.rmtree(folder, ignore_errors=True)
    place.mkdir()
    for command in scenario.before:
        if any(run(Scenario(*command, 0, 0), place, log)):
            raise InputError(f"{name}: a command before it failed: {tail(log)}")
    shutil.copytree(place, initial)
    scenario.holds()
    begun = time.monotonic()
    if any(run(scenario, place, log)):
        raise InputError(f"{name}: fails when left alone: {tail(log)}")
    seconds = time.monotonic() - begun
    scenario.holds()
    expected = contents(place)
    events = int(Path(f"{log}.events").read_text(encoding="utf-8"))
    restore()
    begun = time.monotonic()
    run(scenario, place, log)
    seconds = min(seconds, time.monotonic() - begun)
    if again := differences(contents(place), expected):
        raise InputError(f"{name}: two runs left alone differ: {'; '.join(again[:5])}")
    say(f"== {name}: {len(expected)} paths, {events} file events, {seconds:.1f} s left alone")

    count, most = max(1, round(share * scenario.events)), max(1, round(share * scenario.moments))
    tries: list[dict] = [
        {"deadly": number} for number in sorted({1 + round(step * (events - 1) / max(1, count - 1)) for step in range(count)})
    ]
    tries += [{"after": rng.uniform(0, seconds)} for _ in range(most)]  # some end before: these are no kills
    kills = failed = 0
    for number, moment in enumerate(tries):
        restore()
        moments, problems, codes = [moment], [], []
        if number % 2:
            moments.append({"after": rng.uniform(0, seconds)})
        try:
            for deadly in moments:
                codes = run(scenario, place, log, **deadly)
                kills += any(code == -signal.SIGKILL for code in codes)
                problems += [f"exit {code}" for code in codes if code not in (0, -signal.SIGKILL) and scenario.processes == 1]
                scenario.holds()
            if any(codes := run(scenario, place, log)):
                problems.append(f"the last start ended with {codes}: {tail(log)}")
            scenario.holds()
        except (AssertionError, TimeoutError) as error:
            problems.append(str(error))
        problems += differences(contents(place), expected)
        failed += bool(problems)
        where = " and ".join(f"event {one['deadly']}" if "deadly" in one else f"{one['after']:.2f} s" for one in moments)
        say(f"{name}, killed at {where}: {'; '.join(problems[:6]) or 'equal'}")
    return kills, failed


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    settings = parse_settings(KillSettings, description=__doc__)
    begun, cpu = time.monotonic(), os.times()
    for module in (
        "run_ppo",
        "evaluation",
        "eval_monotonicity",
        "trl",
        "parts.ppo_setup",
        "parts.ppo_state",
        "parts.report",
        "parts.gold_models",
    ):
        import_module(module)  # what the children share
    import torch

    torch.set_num_threads(1)
    commit = runs._commit()
    runs._commit = lambda: commit  # the checkout may be worked on meanwhile
    folder = tempfile.mkdtemp()  # not a TemporaryDirectory, which every child would remove
    with Path(settings.log).open("w", encoding="utf-8") as log:

        def say(line: str) -> None:
            line = line.replace(folder, "")
            print(line, flush=True)
            print(line, file=log, flush=True)

        inputs, place = Path(folder) / "inputs", Path(folder) / "work"
        inputs.mkdir()
        (inputs / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
        rows = [
            {"dataset": "d", "instruction": row["input"], "output": row["output"], "generator": "g", "qtype": row["qtype"]} for row in ROWS
        ]
        (inputs / "eval.json").write_text(json.dumps(rows), encoding="utf-8")
        if not (child := os.fork()):
            save_tiny_gold(save_tiny_model(inputs / "model"), inputs / "gold")
            os._exit(0)
        os.waitpid(child, 0)
        scenarios = make_scenarios(place, inputs)
        if unknown := [name for name in settings.scenarios if name not in scenarios]:
            raise InputError(f"--scenarios holds {unknown[0]!r}, expected {', '.join(scenarios)}")
        rng, kills, failed = random.Random(settings.seed), 0, 0
        for name in settings.scenarios or scenarios:
            found = try_scenario(name, scenarios[name], place, settings.share, rng, say)
            kills, failed = kills + found[0], failed + found[1]
        used = os.times()
        spent = sum((used.user, used.system, used.children_user, used.children_system)) - cpu.user - cpu.system
        say(f"== {kills} kills, {failed} tries that ended otherwise; {time.monotonic() - begun:.0f} s, {spent:.0f} s of them on the CPU")
    shutil.rmtree(folder)
    sys.exit(bool(failed))


if __name__ == "__main__":
    run_main(main)
