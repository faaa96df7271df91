"""``haltkit watch``: a certified setting on new inputs, with spot checks that raise an alarm."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haltkit.cli.device import Device
from haltkit.cli.grid import print_wrapped
from haltkit.cli.options import Data, Draw, JsonPath, Model, Text, seed_option
from haltkit.cli.subjects import asked_options, is_function, resolve
from haltkit.cli.terminal import check_writable, make_console, progress, say, write_results

if TYPE_CHECKING:
    from haltkit.calibration import Certificate, Monitor, SpotChecks
    from haltkit.watching import MonitoredRun

ALARM = 1  # exit code
LEVEL = 0.95  # of the interval


def watch(
    context: typer.Context,
    card: Annotated[
        Path, typer.Option(metavar="FOLDER", help="A card with a certificate, of 'haltkit calibrate --save'.")
    ],
    model: Model = None,
    rate: Annotated[float, typer.Option(help="Share of calls that are run to full depth as well, in (0, 1].")] = 0.02,
    delta: Annotated[
        float | None,
        typer.Option(help="Accepted probability of a false alarm, ever. \\[default: the certificate's]"),
    ] = None,
    seed: Annotated[int, seed_option("Of the draws that pick calls.")] = 0,
    state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on from the spot checks stored there, and store them.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, max=10_000_000, help="Sequences to run. \\[default: 704]")
    ] = None,
    draw: Draw = 0,
    text: Text = None,
    data: Data = None,
    split: Annotated[str, typer.Option(help="The split of --data.")] = "validation",
    test_set: Annotated[
        str | None, typer.Option(metavar="NAME", help="Test set of a reasoner's task. \\[default: its first]")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per call; a call is what is checked.")] = 1,
    device: Device = "auto",
    json_path: JsonPath = None,
) -> None:
    """Run a certified setting on new inputs, check some at full depth, and raise an alarm if it risks too much.

    Exit code 1: the alarm. It is false with probability at most delta over the whole life of the monitor.
    """
    from haltkit.attachment.saved import load_card
    from haltkit.calibration import SpotChecks
    from haltkit.files import write_text
    from haltkit.watching import watch_subject

    asked = asked_options(context)
    found = load_card(card)
    if found.certificate is None or found.identity is None:
        raise ValueError(f"--card {card}: it has no certificate to watch; make one with 'haltkit calibrate --save'")
    known = _stored(state)
    if known is not None and (given := sorted({"rate", "seed", "delta"} & asked)):
        raise ValueError(f"--{given[0]}: the spot checks in {str(state)!r} go on with their own; leave it out")
    if known is None:
        known = SpotChecks.of(found.certificate, rate, seed, delta)
    if found.certificate.unit == "batch" and "batch" not in asked and not is_function(model):
        raise ValueError("the certificate is about batches: give --batch, the size that they were calibrated with")
    json_path, state = check_writable(json_path), check_writable(state, ("json",))
    options = {"text": text, "data": data, "split": split, "test_set": test_set, "sequences": sequences or 704}
    options["draw"] = draw
    options |= {"batch": batch, "max_loops": found.identity.full_depth, "execution": "compact", "ragged": True}
    own = set() if is_function(model) else {"batch", "max_loops"}  # else a reasoner takes its own
    with progress("loading the model") as tick:
        subject = resolve(model, options, asked | own, device)
        run = watch_subject(subject, found, resume=known, on_alarm=lambda checks: None)
        tick(description="watching", total=len(subject.samples))
        times = _run(run, subject.samples, lambda: tick(advance=1))
    checks, monitor = run.checks, run.checks.monitor
    if not monitor.checks:
        raise ValueError(
            f"none of {checks.units} calls was checked at rate {checks.rate:g}, so nothing is known about the risk: "
            "raise --rate, or run more --sequences"
        )
    if state is not None:
        write_text(state, checks.to_json() + "\n")
    console = make_console(json_path)
    source = str(subject.about.get("text", subject.name))
    for line in _told(checks, found.certificate, found.policy, source, times):
        print_wrapped(console, line)
    if seen := found.chosen_on(source):
        print_wrapped(
            console, f"  note: it was certified on {source} too; inputs of the calibration are no new evidence"
        )
    write_results(console, json_path, {**_values(checks, found.policy, source, times), "seen_before": seen})
    if state is not None:
        say(console, f"state: {state}")
    if checks.alarm:
        raise typer.Exit(ALARM)


@dataclass
class _Times:
    """Seconds of calls, those that were checked apart."""

    checked: list[float] = field(default_factory=list)
    passed: list[float] = field(default_factory=list)

    @property
    def added(self) -> float | None:
        """What spot checks add to the time of all calls, as a share; None where no call was left unchecked."""
        if not self.passed:
            return None
        alone = statistics.fmean(self.passed)
        return (sum(self.checked) + sum(self.passed)) / (alone * (len(self.checked) + len(self.passed))) - 1


def _run(run: MonitoredRun, samples: Sequence[Any], tick: Any) -> _Times:
    """Run samples until the alarm."""
    from haltkit import timing

    times = _Times()
    for sample in samples:
        if run.alarm:
            break
        due = run.checks.due
        (times.checked if due else times.passed).append(timing.clock(partial(run, sample))[0])
        tick()
    return times


def _stored(state: Path | None) -> SpotChecks | None:
    """The spot checks in a file; None where there is no file yet."""
    from haltkit.calibration import SpotChecks
    from haltkit.files import read_json

    if state is None or not state.exists():
        return None
    try:
        return SpotChecks.from_json(json.dumps(read_json(state, "the state", dict)))
    except ValueError as error:
        raise ValueError(f"--state {state}: {error}") from None


def _told(checks: SpotChecks, promised: Certificate, policy: str, source: str, times: _Times) -> list[str]:
    monitor = checks.monitor
    (low, high), (twice, expected) = monitor.interval(LEVEL), _power(monitor)
    added = "" if times.added is None else f", {times.added:+.1%} of the time"
    verdict = (
        f"  ALARM at call {checks.units}: the certificate's risk is exceeded (false with probability at most "
        f"{monitor.delta:g}). Run full depth, and calibrate again on data like these"
        if monitor.alarm
        else f"  no alarm; if the risk were {twice:.3g}, it would take about {expected:.0f} spot checks"
    )
    return [
        f"{policy} on {source}: {checks.units} calls, {monitor.checks} of them checked (rate {checks.rate:g}, seed "
        f"{checks.seed})",
        f"  {promised.risk}: {monitor.risk:.4g}, {LEVEL:.0%} interval {low:.4g} to {high:.4g}; certified "
        f"{monitor.epsilon:g}",
        f"  wealth {monitor.wealth:.3g}, alarm at {1 / monitor.delta:.3g}; p-value {monitor.p_value:.3g}",
        verdict,
        f"  steps per call {checks.mean_steps:.2f}; spot checks add {checks.cost:.2f} (at this rate "
        f"{checks.expected_cost:.2f} on average){added}",
    ]


def _power(monitor: Monitor) -> tuple[float, float]:
    """A risk of twice the certified one, or half-way to the largest loss, and the checks until its alarm."""
    from haltkit.calibration.monitor import checks_until_alarm

    risk = min(2 * monitor.epsilon, (monitor.epsilon + monitor.loss_bound) / 2)
    return risk, checks_until_alarm(risk, monitor.epsilon, monitor.delta, monitor.loss_bound)


def _values(checks: SpotChecks, policy: str, source: str, times: _Times) -> dict[str, Any]:
    monitor = checks.monitor
    return {
        "policy": policy,
        "text": source,
        "calls": checks.units,
        "checks": monitor.checks,
        "rate": checks.rate,
        "seed": checks.seed,
        "epsilon": monitor.epsilon,
        "delta": monitor.delta,
        "risk": monitor.risk,
        "interval": monitor.interval(LEVEL),
        "interval_level": LEVEL,
        "wealth": monitor.wealth,
        "alarm_at": 1 / monitor.delta,
        "p_value": monitor.p_value,
        "alarm": monitor.alarm,
        "power": dict(zip(("risk", "checks"), _power(monitor), strict=True)),
        "steps": checks.mean_steps,
        "cost": checks.cost,
        "expected_cost": checks.expected_cost,
        "time_added": times.added,
        "state": json.loads(checks.to_json()),
    }
