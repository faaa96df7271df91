"""A certified setting in use, with spot checks: ``haltkit.watch`` runs it, and now and then full depth beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from haltkit.attachment import Session
from haltkit.calibration.certificate import Certificate
from haltkit.calibration.losses import LOSSES, Judged, Loss, as_losses, lost
from haltkit.calibration.spot_checks import SpotChecks
from haltkit.card import Card, OtherModel
from haltkit.driving import Pass
from haltkit.setting import Setting
from haltkit.subject import Subject

__all__ = ["MonitoredRun", "RiskExceeded", "watch", "watch_subject"]

OnAlarm = Callable[[SpotChecks], object]


class RiskExceeded(RuntimeError):
    """The monitor has raised its alarm: what the certificate promises is no longer kept.

    Attributes:
        checks: the spot checks that say so.
    """

    def __init__(self, checks: SpotChecks) -> None:
        monitor = checks.monitor
        super().__init__(
            f"the certified risk of {monitor.epsilon:g} is exceeded: {monitor.risk:.3g} over {monitor.checks} spot "
            f"checks, p-value {monitor.p_value:.2g}. The data are not like those of the calibration, or the "
            "calibration was one of the few whose promise fails: run full depth, and calibrate again on data like these"
        )
        self.checks = checks


class _Runs(Protocol):
    """One unit under the policy and to full depth."""

    def halted(self, sample: Any) -> Any:
        """What a user gets of a sample."""
        ...

    def steps(self) -> tuple[float, float]:
        """Of the newest halted run: its own steps, and those of the same sample at full depth."""
        ...

    def loss(self, output: Any, sample: Any) -> float:
        """Run the sample again to full depth: what halting has lost on it."""
        ...


class MonitoredRun:
    """Runs units under a certified setting, and those that chance picks a second time to full depth.

    Called with a sample, it returns what the setting gives, checked or not. Once the alarm is on, nothing is checked
    any more. For one thread at a time. Made by :func:`watch`.

    Attributes:
        checks: the spot checks so far, a value that can be stored: ``checks.to_json()``.
    """

    def __init__(self, runs: _Runs, checks: SpotChecks, on_alarm: OnAlarm | None) -> None:
        self._runs, self._on_alarm, self.checks = runs, on_alarm, checks

    def __call__(self, sample: Any) -> Any:
        """One unit: whatever is run at once. Its loss is the mean over the sequences in it.

        Raises:
            RiskExceeded: the alarm is on, and there is no ``on_alarm``.
        """
        before = self.checks
        if before.alarm:
            if self._on_alarm is None:
                raise RiskExceeded(before)
            return self._runs.halted(sample)
        output = self._runs.halted(sample)
        steps, full_steps = self._runs.steps()
        if not before.due:
            self.checks = before.passed(steps)
            return output
        self.checks = before.checked(steps, full_steps, self._runs.loss(output, sample))
        if self.checks.alarm:
            if self._on_alarm is None:
                raise RiskExceeded(self.checks)
            self._on_alarm(self.checks)
        return output

    @property
    def alarm(self) -> bool:
        """Whether the certified risk is exceeded; it stays on."""
        return self.checks.alarm


def watch(
    session: Session,
    *,
    rate: float | None = None,
    run: Callable[[Any], Any] | None = None,
    logits: Callable[[Any], Tensor] | None = None,
    loss: Callable[[Any, Any], Tensor | float] | None = None,
    on_alarm: OnAlarm | None = None,
    seed: int = 0,
    delta: float | None = None,
    resume: SpotChecks | None = None,
) -> MonitoredRun:
    """Watch a certified setting in use::

        with haltkit.attach(model, "card/") as session:
            run = haltkit.watch(session, rate=0.02, on_alarm=lambda checks: session.detach())
            for batch in batches:
                output = run(batch)  # instead of model(batch)

    A share ``rate`` of the calls, picked at random whatever is in them, is run a second time to full depth, and what
    halting has lost there is a bet against the certificate (:class:`haltkit.calibration.Monitor`). The output is that
    of the halted run in any case. The second run is from the beginning, because rows that see each other have read
    halted ones: it costs ``rate * full depth`` steps per call (:func:`~haltkit.calibration.monitor.spot_check_cost`).

    Args:
        session: of :func:`haltkit.attach` on a card with a certificate.
        rate: the share of calls that are checked, in (0, 1].
        run: one call of the model on a sample; it must do the same both times, so a cache must be made inside. None:
            the model itself.
        logits: from an output to logits ``(B, ..., V)``, as the calibrated Subject had it, where the certificate is
            about predictions. None: the output itself, or its ``logits``.
        loss: from (output, sample) to what is lost, as the calibrated Subject had it, where the certificate is about
            losses.
        on_alarm: called once, with the spot checks, when the risk exceeds the certified one; detaching the session
            there makes all later calls run to full depth. None: the call raises :class:`RiskExceeded`.
        seed: of the draws that pick calls.
        delta: the accepted probability of a false alarm, ever; None: the certificate's.
        resume: spot checks that were stored, which go on with their rate, seed and delta.

    Raises:
        ValueError: no card, or one without a certificate; no rate, or one outside (0, 1]; spot checks of another
            certificate; or no loss where the certificate is about one.
    """
    if session.card is None or session.card.certificate is None:
        raise ValueError(
            "there is nothing to watch: this session's policy is not from a card with a certificate. Attach a card "
            "that 'haltkit calibrate --save' wrote"
        )
    certificate = session.card.certificate
    about = _loss_of(certificate)
    if about in ("loss-gap", "answer") and loss is None:
        raise ValueError(f"the certificate is about {certificate.risk}: give watch the loss=, from (output, sample)")
    checks = _begun(certificate, rate, seed, delta, resume)
    assert session.card.identity is not None  # a card with a certificate has it
    runs = _OfSession(
        session,
        run or session.model,
        about,
        certificate.loss_bound,
        logits or _logits,
        loss,
        session.card.identity.full_depth,
    )
    return MonitoredRun(runs, checks, on_alarm)


def watch_subject(
    subject: Subject,
    card: Card,
    *,
    rate: float | None = None,
    on_alarm: OnAlarm | None = None,
    seed: int = 0,
    delta: float | None = None,
    resume: SpotChecks | None = None,
) -> MonitoredRun:
    """The same for the samples of a subject, with its logits and its loss: ``run(sample)`` gives a ``Pass``.

    Args:
        subject: the model that the card is for.
        card: with a certificate.
        rate, on_alarm, seed, delta, resume: see :func:`watch`.

    Raises:
        ValueError: as :func:`watch`; a card for another model; or logits or labels that the subject lacks.
    """
    if card.certificate is None:
        raise ValueError(
            f"there is nothing to watch: the card promises nothing of {card.policy!r}. Use a card that 'haltkit "
            "calibrate --save' wrote"
        )
    about = _loss_of(card.certificate)
    checks = _begun(card.certificate, rate, seed, delta, resume)
    try:
        card.check(subject.model, subject.regions, subject.full_depth)
        if not subject.full_depth and subject.samples:
            card.check_reach(replace(subject, samples=subject.samples[:1]).look().full_depth)
    except OtherModel as error:  # without its certificate there is nothing to watch
        raise ValueError(
            f"there is nothing to watch: the card's certificate is not about this model "
            f"({'; '.join(error.differences)}). Run 'haltkit calibrate' on this one"
        ) from None
    if about.startswith("disagreement") and subject.logits is None:
        raise ValueError(f"{subject.name} has no logits, so nothing can be said about disagreement")
    if about == "answer" and subject.unit != "wrong":
        raise ValueError(f"the loss of {subject.name} is in {subject.unit}, not right or wrong: there are no labels")
    known = card.identity
    full_depth = subject.full_depth or (0 if known is None else known.full_depth)
    setting = Setting.of(card.policies(subject.regions), subject.regions)
    runs = _OfSubject(replace(subject, full_depth=full_depth), setting, about, card.certificate.loss_bound)
    return MonitoredRun(runs, checks, on_alarm)


def _loss_of(certificate: Certificate) -> Loss:
    for known in LOSSES:
        if known == certificate.loss:
            return known
    raise ValueError(
        f"the certificate is about {certificate.risk!r}, and does not say how that is measured: run 'haltkit "
        "calibrate' of this version, or feed a haltkit.calibration.Monitor with losses of your own"
    )


def _begun(
    certificate: Certificate, rate: float | None, seed: int, delta: float | None, resume: SpotChecks | None
) -> SpotChecks:
    if resume is None:
        if rate is None:
            raise ValueError(
                "a monitored run needs spot checks: give rate=, the share of units that are run to full depth as well"
            )
        return SpotChecks.of(certificate, rate, seed, delta)
    resume.check_for(certificate)
    if rate not in (None, resume.rate):
        raise ValueError(f"rate={rate}: the spot checks that go on have rate {resume.rate}; leave it out")
    if delta not in (None, resume.monitor.delta):
        raise ValueError(f"delta={delta}: the spot checks that go on have delta {resume.monitor.delta}; leave it out")
    return resume


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise ValueError(f"a {type(output).__name__} is no tensor and has no logits: give watch logits=")
    return found


@dataclass
class _OfSession:
    """Calls of a foreign or bundled model that a session is attached to."""

    session: Session
    run: Callable[[Any], Any]
    about: Loss
    bound: float
    logits: Callable[[Any], Tensor]
    of: Callable[[Any, Any], Tensor | float] | None
    full_depth: int
    newest: tuple[float, float] = (0.0, 0.0)

    def halted(self, sample: Any) -> Any:
        tallies = self.session.tally.values()
        before = [(one.mean_steps, one.computed + one.skipped, one.loops) for one in tallies]
        output = self.run(sample)
        steps = full = 0.0
        for one, (mean_steps, went, loops) in zip(tallies, before, strict=True):
            steps += one.mean_steps - mean_steps
            full += min(one.computed + one.skipped - went, (one.loops - loops) * self.full_depth)
        self.newest = steps, full
        return output

    def steps(self) -> tuple[float, float]:
        return self.newest

    @torch.no_grad()
    def loss(self, output: Any, sample: Any) -> float:
        with self.session.at_full_depth():
            full = self.run(sample)
        return float(lost(self.about, self.bound, self._judged(output, sample), self._judged(full, sample)).mean())

    def _judged(self, output: Any, sample: Any) -> Judged:
        if self.about in ("loss-gap", "answer"):
            assert self.of is not None  # watch refuses a certificate about losses without one
            return Judged(losses=as_losses(self.of(output, sample)))
        return Judged(tops=self.logits(output).argmax(-1))


@dataclass
class _OfSubject:
    """Passes of a subject."""

    subject: Subject
    setting: Setting
    about: Loss
    bound: float
    newest: float = 0.0

    def halted(self, sample: Any) -> Pass:
        done = self.subject.run(sample, self.setting)
        told = {} if self.setting.depth is None else self.setting.depth.steps
        mean = {name: float(done.steps[name].double().mean()) for name in done.steps} or told
        self.newest = float(sum(mean.values()))
        return done

    def steps(self) -> tuple[float, float]:
        return self.newest, float(self.subject.full_depth * len(self.subject.regions))

    def loss(self, output: Pass, sample: Any) -> float:
        subject = self.subject
        full = subject.run(sample, subject.full_depth)
        judged = (subject.judged(done.output, sample) for done in (output, full))
        return float(lost(self.about, self.bound, *judged).mean())
