"""`ofmu plan`: memory, time, communication and cost of an `ofmu unlearn` before it starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ofmu_ray.config.plan import PlanConfig
from ofmu_ray.errors import UserError
from ofmu_ray.planning.planner import planned
from pipelines.parse import fail, parse

PROG = "ofmu plan"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, or 2 for a user's mistake and if nothing fits."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        config = parse(PlanConfig, words, PROG)
        plan = planned(config)
    except (UserError, KeyboardInterrupt) as error:
        return fail(error, PROG)
    if config.plan.json:
        Path(config.plan.json).write_text(json.dumps(plan, indent=1) + "\n")
    if config.plan.print:
        from ofmu_ray.planning.table import lines

        print("\n".join(lines(plan)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
