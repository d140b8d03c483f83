"""`ofmu unlearn`: from a configuration to an unlearned model with metrics, cost and a report."""

from __future__ import annotations

import sys

from ofmu_ray.commandline.parse import fail, parse
from ofmu_ray.commandline.terminal import Terminal, metrics_table, samples, say
from ofmu_ray.config import UnlearnConfig
from ofmu_ray.errors import UserError
from ofmu_ray.runs.outcome import Outcome
from ofmu_ray.runs.run import run

PROG = "ofmu unlearn"


def show(outcome: Outcome) -> None:
    """Print metrics, verdicts, samples, cost and paths."""
    if outcome.metrics.get("before"):
        print(metrics_table(outcome.metrics))
        for verdict in filter(None, map(outcome.run.get, ("forgetting", "level", "generations"))):
            print(verdict)
        if outcome.run.get("samples"):
            print(samples(outcome.run["samples"]))
    cost = outcome.cost
    passes, seconds = cost["gradient_passes"], cost["seconds"]
    print(
        f"\ncost    {passes['forget']} forget + {passes['retain']} retain passes, {cost['updates']} updates, "
        f"{cost['tokens']} tokens, {cost['flops']:.2e} FLOPs, {seconds['rounds']:.1f} s in rounds, "
        f"{sum(spent for name, spent in seconds.items() if name != 'rounds'):.1f} s in this command"
    )
    print(f"model   {outcome.run['model']}\nreport  {outcome.run['report']}\nmlflow  {outcome.run['mlflow']}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, 2 for a user's mistake, 1 if the run stopped early."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        outcome = run(parse(UnlearnConfig, words, PROG), Terminal(), [*PROG.split(), *words])
    except (UserError, KeyboardInterrupt) as error:
        return fail(error, PROG)
    if outcome.reused:
        say(f"{outcome.name} is already finished; --name NEW runs it again\n")
    show(outcome)
    if outcome.hub:
        say(f"hub     {outcome.hub}")
    if outcome.message:
        say(f"stopped {outcome.message}")
    return 0 if outcome.finished else 1


if __name__ == "__main__":
    sys.exit(main())
