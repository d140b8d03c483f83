"""`make requests-demo`: every step has to succeed, and the certificate reads well in a browser."""

from pathlib import Path

import pytest
from browser import browser

from benchmarks import requests_demo
from ofmu_ray.requests.certificate import NOT_PROVED
from pipelines import cli


def test_a_step_that_fails_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "main", lambda words: int(words[1] == "verify"))
    demo = requests_demo.Demo(tmp_path)
    demo.step(None, "audit")
    with pytest.raises(SystemExit, match="ofmu requests verify ended with status 1"):
        demo.step(None, "verify")


@pytest.mark.full
@pytest.mark.system
def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert requests_demo.main(["--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    (certificate,) = (tmp_path / "demo/requests/certificates").glob("*.json")
    for line in ("promoted", "signed by", "version 2 is withdrawn", f"certificate  {certificate}"):
        assert line in said, said
    with browser(tmp_path) as page:
        page.open(certificate.with_suffix(".html").as_uri())
        text = page.text()
    for line in ("forget_probability against holdout", "passed", "What this does not prove", *NOT_PROVED):
        assert line in text, text
