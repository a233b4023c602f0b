"""Rows R1, R10 and R18 of the reliability scoreboard, one figure a row.

    python benchmarks/reliability_training.py            the full counts, in minutes
    python benchmarks/reliability_training.py --quick    those of `make test`

The first writes benchmarks/results/reliability_training.json.

R1   SIGKILL at random instants and in the middle of saves, then resume: the state found
     is that of the run never stopped at this step, the state and the files at the end
     are those of that run, bit for bit, and no save that had ended is lost.
R10  Non-finite losses, gradients and layers at 5 % of the steps: weights and moments
     untouched, counted, the schedule waits; K in a row stop the run, with the last good
     state saved and the first non-finite layer named.
R18  The same run in fresh processes on a CPU: bit-equal.

Each row runs its negative controls too, and they must turn it red.
"""
import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gptbook import atomic_files as af
from gptbook import checkpoints as ck
from gptbook import runs, training
from gptbook.accumulation import Accumulate
from gptbook.atomic_files import CheckpointError
from gptbook.averages import WeightAverage
from gptbook.checkpoints import load_state
from gptbook.core import GPTConfig, GPTModel
from gptbook.data import TokenDataset
from gptbook.precision import Float16, precision_for
from gptbook.runs import NonFiniteError, TrainConfig, run_state
from gptbook.schedules import warmup_cosine
from gptbook.training import Precision, compute_gradients, train
from results_file import record

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where fsync is quick
CPU, VOCAB, T = torch.device("cpu"), 37, 16
PRECISIONS = ("bfloat16", "float16", "float32")


# ------------------------------------------------------------------ what is compared


def differences(a, b, where: str = ""):
    """The places where two nested states have other bits; timings are left out."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            yield f"{where} has other names"
        for key in a.keys() & b.keys() - {"seconds"}:
            yield from differences(a[key], b[key], f"{where}.{key}")
    elif type(a) is not type(b):
        yield f"{where}: {type(b).__name__} for {type(a).__name__}"
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f"{where} has {len(b)} items"
        for i, (x, y) in enumerate(zip(a, b)):
            yield from differences(x, y, f"{where}.{i}")
    elif isinstance(a, Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape) or bits(a) != bits(b):
            yield where
    elif repr(a) != repr(b):
        yield where


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def copied(state):
    """A nested state with tensors of its own."""
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return state.clone() if isinstance(state, Tensor) else deepcopy(state)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def one_thread():
    """The children have one; sums must be made in the same order here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------ a run


CONFIG = TrainConfig(steps=26, learning_rate=3e-3, validate_every=5, save_every=2,
                     keep_epochs=2)  # an epoch has 8 steps


def tokens(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, n)


def a_precision(name: str) -> Precision:
    """In float16 the loss scale begins too high and grows soon: its state counts."""
    precision = precision_for(name, CPU)
    if name == "float16":
        precision.scaler = torch.amp.GradScaler("cpu", 2.0**24, growth_interval=4)
    return precision


def a_model(seed: int = 0, **sizes) -> GPTModel:
    torch.manual_seed(seed)
    few = dict(vocab_size=VOCAB, context_length=T, emb_dim=16, n_layers=1, n_heads=2)
    return GPTModel(GPTConfig(**{**few, "drop_rate": 0.1, **sizes}))


def start(name: str, out: Path, resume: bool, callbacks=(), config=CONFIG,
          batch_size: int = 6, **sizes):
    """Dropout, three pieces a batch, a schedule, epochs, validation, two averages."""
    data = TokenDataset(tokens(760, 0), T, batch_size)
    model = a_model(config.seed + 99 * resume, **sizes)  # resumed: other first weights
    return train(
        model, data, TokenDataset(tokens(200, 1), T, 3), config,
        schedule=warmup_cosine(config.steps, 5), precision=a_precision(name),
        gradients=Accumulate(batch_size // 3), resume=resume, out=out, progress=False,
        callbacks=(WeightAverage(model, 0.9), WeightAverage(model, 0.5), *callbacks))


# ------------------------------------------------------------------ R1: never stopped


@dataclass
class Reference:
    """The run that is never stopped."""

    states: dict = field(default_factory=dict)  # step -> state
    weights: set = field(default_factory=set)  # (name, digest) of each file it wrote
    files: dict = field(default_factory=dict)  # name -> digest, at the end
    log: list = field(default_factory=list)
    calls: Counter = field(default_factory=Counter)  # to the disk
    times: list = field(default_factory=list)  # when steps ended

    def note(self, run) -> None:
        self.states[run.step] = copied(run_state(run))
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a step, with what it saves; the first ones import and warm up."""
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:]))

    def save_model(self, path: Path, *args, real=runs.save_model, **info) -> Path:
        self.weights.add((path.name, digest(real(path, *args, **info))))
        return path


@lru_cache
def reference_of(name: str) -> Reference:
    made, disk = Reference(), Aim(None, None)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, one_thread(), \
            mock.patch.object(runs, "save_model", made.save_model), \
            mock.patch.object(af, "_disk", disk):
        out = Path(folder, "run")
        start(name, out, False, [made.note])
        made.files, made.log, made.calls = weights_in(out), log_of(out), disk.calls
    return made


def weights_in(folder: Path) -> dict:
    return {path.name: digest(path) for path in folder.glob("*.safetensors")}


def log_of(folder: Path) -> list:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------ R1: in a child


class Aim:
    """A `_disk` that stops for good in the middle of a certain call, and says so."""

    def __init__(self, at: tuple | None, tell):
        self.at, self.tell, self.calls = at, tell, Counter()  # at: ("write", 17)

    def __call__(self, call, *args):
        self.calls[call.__name__] += 1
        if (call.__name__, self.calls[call.__name__]) != self.at:
            return call(*args)
        if call is os.write:
            call(args[0], args[1][: len(args[1]) // 2])
        self.tell(("aimed", call.__name__))
        time.sleep(600)  # to be killed here


def reporting(what: str, save, tell):
    """A save that says when it begins and when it has ended."""
    def report(path, second, *args, **kwargs):
        tell(("begins", what))
        made = save(path, second, *args, **kwargs)
        tell(("ends", what, second if what == "state" else None))  # the step
        return made

    return report


def save_in_place(folder: Path, step: int, state: dict) -> None:
    """The save that everybody writes first: over the files that are there."""
    save = Path(folder, "save_000001_step_1")
    save.mkdir(parents=True, exist_ok=True)
    for name, pieces in ck._encode_state(step, state).items():
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        file = af._disk(os.open, save / name, flags, 0o666)
        for piece in pieces:
            af._disk(os.write, file, memoryview(piece).cast("B"))
        os.close(file)


def forgetting(part: str):
    """A `restore_run` that leaves one part of the state as a new run has it."""
    def restore(run, state: dict, real=runs.restore_run) -> None:
        fresh, state = run_state(run), dict(state)
        for group in (state, "parts", "counters"):
            if group is state and part in fresh:
                state[part] = fresh[part]
            elif group is not state and part in fresh[group]:
                state[group] = {**state[group], part: fresh[group][part]}
        real(run, state)

    return restore


def child(pipe, folder: Path, name: str, resume: bool, at: tuple | None, flaw: str):
    """A run in a process of its own, which tells all that happens to it."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own would outlive a killed process
    tell, save = pipe.send, save_in_place if flaw == "in place" else runs.save_state
    swaps = [(af, "_disk", Aim(at, tell)),
             (runs, "save_state", reporting("state", save, tell)),
             (runs, "save_model", reporting("weights", runs.save_model, tell))]
    if flaw not in ("", "in place"):
        swaps.append((runs, "restore_run", forgetting(flaw)))
    with ExitStack() as stack:
        for swap in swaps:
            stack.enter_context(mock.patch.object(*swap))
        tell(("step", -1))
        start(name, folder, resume, [lambda run: tell(("step", run.step))])
    tell(("done",))


@lru_cache
def nursery():
    """Where children come from: a process of one thread that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "torch._dynamo",  # which an optimiser imports at its first step
        "gptbook.accumulation", "gptbook.averages", "gptbook.precision",
        "gptbook.schedules"])
    return context


def run_child(*args, kill=lambda event: False) -> list:  # what it told
    """Start a child, and kill it at the event for which `kill` is true."""
    receive, send = nursery().Pipe(duplex=False)
    process = nursery().Process(target=child, args=(send, *args), daemon=True)
    process.start()
    send.close()
    told, killed = [], False
    with suppress(EOFError, OSError):  # the end, or half a message
        while True:
            told.append(receive.recv())
            if not killed and kill(told[-1]):
                process.kill()
                killed = True
    process.join()
    if told[-1] != ("done",) and process.exitcode != -9:
        raise RuntimeError(f"a child failed after {told[-3:]}")
    return told


# ------------------------------------------------------------------ R1: one kill


@dataclass
class Kill:
    """What came of one kill."""

    name: str  # of the precision
    call: str  # the system call in which it came, if that was aimed at
    saving: str  # "state", "weights" or "log", if it came during a save
    found: int | None  # the step of the state that is there
    lost: bool  # whether a save that had ended is gone
    wrong: list  # what was not the same bits, right away or at the end


def killer(rng: random.Random, first: int, last: int, seconds: float):
    """Kill at a random instant after a random step."""
    target = rng.randrange(first, last)

    def kill(event: tuple) -> bool:
        hit = event[0] == "step" and event[1] >= target or event == ("step", -1) and (
            target == first)
        if hit:
            time.sleep(rng.random() * 1.5 * seconds)
        return hit

    return kill


def some_call(calls: dict, left: float, rng: random.Random) -> tuple:
    """A kind of call to the disk, and which one of those that are left."""
    kind = rng.choice(sorted(calls))
    return kind, 1 + rng.randrange(1 + int(calls[kind] * left))


def examine(told: list, before: int | None, folder: Path, name: str) -> Kill:
    """Compare what is on disk after a kill with the run that was never stopped."""
    reference, wrong = reference_of(name), []
    ended = [event[2] for event in told if event[:2] == ("ends", "state")]
    promised = max([*ended, -1 if before is None else before])
    last = [event for event in told if event[0] in ("begins", "ends")][-1:]
    call = told[-1][1] if told[-1][0] == "aimed" else ""
    saving = last[0][1] if last and last[0][0] == "begins" else "log" if call else ""
    try:
        state = load_state(folder / "state")
    except CheckpointError:
        return Kill(name, call, saving, None, promised >= 0, wrong)
    found = state["counters"]["step"]
    wrong += [f"found{w}" for w in differences(reference.states[found], state)]
    strange = weights_in(folder).items() - reference.weights
    wrong += [f"found {file}" for file, _ in strange]
    return Kill(name, call, saving, found, found < promised, wrong)


def at_the_end(folder: Path, name: str) -> list[str]:
    """What a finished run has left that is not what the run never stopped has left."""
    reference = reference_of(name)
    last = reference.states[CONFIG.steps]
    wrong = [f"end{w}" for w in differences(last, load_state(folder / "state"))]
    for what, mine, its in (("weights", reference.files, weights_in(folder)),
                            ("log", reference.log, log_of(folder))):
        wrong += [f"end: {what}{w}" for w in differences(mine, its)]
    return wrong


def leftovers(folder: Path) -> int:
    return len([*folder.rglob(".*.partial")])


def trial(name: str, aims: list, rng: random.Random, flaw="", first=0, last=None):
    """Kill a run once for each of `aims`, resuming in between; then let it end."""
    reference, kills, found = reference_of(name), [], None
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        folder = Path(temporary, "run")
        for aimed in aims:
            done, at = min(max(first, found or 0), CONFIG.steps - 1), None
            kill = killer(rng, done, last or CONFIG.steps, reference.seconds)
            if aimed:
                kinds = ("open", "write") if flaw == "in place" else reference.calls
                at = some_call({kind: reference.calls[kind] for kind in kinds},
                               1 - (found or 0) / CONFIG.steps, rng)
                kill = lambda event: event[0] == "aimed"
            told = run_child(folder, name, found is not None, at, flaw, kill=kill)
            if told[-1] == ("done",):
                break
            kills.append(examine(told, found, folder, name))
            found = kills[-1].found
            if kills[-1].lost:
                return kills
            if found is None:  # nothing was saved so far: begin anew
                shutil.rmtree(folder, ignore_errors=True)
        if told[-1] != ("done",):
            run_child(folder, name, found is not None, None, flaw)
        wrong = at_the_end(folder, name)
        for kill in kills:
            kill.wrong += wrong
    return kills


def kill_trials(count: int, seed: int = 0, names=PRECISIONS[:1] + PRECISIONS) -> list:
    """So many kills: half of them aimed at a call to the disk, half at any instant."""
    rng, kills, made = random.Random(seed), [], 0
    for name in names:
        reference_of(name)
    with tqdm(total=count, desc="R1 kills", delay=2, disable=None) as bar:
        while len(kills) < count:
            aims = [(made + i) % 2 == 0 for i in range(rng.choice((1, 1, 2)))]
            new = trial(names[made % len(names)], aims[: count - len(kills)], rng)
            kills, made = kills + new, made + 1
            bar.update(len(new))
    return kills


# ------------------------------------------------------------------ R1: controls

CONTROLS = {  # what is forgotten at a resume -> with which precision it shows
    "rng": "bfloat16", "optimizer": "bfloat16", "WeightAverage 1": "bfloat16",
    "precision": "float16", "skipped": "float16", "model": "float32",
    "history": "float32",
}


def forgetful_trials(part: str, count: int, seed: int = 0) -> list:
    """Kills between the middle and the end; the resumed run forgets one thing.

    A kill after the last save is not counted: the resumed run has nothing to do."""
    rng, kills = random.Random(seed), []
    while len(kills) < count:
        new = trial(CONTROLS[part], [False], rng, part, CONFIG.steps // 2,
                    CONFIG.steps - 4)
        kills += [kill for kill in new if kill.found != CONFIG.steps]
    return kills


def in_place_trials(count: int, seed: int = 0) -> list:
    """Kills in the middle of calls to the disk; the save is not atomic."""
    rng, kills = random.Random(seed), []
    while len(kills) < count:
        kills += trial("float32", [True], rng, "in place")
    return kills


def report_r1(count: int, controls: int) -> dict:
    kills = kill_trials(count)
    good = [kill for kill in kills if not kill.wrong and not kill.lost]
    red = {part: sum(bool(kill.wrong) for kill in forgetful_trials(part, controls))
           for part in tqdm(CONTROLS, "R1 controls", delay=2, disable=None)}
    in_place = in_place_trials(max(6, controls))
    calls = Counter(kill.call for kill in kills if kill.call)
    saving = Counter(kill.saving for kill in kills if kill.saving)
    return dict(
        kills=len(kills), equal=len(good), lost=sum(kill.lost for kill in kills),
        during_a_save=saving.total(), during=dict(sorted(saving.items())),
        aimed_at=dict(sorted(calls.items())),
        precisions=dict(sorted(Counter(kill.name for kill in kills).items())),
        before_the_first_save=sum(kill.found is None for kill in kills),
        after_the_last_save=sum(kill.found == CONFIG.steps for kill in kills),
        wrong=sorted({what for kill in kills for what in kill.wrong})[:20],
        controls=dict(kills_each=controls, red=red, in_place_kills=len(in_place),
                      in_place_lost=sum(kill.lost for kill in in_place)))


# ------------------------------------------------------------------ R10: faults


class Faults:
    """A `gradients` socket in which non-finite numbers fall at certain steps."""

    def __init__(self, plan: dict, seed: int = 0):
        self.plan = plan  # step -> "loss", "gradient" or "layer"
        self.rng, self.step, self.bad = random.Random(seed), 0, False
        self.injected = Counter()

    def __call__(self, loss_model, *batch) -> tuple[float, float]:
        where, self.step = self.plan.get(self.step), self.step + 1
        self.injected += Counter([where] * bool(where))
        layers = [m for m in loss_model.modules() if not [*m.children()]]
        parameters, hook = [*loss_model.parameters()], None
        value = self.rng.choice((math.nan, math.inf, -math.inf))
        if where == "layer":
            hook = spoil_output(self.rng.choice(layers), math.nan)
        loss, auxiliary = compute_gradients(loss_model, *batch)
        if where == "layer":
            hook.remove()
        if where == "loss":
            loss = value
        if where == "gradient":
            gradient = self.rng.choice(parameters).grad.view(-1)
            gradient[self.rng.randrange(len(gradient))] = value
        self.bad = not math.isfinite(loss) or not all(
            parameter.grad.isfinite().all() for parameter in parameters)
        return loss, auxiliary


def spoil_output(layer: nn.Module, value: float):
    """From now on one number that this layer gives is not finite."""
    def hook(module, args, output: Tensor) -> Tensor:
        output = output.clone()
        output.view(-1)[output.numel() // 2] = value
        return output

    return layer.register_forward_hook(hook)


def spoil_gradient(layer: nn.Module, value: float):
    """From now on the gradient that arrives at this layer is not finite."""
    def hook(module, args, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * value)

    return layer.register_forward_hook(hook)


def kept_state(run) -> dict:
    """What a step that is skipped must not touch."""
    return copied(dict(model=run.model.state_dict(),
                       moments=run.optimizer.state_dict()["state"]))


class Watch:
    """A callback that compares each step with what the faults should have caused."""

    def __init__(self, faults: Faults, schedule):
        self.faults, self.schedule, self.before = faults, schedule, None
        self.updates = self.skipped = self.touched = 0
        self.wrong = Counter()

    def __call__(self, run) -> None:
        now, row, bad = kept_state(run), run.history[-1], self.faults.bad
        moved = self.before is None or any(differences(self.before, now))
        rate = run.config.learning_rate * self.schedule(self.updates)
        self.updates, self.skipped = self.updates + (not bad), self.skipped + bad
        self.wrong += Counter({
            "a bad step touched weights or moments": bad and moved,
            "a good step changed nothing": not bad and not moved,
            "the schedule moved": row["learning_rate"] != rate,
            "the count": (run.skipped, "skipped" in row) != (self.skipped, bad),
            "a number in the history": not all(map(math.isfinite, row.values())),
            "a weight is not finite": not all(
                value.isfinite().all() for value in now["model"].values()),
        })
        self.before = now


def fault_plan(steps: int, share: float, limit: int, seed: int) -> dict:
    """Faults at random steps, each of a kind; never `limit` of them in a row."""
    rng = random.Random(seed)
    chosen = set()
    while len(chosen) < round(share * steps):
        step = rng.randrange(1, steps)
        near = [chosen >= {*range(first, first + limit)} - {step}
                for first in range(step - limit + 1, step + 1)]
        chosen |= set() if any(near) else {step}
    return {step: rng.choice(("loss", "gradient", "layer")) for step in chosen}


def fault_trial(name: str, steps: int, share: float = 0.05, seed: int = 0, update=None):
    """Train with faults and watch every step."""
    limit = TrainConfig().max_bad_steps
    config = TrainConfig(steps, learning_rate=3e-3, seed=seed,
                         max_bad_steps=limit if update is None else steps + 1)
    faults = Faults(fault_plan(steps, share, limit, seed), seed)
    schedule = warmup_cosine(steps, steps // 10)
    watch, model = Watch(faults, schedule), a_model(seed)
    precision = precision_for(name, CPU)
    if name == "float16":  # faults halve its scale: let it come back
        precision.scaler.set_growth_interval(8)
    with mock.patch.object(training, "update", update or training.update), one_thread():
        train(model, TokenDataset(tokens(1000, 0), T, 4), None, config,
              schedule=schedule, precision=precision, gradients=faults,
              callbacks=[watch], progress=False)
    return watch, model


# ------------------------------------------------------------------ R10: K in a row


def stop_trial(name: str, layer: str, spoil, limit: int, first=3, more=2) -> list[str]:
    """From a step on one layer is broken: the run stops, names it, and can go on."""
    steps = first + limit + more
    config = TrainConfig(steps=steps, save_every=steps, max_bad_steps=limit)
    model, good, hooks, wrong = a_model(), {}, [], []
    data = TokenDataset(tokens(1000, 0), T, 4)

    def breaks(run) -> None:
        if run.step == first:
            good.update(kept_state(run))
            hooks.append(spoil(run.model.get_submodule(layer), math.nan))

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, one_thread():
        again = partial(train, data=data, validation=None, config=config, out=folder,
                        precision=lowest_precision(name), progress=False)
        try:
            again(model, callbacks=[breaks])
            return ["it did not stop"]
        except NonFiniteError as error:
            text = str(error)
        state = load_state(Path(folder, "state"))
        hooks[0].remove()
        gone_on = len(again(a_model(7), resume=True))
    what = "output" if spoil is spoil_output else "gradient at the output"
    counters = {name: state["counters"][name] for name in ("step", "skipped")}
    kept = dict(model=state["model"], moments=state["optimizer"]["state"])
    wrong += [f"saved{w}" for w in differences(good, kept)]
    wrong += ["the counters"] * (counters != dict(step=first + limit, skipped=limit))
    wrong += ["the name"] * (f"numbers are the {what} of {layer};" not in text)
    wrong += ["the steps"] * (f"{first + 1} to {first + limit}" not in text)
    return wrong + ["the run cannot go on"] * (gone_on != steps)


def lowest_precision(name: str) -> Precision:
    """In float16 with no room below the loss scale: the first bad step counts."""
    return Float16(CPU, 1.0) if name == "float16" else precision_for(name, CPU)


def layers() -> list[str]:
    """The names of all layers that hold no others."""
    return [name for name, module in a_model().named_modules()
            if not [*module.children()]]


def stop_trials(names=PRECISIONS, limits=(1, 2, 5)) -> dict:  # what -> what was wrong
    """Every layer, broken forwards and backwards."""
    cases = [(name, layer, spoil, limits[(i + j) % len(limits)])
             for i, layer in enumerate(layers()) for j, name in enumerate(names)
             for spoil in (spoil_output, spoil_gradient)]
    return {f"{name} {layer} {spoil.__name__} {limit}": stop_trial(
                name, layer, spoil, limit)
            for name, layer, spoil, limit in tqdm(
                cases, "R10 stops", delay=2, disable=None)}


# ------------------------------------------------------------------ R10: controls


def careless_update(check):
    """An `update` that steps whenever `check(loss, norm)` says so."""
    def update(run, loss, auxiliary=0.0, precision=Precision()) -> None:
        precision.unscale(run.optimizer)
        parameters = [*run.model.parameters()]
        if check == "zeros":  # "mend" the gradients instead of leaving the step out
            for parameter in parameters:
                parameter.grad.nan_to_num_(0, 0, 0)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()
        good = {"nothing": True, "the loss": math.isfinite(loss), "zeros": True,
                "both": math.isfinite(loss) and math.isfinite(norm)}[check]
        for group in run.optimizer.param_groups:
            group["lr"] = run.learning_rate
        row = dict(step=run.step + 1, learning_rate=run.learning_rate, loss=0.0)
        if good:
            run.optimizer.step()
        run.optimizer.zero_grad()
        run.step, run.skipped = run.step + 1, run.skipped + (not good)
        run.history.append({**row, **({} if good else dict(skipped=1))})

    return update


def impatient_rate(run) -> float:
    """The schedule goes on with each batch, used or not."""
    return run.config.learning_rate * run.schedule(run.step)


def control_trials(steps: int) -> dict:  # what is done badly -> how often it shows
    checks = {check: fault_trial("float32", steps, update=careless_update(check))
              for check in ("nothing", "the loss", "zeros", "both")}
    with mock.patch.object(runs.Run, "learning_rate", property(impatient_rate)):
        checks["the schedule goes on"] = fault_trial("float32", steps)
    found = {check: watch.wrong.total() for check, (watch, _) in checks.items()}
    weights = checks["nothing"][1].parameters()
    spoilt = [weight.isnan().float().mean().item() for weight in weights]
    return dict(violations=found, spoilt_without_a_check=min(spoilt))


def report_r10(steps: int, names=PRECISIONS, stop_names=PRECISIONS) -> dict:
    watches = {name: fault_trial(name, steps)[0]
               for name in tqdm(names, "R10 faults", delay=2, disable=None)}
    stops = stop_trials(stop_names)
    return dict(
        steps=steps * len(watches),
        injected=dict(sorted(sum((w.faults.injected for w in watches.values()),
                                 Counter()).items())),
        skipped=sum(watch.skipped for watch in watches.values()),
        wrong=dict(sum((watch.wrong for watch in watches.values()), Counter())),
        stops=len(stops), stopped_and_named=sum(not wrong for wrong in stops.values()),
        failures={what: wrong for what, wrong in stops.items() if wrong},
        controls=control_trials(min(steps, 400)))


# ------------------------------------------------------------------ R18: again


def print_digests(threads: int) -> None:
    """The bits of finished runs, with sums that are long enough to be shared."""
    torch.set_num_threads(threads)
    wanted = [*((name, 0) for name in PRECISIONS), (PRECISIONS[0], 1)]
    found = {f"{name} {seed}": run_digest(name, seed) for name, seed in wanted}
    print(json.dumps(found))


def run_digest(name: str, seed: int) -> str:
    config = replace(CONFIG, steps=10, seed=seed)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        out = Path(folder, "run")
        start(name, out, False, (), config, batch_size=24, emb_dim=64)
        state = load_state(out / "state")
    del state["history"]["seconds"]
    text = repr([(where, bits(value) if isinstance(value, Tensor) else value)
                 for where, value in leaves(state) if where != ".facts.seed"])
    return hashlib.sha256(text.encode()).hexdigest()


def leaves(state, where: str = ""):
    """Everything in a nested state, with its place."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in items:
            yield from leaves(value, f"{where}.{key}")
    else:
        yield where, state


def fresh(threads: int = 1) -> dict:  # "precision seed" -> digest
    """The same runs in a process that has just been started."""
    call = [sys.executable, __file__, "--digest", str(threads)]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths,
                   "OMP_WAIT_POLICY": "passive"}  # threads that wait leave the cores
    environment.pop("PYTHONHASHSEED", None)  # hashes differ from process to process
    told = subprocess.run(call, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(told.stdout)


def report_r18(count: int, two_threads: int) -> dict:
    bar = partial(tqdm, delay=2, disable=None)
    one = [fresh() for _ in bar(range(count), "R18 runs")]
    two = [fresh(2) for _ in bar(range(two_threads), "R18 with two threads")]
    return dict(
        runs=count, equal=sum(found == one[0] for found in one),
        precisions=list(PRECISIONS), two_threads=dict(
            runs=len(two), equal=sum(found == two[0] for found in two),
            same_bits_as_one=sum(found == one[0] for found in two)),
        controls=dict(another_seed_differs=another_seed_differs(one[0])))


def another_seed_differs(found: dict) -> bool:
    return found[f"{PRECISIONS[0]} 0"] != found[f"{PRECISIONS[0]} 1"]


# ------------------------------------------------------------------ the report


def verdicts(r1: dict, r10: dict, r18: dict) -> dict:  # row -> whether it is green
    """A row is green if all is as it should be and each control turned red."""
    red, spoilt = r1["controls"], r10["controls"]
    violations = dict(spoilt["violations"])
    return {
        "R1": r1["equal"] == r1["kills"] and not r1["lost"] and red["in_place_lost"] > 0
        and all(n == red["kills_each"] for n in red["red"].values()),
        "R10": not r10["wrong"] and r10["stopped_and_named"] == r10["stops"]
        and violations.pop("both") == 0 and min(violations.values()) > 0
        and spoilt["spoilt_without_a_check"] == 1.0,
        "R18": r18["equal"] == r18["runs"] and r18["controls"]["another_seed_differs"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the counts of make test")
    parser.add_argument("--digest", type=int, metavar="THREADS",
                        help="only print the bits of finished runs (used by R18)")
    args = parser.parse_args()
    if args.digest:
        return print_digests(args.digest)
    quick = args.quick
    r1 = report_r1(*((10, 1) if quick else (240, 8)))
    print(f"R1   {r1['equal']}/{r1['kills']} kills, of them {r1['during_a_save']} in a "
          f"save: equal bit for bit; {r1['lost']} saves lost")
    r10 = report_r10(*((200, PRECISIONS, PRECISIONS[2:]) if quick else (2000,)))
    print(f"R10  {r10['skipped']} of {r10['steps']} steps skipped, "
          f"{sum(r10['wrong'].values())} not as they should be; stopped and named "
          f"{r10['stopped_and_named']}/{r10['stops']}")
    r18 = report_r18(*((3, 0) if quick else (10, 3)))
    print(f"R18  {r18['equal']}/{r18['runs']} fresh processes: equal bit for bit")
    green = verdicts(r1, r10, r18)
    for row, figures in zip(green, (r1, r10, r18)):
        colour = "green" if green[row] else "RED"
        print(f"{row}: {colour}, controls {figures['controls']}")
    if not quick:
        record("reliability_training", {"R1": r1, "R10": r10, "R18": r18})
    sys.exit(not all(green.values()))


if __name__ == "__main__":
    main()
