"""What `submit` sends and says, without a cluster: uploads, runtime environments, addresses, tokens, versions."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from align_cluster.cli import main
from align_cluster.cluster import checks, private, wheel
from align_cluster.cluster.checks import UNTESTED, packages, pins
from align_cluster.cluster.placement import connect
from align_cluster.cluster.submit import fill, needs_model
from align_cluster.config.load import load
from align_cluster.config.shipped import shipped
from align_cluster.errors import UserError

from .conftest import TINY

ROOT = Path(__file__).parents[2]
UPLOAD = 1_000_000  # bytes that a job may send to the cluster


def zipped(folder):
    """Bytes of a folder as Ray uploads it."""
    return Path(shutil.make_archive(str(folder) + "-sent", "zip", folder)).stat().st_size


@pytest.fixture
def serve():
    """Function (status, content type, body) -> URL of a server that answers everything so."""
    servers = []

    def start(status, kind, body):
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Answer))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def auth(tmp_path, monkeypatch):
    """Where this process looks for Ray's token; there is none at first."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "token"


def all_files_are_here(config):
    blocks = (config.prompts, config.evaluate.prompts)
    named = [getattr(one, name, None) for one in blocks for name in ("path", "folder", "exclude")]
    return all(Path(path).is_file() for path in named if path)


def refused(capsys, *arguments):
    """The one sentence with which `submit` refuses."""
    assert main(["submit", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_what_a_job_uploads_stays_below_a_megabyte_wherever_submit_is_called(tmp_path, monkeypatch):
    (tmp_path / "here" / "runs").mkdir(parents=True)
    (tmp_path / "here" / "runs" / "weights.safetensors").write_bytes(os.urandom(2 * UPLOAD))
    monkeypatch.chdir(tmp_path / "here")
    counted = []
    for name, file in shipped().items():
        if name != "rewards_service" and all_files_are_here(load(file)):
            (tmp_path / name).mkdir()
            fill(tmp_path / name, load(file), ())
            counted.append(zipped(tmp_path / name))
    assert len(counted) > 20 and max(counted) < UPLOAD / 20
    assert wheel.build(tmp_path, model=False).stat().st_size < UPLOAD


def test_the_wheel_that_goes_along_is_the_package_without_dependencies_and_the_same_each_time(tmp_path):
    assert needs_model(load(TINY)) and not needs_model(load(ROOT / "configs" / "flux_dev_srpo_hps.yaml"))
    (tmp_path / "again").mkdir()
    file, again = wheel.build(tmp_path, model=True), wheel.build(tmp_path / "again", model=True)
    assert file.read_bytes() == again.read_bytes() and file.stat().st_size > 5 * UPLOAD
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--quiet", "--target", site, file]
    subprocess.run(pip, check=True, capture_output=True)
    program = "import align_cluster, importlib.metadata as m; from align_cluster.config.shipped import shipped;"
    program += "print(align_cluster.__file__, m.requires('align-cluster'), 'quickstart' in shipped())"
    env = os.environ | {"PYTHONPATH": str(site)}
    told = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert told.stdout.split() == [str(site / "align_cluster" / "__init__.py"), "None", "True"], told.stderr
    with zipfile.ZipFile(file) as files:
        assert not [name for name in files.namelist() if "__pycache__" in name]


def test_a_runtime_environment_that_cannot_be_used_is_one_sentence(tmp_path, capsys):
    file = tmp_path / "env.yaml"
    submit = [str(TINY), "--out", "/x", "--address", "http://127.0.0.1:1", "--runtime-env", str(file)]
    assert "is not there; give a YAML file" in refused(capsys, *submit)
    for text, said in (
        ("", "holds no settings; write some, such as `pip: [einops]`"),
        ("pip: [a", "is no YAML"),
        ("working_dir: .", "working_dir is the folder with the run file"),
        ("env_vars: {A: 1}", "env_vars takes a text for each name; put numbers into quotes"),
        ("env_vars: {HF_TOKEN: abc}", "env_vars.HF_TOKEN would stand in Ray's logs in clear"),
    ):
        file.write_text(text)
        assert said in refused(capsys, *submit)


def test_an_address_that_is_no_dashboard_and_a_token_that_is_empty_are_one_sentence(serve, auth, capsys):
    submit = [str(TINY), "--out", "/x", "--address"]
    page = serve(200, "text/html; charset=utf-8", b"<html>Sign in</html>")
    assert "answers, but not as a Ray dashboard does (HTTP 200, text/html)" in refused(capsys, *submit, page)
    missing = serve(404, "application/json", b'{"error": "no such path"}')
    assert "(HTTP 404, application/json); give --address the URL" in refused(capsys, *submit, missing)
    asks = serve(401, "text/plain", b"Unauthorized: Missing authentication token")
    assert f"asks for a token: {auth} is not there; put the cluster's there" in refused(capsys, *submit, asks)
    auth.write_text("\n")
    assert f"asks for a token: {auth} is empty; put the cluster's there" in refused(capsys, *submit, asks)


def test_joining_or_starting_a_ray_with_an_empty_token_file_is_one_sentence(auth, monkeypatch):
    auth.write_text("")
    with pytest.raises(UserError, match=f"no token for the Ray at 10.0.0.1:6379: {auth} is empty; put the cluster's"):
        connect("10.0.0.1:6379")
    with pytest.raises(UserError, match=f"{auth}: Ray's token is empty; remove the file, and the next run makes one"):
        private.make_token()
    assert checks.ray_settings().state == "fail" and f"{auth} is empty" in checks.ray_settings().value


def test_the_doctor_names_versions_outside_of_what_was_tested(monkeypatch):
    newest, oldest = pins("tested"), pins("oldest")
    assert newest["ray"] == "2.60.0" and oldest["ray"] != newest["ray"]
    installed = newest | {"torch": f"{newest['torch']}+cpu", "ray": "2.61.1", "diffusers": "0.30.0", "scipy": None}
    monkeypatch.setattr(checks, "package_version", installed.get)
    found = {check.name: check for check in packages() if check.remedy == UNTESTED}
    assert found.keys() - {"python"} == {"ray", "diffusers"} and {check.state for check in found.values()} == {"warn"}
    assert found["ray"].value == "2.61.1 is newer than 2.60.0, the newest that was tested"
    assert found["diffusers"].value == f"0.30.0 is older than {oldest['diffusers']}, the oldest that was tested"


def test_joining_what_is_no_ray_is_one_sentence(serve, auth):
    auth.write_text("token")
    address = serve(200, "text/html", b"hello").removeprefix("http://")
    with pytest.raises(UserError, match=f"no Ray cluster answers at '{address}' .what listens there is no Ray."):
        connect(address)


JOIN = """
import sys
from align_cluster.cluster.placement import connect
import ray
from ray._private import utils
from align_cluster.errors import UserError

real = utils.compute_version_info
utils.compute_version_info = lambda: ("2.59.0", real()[1])
ray.__version__ = "2.59.0"
try:
    connect(sys.argv[1])
except UserError as error:
    print(error)
"""


def test_another_ray_than_the_clusters_is_one_sentence_before_anything_starts(local_ray):
    address = local_ray.get_runtime_context().gcs_address
    done = subprocess.run([sys.executable, "-c", JOIN, address], capture_output=True, text=True, timeout=300)
    python = ".".join(map(str, sys.version_info[:3]))
    assert done.stdout == (
        f"cluster.address: the cluster at {address} runs Ray 2.60.0 and Python {python}, and here are Ray 2.59.0 and "
        f"Python {python}; install here what the cluster has, or start the run there with `align-cluster submit`\n"
    ), done.stderr


def test_under_uv_run_the_working_directory_is_not_shipped_and_a_note_says_so(tmp_path):
    (tmp_path / "run").write_text('"$@"; exit $?\n')
    shutil.copy("/bin/sh", tmp_path / "uv")
    program = (
        "from align_cluster.cluster.placement import _note_uv; from ray._private import ray_constants; _note_uv();"
    )
    program += "print(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    uv = ["uv", "run", sys.executable, "-c", program]
    env = {name: text for name, text in os.environ.items() if name != "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(uv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout == "False\n", done.stderr
    assert "under `uv run`, workers use this environment; the working directory is not shipped" in done.stderr


def test_plan_obeys_the_affinity_of_the_process(tmp_path):
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    program += f"from align_cluster.cli import main; main(['plan', {str(TINY)!r}, '--json'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    plan = json.loads(done.stdout)
    assert plan["samplers"] == plan["learners"] == 1 and plan["sampler_cpus"] + plan["learner_cpus"] <= 1
