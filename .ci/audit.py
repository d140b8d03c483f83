"""Report which pinned packages have known vulnerabilities (pip-audit, PyPI's advisory database).

    python .ci/audit.py [constraints.txt]

A report, not a gate: an advisory that appears overnight must not stop an unrelated change, and where the database
cannot be reached nothing is known. The exit status is 0; `--strict` makes it 1 for vulnerabilities and 2 for packages
that could not be looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def audit(pins: str) -> list[dict[str, Any]]:
    """One entry per package: name, version and vulns, or name and skip_reason.

    Raises:
        RuntimeError: pip-audit gave no report (no network).
    """
    command = [sys.executable, "-m", "pip_audit", "--requirement", pins, "--no-deps", "--disable-pip"]
    run = subprocess.run(
        [*command, "--format", "json", "--progress-spinner", "off", "--timeout", "10"], capture_output=True, text=True
    )
    if not run.stdout:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        raise RuntimeError(lines[-1][:200])
    found: list[dict[str, Any]] = json.loads(run.stdout)["dependencies"]
    return found


def main() -> int:
    words = [word for word in sys.argv[1:] if word != "--strict"]
    pins, strict = (words or ["constraints.txt"])[0], "--strict" in sys.argv
    try:
        packages = audit(pins)
    except RuntimeError as error:
        print(f"audit: {pins} could not be audited: {error}")
        return 2 if strict else 0
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    vulnerable = [package for package in packages if package.get("vulns")]
    print(f"audit: {len(packages)} pins, {len(vulnerable)} with known vulnerabilities, {len(unknown)} not looked up")
    for package in vulnerable:
        for vulnerability in package["vulns"]:
            fixed = ", ".join(vulnerability["fix_versions"]) or "no release yet"
            print(f"  {package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}")
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        print(f"  not looked up (the index knows no advisories for them, or was not reached): {shown}")
    if not strict:
        return 0
    return 1 if vulnerable else 2 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
