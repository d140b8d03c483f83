"""`ofmu metrics tofu`: metrics from evaluation logs in the TOFU release's format, as JSON on standard output."""

from __future__ import annotations

import json
import sys

from ofmu_ray.commandline.parse import PlainParser, fail
from ofmu_ray.errors import UserError

PROG = "ofmu metrics"


def main(arguments: list[str] | None = None) -> int:
    """Print the metrics of a log; status 2 with a message for a file in another format."""
    parser = PlainParser(prog=PROG, description=__doc__)
    parser.add_argument("format", choices=["tofu"], help="format of the log")
    parser.add_argument("--log", required=True, help="evaluation log (JSON) of the model")
    parser.add_argument("--retrained-log", help="log of the retrained model; without it forget quality is null")
    try:
        options = parser.parse_args(arguments)
        from ofmu_ray.evaluation.tofu_log import load_log, tofu_metrics

        retrained = load_log(options.retrained_log) if options.retrained_log else None
        metrics = tofu_metrics(load_log(options.log), retrained)
    except UserError as error:
        return fail(error, PROG)
    print(json.dumps(metrics, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
