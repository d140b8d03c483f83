"""The report on known vulnerabilities, against a server for OSV's protocol on loopback."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parent.parent / ".ci/audit.py"
ADVISORY = {
    "id": "GHSA-aaaa-bbbb-cccc",
    "summary": "an example",
    "affected": [
        {
            "package": {"name": "numpy", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.1.1"}]}],
        }
    ],
}


class Advisories(BaseHTTPRequestHandler):
    """One advisory for numpy, none for anything else."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"vulns": [ADVISORY]} if request["package"]["name"] == "numpy" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        """Nothing on the terminal."""


@pytest.fixture
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Advisories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()
    server.server_close()


def audit(folder: Path, url: str, *options: str) -> subprocess.CompletedProcess[str]:
    pins = folder / "pins.txt"
    pins.write_text("numpy==2.1.0\nscipy==1.15.0\n")
    settings = {"PIP_AUDIT_VULNERABILITY_SERVICE": "osv", "PIP_AUDIT_OSV_URL": url}
    command = [sys.executable, str(AUDIT), str(pins), *options]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)


@pytest.mark.system
def test_a_known_vulnerability_is_reported_with_its_fix(tmp_path, service):
    report = audit(tmp_path, service)
    assert report.returncode == 0, report.stderr
    assert "2 pins, 1 with known vulnerabilities, 0 not looked up" in report.stdout
    assert "numpy 2.1.0: GHSA-aaaa-bbbb-cccc, fixed in 2.1.1" in report.stdout
    assert audit(tmp_path, service, "--strict").returncode == 1


@pytest.mark.system
def test_an_unreachable_database_is_said_and_is_no_clean_bill(tmp_path):
    report = audit(tmp_path, "http://127.0.0.1:9/v1/query", "--strict")
    assert report.returncode == 2
    assert "could not be audited" in report.stdout
