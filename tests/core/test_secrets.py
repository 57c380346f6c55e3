"""Tokens and passwords never reach files or screens."""

import contextlib
import http.server
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsr_jax import compile as plans
from dsr_jax import config as configs
from dsr_jax.core import cli
from dsr_jax.core.errors import ConfigError, DataError
from dsr_jax.core.lock import FolderLock
from dsr_jax.core.provenance import provenance
from dsr_jax.core.secrets import hide_secrets
from dsr_jax.parallel.processes import log

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "AbCdEfGhIjKlMnOp"
PLAIN = "correct horse battery"
URL = "https://user:hunter2hunter2@example.org/x.pt"
SHA = b"a" * 40
SECRETS = (TOKEN, PLAIN, "hunter2hunter2", "MIIEprivate")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (URL, "https://[hidden]@example.org/x.pt"),
        ("s3://b/k?X-Amz-Signature=0a1b&x=1", "s3://b/k?X-Amz-Signature=[hidden]&x=1"),
        (f"--x={TOKEN} y", "--x=[hidden] y"),
        ("-----BEGIN PRIVATE KEY-----\nMII\n-----END PRIVATE KEY-----\n", "[hidden]\n"),
        ("https://example.org:80/a@b", "https://example.org:80/a@b"),
        ("gs://bucket/runs/token_dim=3", "gs://bucket/runs/token_dim=3"),
    ],
)
def test_secrets_are_recognized_by_their_form(text: str, hidden: str) -> None:
    assert hide_secrets(text) == hidden


def test_secrets_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("MY_API_KEY", PLAIN)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert hide_secrets(f"a {PLAIN} false") == "a [hidden] false"
    log(f"reading {PLAIN}")
    cli.show(DataError(f"cannot open {URL}", PLAIN))
    cli.show(RuntimeError(f"cannot open {URL} with {PLAIN}"))
    shown = capsys.readouterr().err
    assert not any(secret in shown for secret in SECRETS) and shown.count("[hidden]") == 5


def test_commands_are_recorded_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", PLAIN)
    monkeypatch.setattr(sys, "argv", ["train", URL, f"--x={PLAIN}", TOKEN])
    with FolderLock(tmp_path):
        text = (tmp_path / ".lock.json").read_text()
    text += json.dumps(provenance())
    assert not any(secret in text for secret in SECRETS) and text.count("[hidden]") == 6


def test_plans_are_recorded_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []

    def report(config: object, topology: object, program: str, subject: Any, keep: object) -> None:
        recorded.append(subject["command"])
        raise ConfigError("compiled")

    monkeypatch.setattr(plans, "compile_report", report)
    words = [f"--config={ROOT / 'configs' / 'digits.py'}", "--topology=v5e:2x2", f"--out={URL}"]
    with pytest.raises(ConfigError, match="compiled"):
        plans.main(words)
    assert "hunter2" not in recorded[0] and "--out=https://[hidden]@example.org" in recorded[0]


def test_a_config_with_a_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = str(ROOT / "configs" / "digits.py")
    monkeypatch.setenv("WANDB_API_KEY", PLAIN)
    for value in (URL, TOKEN, PLAIN):
        with pytest.raises(ConfigError, match="config.log.wandb holds a secret") as caught:
            configs.load(digits, [f"--config.log.wandb={value}"])
        assert value not in str(caught.value)


@pytest.mark.slow
def test_no_file_of_a_run_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials as a host of a cluster has them."""
    key = {"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----\nMIIEprivate\n"}
    (tmp_path / "key.json").write_text(json.dumps(key))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, PLAIN)
    monkeypatch.setenv("DATA_URL", URL)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    run = tmp_path / "run"
    words = [f"--config={ROOT / 'configs' / 'digits.py'}:runlocal", f"--workdir={run}"]
    words += ["--config.train.steps=2", "--config.sample.every_steps=0", "--config.model.depth=2"]
    words += ["--config.eval.classifier=", "--config.eval.num_samples=0"]
    command = [sys.executable, "-m", "dsr_jax.train", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    texts = [done.stdout.encode(), done.stderr.encode()]
    texts += [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert len(texts) > 10
    assert not any(secret.encode() in text for text in texts for secret in SECRETS)


def test_a_traceback_that_ends_a_command_shows_no_secret() -> None:
    code = (
        "from dsr_jax.core.cli import run_main\n"
        "def main():\n"
        "    raise RuntimeError('cannot open ' + 'https://user:' + 'hunter2' + '@x/y')\n"
        "run_main(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-"], input=code, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "RuntimeError: cannot open https://" in done.stderr
    assert "hunter2@" not in done.stderr and "Traceback" in done.stderr


class _Hub(http.server.BaseHTTPRequestHandler):
    """A hub that sends clients to signed URLs, where requests get the server's `statuses`."""

    def do_GET(self) -> None:
        body, headers, status = b"", {}, 200
        if "/revision/" in self.path:
            body = b'{"id": "o/n", "sha": "%s", "siblings": [{"rfilename": "config.json"}]}' % SHA
        elif "/tree/" in self.path:
            body = b'[{"type": "file", "path": "config.json", "size": 2, "oid": "x"}]'
        elif "/resolve/" in self.path:
            status, size = 302, {"X-Repo-Commit": SHA.decode(), "ETag": '"x"', "X-Linked-Size": "2"}
            location = f"http://{self.headers['Host']}/signed?X-Amz-Signature=0a1b2c3d&token=4e5f"
            headers = {**size, "Location": location}
        elif self.path.startswith("/signed"):
            status = next(self.server.statuses)  # type: ignore[attr-defined]
        else:
            status = 404
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def hub() -> Iterator[int]:
    """Serves a hub; yields its port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        server.statuses = itertools.chain([503, 503], itertools.repeat(403))  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.slow
def test_downloads_from_the_hub_show_no_secret(tmp_path: Path) -> None:
    """Its client logs the URLs of requests that it repeats."""
    pytest.importorskip("huggingface_hub")
    code = (
        "from dsr_jax.convert.fetch import fetch_snapshot\n"
        "from dsr_jax.core.cli import run_main\n"
        "run_main(lambda: fetch_snapshot('owner/name'))\n"
    )
    with hub() as port:
        endpoint = f"http://user:hunter2hunter2@127.0.0.1:{port}"
        environment = {"HF_HOME": str(tmp_path), "HF_TOKEN": PLAIN, "HF_ENDPOINT": endpoint}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=100,
        )
    shown = done.stdout + done.stderr
    assert done.returncode == 2 and "cannot be fetched from the hub" in shown
    assert "503" in shown and "/signed?X-Amz-Signature=[hidden]&token=[hidden]" in shown
    assert not any(secret in shown for secret in (*SECRETS, "0a1b2c3d", "4e5f"))
