"""`ofmu plan`: memory, time, communication and cost of an `ofmu unlearn` before it starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofmu_ray.commandline.parse import fail, parse
from ofmu_ray.config.plan import PlanConfig
from ofmu_ray.errors import UserError
from ofmu_ray.planning.planner import planned

PROG = "ofmu plan"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, or 2 for a user's mistake and if nothing fits."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        config = parse(PlanConfig, words, PROG)
        if config.plan.json and not (folder := Path(config.plan.json).parent).is_dir():
            raise UserError(
                f"plan.json = {config.plan.json!r}: cannot be written (no folder {folder}); name another file"
            )
        plan = planned(config)
        if config.plan.json:
            _write(config.plan.json, plan)
    except (UserError, KeyboardInterrupt) as error:
        return fail(error, PROG)
    if config.plan.print:
        from ofmu_ray.planning.table import lines

        print("\n".join(lines(plan)))
    return 0


def _write(path: str, plan: Mapping[str, Any]) -> None:
    """Write the plan to plan.json. Raises UserError: it cannot be written."""
    try:
        Path(path).write_text(json.dumps(plan, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"plan.json = {path!r}: cannot be written ({error.strerror}); name another") from None


if __name__ == "__main__":
    sys.exit(main())
