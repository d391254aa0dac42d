"""`structcot perturb`: arguments to a plan, and the facts of a run to a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from structcot.errors import ConfigError
from structcot.parallel import jobs_of
from structcot.perturb.apply import Plan
from structcot.perturb.run import perturb_file
from structcot.perturb.spec import KINDS, make_spec, parse_spec


def perturb(
    source: str, to: str, settings: Sequence[str] = (), *, kind: str, fraction: float = 1.0, seed: int = 0, mode: str = "clean"
) -> dict[str, Any]:
    """Perturb the records of `source` into `to` and return the facts of the report.

    Of the settings, `field`, `jobs` and `then` belong to the run, all others to the perturbation; `then` adds one after those before it.

    Raises:
        ConfigError: naming the argument or setting that is wrong.
        DataError: as `perturb_file`.
    """
    if not kind:
        raise ConfigError(f"--kind: is missing; use one of {', '.join(KINDS)}")
    pairs = [(setting.partition("=")[0].strip(), setting.partition("=")[2].strip(), setting) for setting in settings]
    own = [setting for name, _, setting in pairs if name not in ("field", "jobs", "then")]
    specs = [make_spec(kind, fraction, mode, own), *(parse_spec(value, mode) for name, value, _ in pairs if name == "then")]
    if any(spec.kind == "wrong-answer" for spec in specs[1:]):
        raise ConfigError("then: wrong-answer exchanges whole answers, so it comes first; make it --kind")
    of_run = {name: value for name, value, _ in pairs}
    return perturb_file(source, to, Plan(specs=tuple(specs), seed=seed, answer_field=of_run.get("field", "")), jobs_of(of_run))


def summary_of(facts: Mapping[str, Any]) -> str:
    """What a person wants to know first, a line each."""
    lines = [f"{facts['records']:,} records: {facts['changed']:,} changed, {facts['unchanged']:,} as they were"]
    lines += [f"{count:,} left out: {reason}" for reason, count in facts["left_out"].items()]
    for stage in facts["stages"]:
        realised = "nothing to change" if stage["realised_fraction"] is None else f"{stage['realised_fraction']:.4f} done"
        of_records = "" if stage["asked_record_fraction"] == 1.0 else f" in {stage['asked_record_fraction']:g} of the records"
        lines.append(
            f"{stage['kind']}: {stage['asked_fraction']:g} asked{of_records}, {realised}, {stage['changed']:,} of {stage['units']:,} units"
        )
        lines += [f"  {count:,} not applied: {reason}" for reason, count in stage["not_applied"].items()]
    lines += [f"{count:,} not usable: {reason}" for reason, count in facts["unusable"].items()]
    return "\n".join(lines)
