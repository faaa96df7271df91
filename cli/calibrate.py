"""``haltkit calibrate``: the most eager threshold of a policy that a certificate can be given for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from haltkit.cli.device import Device
from haltkit.cli.options import (
    Data,
    Draw,
    JsonPath,
    MaxLoops,
    Model,
    Text,
    WithoutCertificate,
    among,
    given_policies,
    read_thresholds,
    seed_option,
)
from haltkit.cli.subjects import asked_options, resolve
from haltkit.cli.terminal import check_writable, make_console, progress, say, say_standing, tell, write_results


def calibrate(
    context: typer.Context,
    model: Model = None,
    policy: Annotated[
        str,
        typer.Option(
            metavar="SPEC", help="One policy, or one per region; without tau, thresholds are tried. Or a card."
        ),
    ] = "norm",
    without_certificate: WithoutCertificate = False,
    risk: Annotated[
        str, among("disagreement|loss-gap|answer", "Against full depth, or against the labels.")
    ] = "disagreement",
    epsilon: Annotated[float, typer.Option(help="The risk that you accept.")] = 0.01,
    delta: Annotated[float, typer.Option(help="Accepted probability that the promise fails.")] = 0.05,
    method: Annotated[
        str, among("betting|hoeffding-bentkus|binomial|conformal", "How losses become evidence.")
    ] = "betting",
    by: Annotated[str | None, among("step|region", "A threshold for each step, or for each region.")] = None,
    taus: Annotated[str, among("auto|LIST", "Thresholds to test.")] = "auto",
    loss_bound: Annotated[float, typer.Option(help="Where loss-gap is cut.")] = 1.0,
    seed: Annotated[int, seed_option("Of the order in which betting uses the units.")] = 0,
    save: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write a card with the certificate.")] = None,
    max_loops: MaxLoops = 32,
    sequences: Annotated[
        int | None,
        typer.Option(min=2, max=10_000_000, help="Sequences to run, the first batch included. \\[default: 704]"),
    ] = None,
    draw: Draw = 0,
    text: Text = None,
    data: Data = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per batch.")] = 8,
    device: Device = "auto",
    json_path: JsonPath = None,
) -> None:
    """Certify a policy on live runs: its risk is at most epsilon with probability 1 - delta."""
    from haltkit.card import Card
    from haltkit.comparison.certify import certify, check_asked
    from haltkit.comparison.choice import save_certified, undescribed

    check_asked(risk, method, seed, by)
    if not 0 < delta < 1:
        raise ValueError(f"--delta {delta} is outside (0, 1): it is the probability that the promise fails")
    bound = loss_bound if risk == "loss-gap" else 1.0
    if not 0 < epsilon < bound:
        most = "--loss-bound" if risk == "loss-gap" else "the greatest risk"
        raise ValueError(f"--epsilon {epsilon} is outside (0, {bound:g}): it is the risk that you accept, below {most}")
    tried, given = read_thresholds(taus), given_policies(policy, without_certificate)
    if len(given) != 1:
        raise ValueError(f"--policy {policy}: a certificate is about one policy, and these are {len(given)}")
    json_path = check_writable(json_path)
    if save is not None:
        Card.check_folder(save)
    options = {"text": text, "data": data, "max_loops": max_loops, "batch": batch, "sequences": sequences or 704}
    options["draw"] = draw
    passes = {"split": "validation", "execution": "compact", "ragged": True}
    with progress("loading the model") as tick:
        subject = resolve(model, options | passes, asked_options(context), device)
        tick(description=f"full depth on {len(subject.samples)} samples")
        found = certify(
            subject,
            given[0],
            risk=cast(Any, risk),
            epsilon=epsilon,
            delta=delta,
            by=cast(Any, by),
            taus=tried,
            method=cast(Any, method),
            loss_bound=loss_bound,
            seed=seed,
            on_setting=lambda setting: tick(description=f"testing {setting.label}"),
        )
    certificate, source = found.certificate, str(subject.about.get("text", subject.name))
    console = make_console(json_path)
    tell(console, f"{certificate.risk}: {certificate.units} of unit {certificate.unit}, {source}")
    if found.standing.without:
        say_standing(console, f"  {policy}", found.standing)
    seen = isinstance(given[0], Card) and given[0].chosen_on(source)
    if seen:
        tell(
            console,
            f"  note: {policy} was chosen on {source} too, and the promise is about sequences that chose nothing: "
            "give others by --text, --data or --draw, or from a function of yours",
        )
    tell(console, f"  {certificate.reason}")
    if found.setting is not None:
        taken = ", ".join(f"{steps:.2f} in {name}" for name, steps in found.steps.items())
        tell(console, f"  certified: {certificate.setting}")
        tell(
            console,
            f"  mean steps: {taken}, of {found.full_depth}; measured risk {certificate.empirical_risk:.4g}",
        )
    tell(console, f"  {certificate.promise}")
    about = {"text": source, "steps": found.steps, "full_depth": found.full_depth, "time": found.time}
    about["seen_before"] = seen
    about["standing"] = str(found.standing) if found.standing.without else ""
    write_results(console, json_path, {**about, "certificate": json.loads(certificate.to_json())})
    if save is not None:
        save_certified(save, found, subject, source)
        say(console, f"Saved {save}")
        if missing := undescribed(subject):
            tell(console, missing)
