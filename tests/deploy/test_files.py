"""The files of deploy/, each checked by what will read it: schemas of KubeRay, Kubernetes and Ray, hadolint, shells."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from copy import deepcopy
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from align_cluster.cluster.checks import pins
from align_cluster.cluster.nodes import fit_on
from align_cluster.config.load import load
from align_cluster.config.plan import derive
from align_cluster.planner.batches import rows_that_fit
from align_cluster.planner.report import GIB, estimate
from align_cluster.serving.config import ServiceConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BASE, OVERLAYS = DEPLOY / "kuberay" / "base", sorted((DEPLOY / "kuberay" / "overlays").glob("*/kustomization.yaml"))
# The custom resources' schemas as KubeRay's Helm chart has them, where they lie beside this checkout.
SCHEMAS = Path(os.environ.get("KUBERAY_SCHEMAS", ROOT.parent / "shared" / "data" / "kuberay"))
KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}


def program(name):
    """Path of a program of the extra `deploy`, or a skip that says so."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed: pip install -e '.[deploy]' brings it")


def documents(file):
    return [one for one in yaml.safe_load_all(file.read_text()) if one]


def built(overlay):
    """The base's documents with the patches of an overlay, which are JSON patches: what `kubectl kustomize` makes."""
    made = [one for name in yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
            for one in documents(BASE / name)]  # fmt: skip
    settings = yaml.safe_load(overlay.read_text())
    for patch in settings["patches"]:
        (target,) = (one for one in made if one["kind"] == patch["target"]["kind"])
        for step in yaml.safe_load(patch["patch"]):
            *way, last = (part.replace("~1", "/") for part in step["path"].strip("/").split("/"))
            place = target
            for part in way:
                place = place[int(part)] if isinstance(place, list) else place[part]
            assert (last in place) == (step["op"] == "replace"), f"{overlay.parent.name}: {step['path']}"
            place[last] = step["value"]
    (image,) = settings["images"]
    for pod in pods(made):
        for container in pod["spec"]["containers"]:
            if container["image"].partition(":")[0] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return made


def pods(found):
    """Every pod template in documents."""
    if isinstance(found, list):
        return [pod for one in found for pod in pods(one)]
    if not isinstance(found, dict):
        return []
    inside = [pod for key, value in found.items() if key != "template" for pod in pods(value)]
    return inside + ([found["template"]] if "template" in found else [])


def all_documents():
    files = [*sorted(BASE.glob("*.yaml"))]
    found = [(file.name, one) for file in files if file.name != "kustomization.yaml" for one in documents(file)]
    return found + [(overlay.parent.name, one) for overlay in OVERLAYS for one in built(overlay)]


def strict(schema):
    """Refuse unknown keys, as a Kubernetes API server does, and take what is number or text as either."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in made and "additionalProperties" not in made:
        made["additionalProperties"] = bool(made.get("x-kubernetes-preserve-unknown-fields"))
    return made


@pytest.mark.parametrize(
    ("where", "document"), all_documents(), ids=lambda one: one if isinstance(one, str) else one["kind"]
)
def test_a_custom_resource_has_only_what_kuberays_schema_knows(where, document):
    if document["kind"] not in KINDS:
        pytest.skip("a core resource, checked below")
    file = SCHEMAS / f"{KINDS[document['kind']]}.v1.schema.json.gz"
    if not file.exists():
        pytest.skip("KubeRay's schemas are not beside this checkout; KUBERAY_SCHEMAS names their folder")
    schema = strict(json.loads(gzip.decompress(file.read_bytes())))
    schema["properties"] |= {"apiVersion": {"const": "ray.io/v1"}, "kind": {}, "metadata": {"type": "object"}}
    jsonschema.validate(document, schema)
    wrong = deepcopy(document)
    wrong["spec"]["rayversion"] = "2.60.0"
    with pytest.raises(jsonschema.ValidationError, match="rayversion"):
        jsonschema.validate(wrong, schema)


def test_core_resources_and_pods_are_what_kubernetes_takes():
    validate = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[deploy]' brings it")
    for _, document in all_documents():
        if document["kind"] not in KINDS:
            validate.validate(document, "1.34", strict=True)
        for pod in pods(document):
            named = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod["spec"]}
            validate.validate(named, "1.34", strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate(named | {"spec": pod["spec"] | {"containerz": []}}, "1.34", strict=True)


def test_pods_run_without_root_and_mount_shared_memory():
    for where, document in all_documents():
        for pod in pods(document):
            assert pod["spec"]["securityContext"]["runAsNonRoot"], where
            for container in pod["spec"]["containers"]:
                mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
                assert mounts["shm"] == "/dev/shm" and mounts.keys() <= {one["name"] for one in pod["spec"]["volumes"]}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda overlay: overlay.parent.name)
def test_the_patches_applied_here_are_those_that_kustomize_applies(overlay):
    kubectl = shutil.which("kubectl") or pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", overlay.parent], capture_output=True, text=True, check=True)
    theirs = {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}
    assert theirs == {one["kind"]: one for one in built(overlay)}


def workers(document):
    """(resources of each worker node, GiB of a GPU or None) of a RayJob or of a RayCluster's first group."""
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    group = spec["workerGroupSpecs"][0]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    node = {"CPU": float(resources["limits"]["cpu"]), "GPU": float(resources["limits"].get("nvidia.com/gpu", 0))}
    gib = document["metadata"]["annotations"].get("align-cluster/gpu-gib")
    return [node] * group["replicas"], gib and float(gib)


def with_a_run_file():
    """The documents that name a run file; to plan one for GPUs takes seconds."""
    for where, one in all_documents():
        if "annotations" in one["metadata"]:
            marks = [] if where == "cpu" else [pytest.mark.exhaustive]
            yield pytest.param(where, one, marks=marks, id=f"{where}-{one['kind']}")


@pytest.mark.parametrize(("where", "document"), with_a_run_file())
def test_the_nodes_of_a_manifest_are_what_plan_derives_for_its_run_file(where, document):
    named = ROOT / document["metadata"]["annotations"]["align-cluster/run-file"]
    assert named.is_file(), f"{where} names {named}"
    overrides = []
    if document["kind"] == "RayJob":
        words = shlex.split(document["spec"]["entrypoint"])
        assert words[:3] == ["until-done", "align-cluster", "train"] and words[-2:] == ["--resume", "auto"]
        assert words[3] == f"/opt/configs/{named.name}"
        overrides = [word for word in words if re.match(r"[a-z_.]+=", word) and "address" not in word]
    nodes, gib = workers(document)
    planned(named, tuple(overrides), tuple(tuple(node.items()) for node in nodes), gib)


@cache  # several manifests and overlays have the same nodes for the same run file
def planned(run_file, overrides, nodes, gib):
    config, nodes = load(run_file, overrides), [dict(node) for node in nodes]
    fits = fit_on(nodes, config)
    assert fits.state == "ok", fits.value
    cores, gpus = (int(sum(node[kind] for node in nodes)) for kind in ("CPU", "GPU"))
    if gpus:
        plan = derive(config, cores, gpus, rows_that_fit(config, cores, gpus, gib * GIB))
        assert plan.samplers == plan.learners == gpus, "every GPU has a sampler and a learner rank"
        assert estimate(plan.config, plan, gib * GIB).fits, f"it does not fit into {gib:g} GiB"
    tenth = [{kind: count / 10 for kind, count in node.items()} for node in nodes]
    assert fit_on(tenth, config).state == "fail", "fewer nodes would not do"


def test_the_service_in_the_manifest_is_one_that_serves():
    config_map, service = documents(BASE / "rayservice.yaml")
    (text,) = config_map["data"].values()
    config = ServiceConfig.model_validate(yaml.safe_load(text))
    served = yaml.safe_load(service["spec"]["serveConfigV2"])
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(served).applications
    mounted = {mount["mountPath"] for pod in pods(service) for mount in pod["spec"]["containers"][0]["volumeMounts"]}
    assert application.args["config"] == f"/etc/align-cluster/{next(iter(config_map['data']))}"
    assert "/etc/align-cluster" in mounted
    sent = [one["name"] for pod in pods(service) for one in pod["spec"]["containers"][0]["env"]]
    assert sent == [config.token.env] * 2, "every pod has the token that the service file names"


@pytest.mark.parametrize("file", sorted((DEPLOY / "ray").glob("*.yaml")), ids=lambda file: file.name)
def test_a_cluster_file_is_what_ray_up_takes(file):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    described = yaml.safe_load(file.read_text())
    jsonschema.validate(described, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(described | {"setup_comands": []}, schema)
    for command in described["setup_commands"] + described["head_start_ray_commands"]:
        assert subprocess.run(["bash", "-nc", command]).returncode == 0, command


def test_the_dockerfile_passes_hadolint_and_installs_the_tested_versions():
    done = subprocess.run([program("hadolint"), DEPLOY / "docker" / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_gets_what_its_instructions_copy():
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*)", text, re.M) for word in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() and name in kept for name in copied)
    for install in re.findall(r"pip install [^;\n]*", text):
        assert "-c constraints/tested.txt" in install, install
    assert re.search(r"^USER 1000$", text, re.M) and "HEALTHCHECK" in text


@pytest.mark.parametrize("script", [*sorted((DEPLOY / "slurm").iterdir()), DEPLOY / "docker" / "until-done"])
def test_a_script_passes_shellcheck(script):
    done = subprocess.run([program("shellcheck"), script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("codes", "runs", "code"), [([75, 75, 0], 3, 0), ([2], 1, 2), ([75, 1], 2, 1), ([0], 1, 0)])
def test_a_run_is_started_again_for_exit_code_75_and_nothing_else(tmp_path, codes, runs, code):
    (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
    command = "echo ran >> ran; code=$(head -n 1 codes); sed -i 1d codes; exit $code"
    done = subprocess.run(
        [DEPLOY / "docker" / "until-done", "sh", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"UNTIL_DONE_PAUSE_S": "0"},
    )
    assert done.returncode == code and (tmp_path / "ran").read_text().count("ran") == runs


def test_versions_agree_between_the_package_the_constraints_the_readme_and_the_manifests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest, oldest = pins("tested"), pins("oldest")
    wanted = {re.match(r"[\w-]+", one)[0]: one for one in project["dependencies"]}
    extras = [one for extra in project["optional-dependencies"].values() for one in extra]
    assert wanted.keys() == oldest.keys(), "constraints/oldest.txt has the core dependencies"
    for name, text in wanted.items():
        assert f">={oldest[name]}" in text, f"pyproject.toml: {text}, and constraints/oldest.txt has {oldest[name]}"
    others = {re.match(r"[\w-]+", one)[0] for one in extras} - {"align-cluster"}
    assert newest.keys() == wanted.keys() | others
    assert newest["torch"] == "2.13.0", "with it, a plain installation finds the build without CUDA, where there is one"
    for command in re.findall(r"^python3 -m venv .*", (ROOT / "README.md").read_text(), re.M):
        assert "pip install -c constraints/tested.txt -e" in command
    for where, document in all_documents():
        if document["kind"] in KINDS:
            spec = document["spec"]
            spec = spec.get("rayClusterSpec", spec.get("rayClusterConfig", spec))
            assert spec["rayVersion"] == newest["ray"], where
