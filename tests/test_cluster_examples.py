"""The examples for clusters: Slurm's scripts run here on two nodes that are none, manifests name what there is."""

import importlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastgen.cli.main import build_parser, main
from fastgen.jobs import Manifest, verify
from fastgen.models import UNet

from .backends import import_peer
from .jobs.launching import contents, wait_until

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("slurm_*.sh"))
MANIFESTS = sorted(EXAMPLES.glob("kubernetes_*.yaml"))
# What Slurm has, on one machine: `srun` starts a task a node, and `scontrol requeue` ends them by SIGTERM.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
from pathlib import Path
assert sys.argv[1] == "--kill-on-bad-exit=1", sys.argv
tasks = [subprocess.Popen(sys.argv[2:]) for _ in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
Path(os.environ["SLURM_TEST"], "srun.pid").write_text(str(os.getpid()))
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = f"""#!{sys.executable}
import os, signal, sys
from pathlib import Path
if sys.argv[1] == "show":
    assert sys.argv[2:] == ["hostnames", "node[1-2]"], sys.argv
    print("localhost", "node2", sep="\\n")
else:
    assert sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]], sys.argv
    os.kill(int(Path(os.environ["SLURM_TEST"], "srun.pid").read_text()), signal.SIGTERM)
"""


class Slurm:
    """Runs a script as sbatch would, on two nodes of one core."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, program in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(program)
            (folder / name).chmod(0o755)

    def start(self, script: Path, *arguments: str) -> subprocess.Popen[str]:
        with socket.socket() as free:  # a number whose port, as the script makes it, is not taken
            while True:
                job = int.from_bytes(os.urandom(2)) % 10000
                if free.connect_ex(("127.0.0.1", 20000 + job)):
                    break
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "PET_")) and name != "OMP_NUM_THREADS"
        }
        environment |= {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        environment |= {"SLURM_CPUS_PER_TASK": "1", "SLURM_TEST": str(self.folder)}
        environment["PATH"] = os.pathsep.join([str(self.folder), str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture
def slurm(tmp_path):
    (tmp_path / "bin").mkdir()
    return Slurm(tmp_path / "bin")


def commands(manifest):
    """The command lines of the pods in ``manifest``."""
    yaml = pytest.importorskip("yaml")
    for part in yaml.safe_load_all(manifest.read_text(encoding="utf-8")):
        for replica in part["spec"].get("pytorchReplicaSpecs", {}).values():
            for container in replica["template"]["spec"]["containers"]:
                yield part, container, [*container["command"], *container["args"]]


def understood(command):
    """What fastgen makes of the arguments that torchrun starts it with."""
    launcher, arguments = command[: command.index("--")], command[command.index("--") + 1 :]
    assert launcher == ["torchrun", "-m"] and arguments[0] == "fastgen"
    module = importlib.import_module(f"fastgen.cli.{arguments[1]}")
    return build_parser(arguments[1], module).parse_args(arguments[1:])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_no_faults_that_shellcheck_sees(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_command_that_a_script_is_shown_with_is_understood(script):
    (shown,) = (line for line in script.read_text().splitlines() if line.startswith("#     sbatch"))
    *_, arguments = shown.partition(f"{script.name} ")
    command = script.stem.removeprefix("slurm_")
    args = understood(["torchrun", "-m", "--", "fastgen", command, *shlex.split(arguments)])
    assert str(args.out).startswith("/shared/")


@pytest.mark.long
def test_sampling_by_the_script_of_slurm(slurm, tmp_path):
    options = ["--weights", "digits-ddpm", "--num", "10", "--shard", "4", "--steps", "3", "--sampler", "ddim"]
    script = EXAMPLES / "slurm_sample.sh"
    process = slurm.start(script, *options, "--out", str(tmp_path / "job"), "--log", str(tmp_path / "log"))
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert main(["sample", *options, "--quiet", "--out", str(tmp_path / "alone")]) == 0
    assert contents(tmp_path / "job") == contents(tmp_path / "alone")
    assert Manifest.read(tmp_path / "job").complete
    assert {path.name for path in (tmp_path / "log").iterdir()} <= {"rank-0000.jsonl", "rank-0001.jsonl"}


@pytest.mark.long
def test_a_job_whose_time_is_up_goes_on_when_it_has_been_queued_again(slurm, tmp_path):
    folder, script = tmp_path / "job", EXAMPLES / "slurm_sample.sh"
    options = ["--num", "48", "--shard", "2", "--steps", "40", "--out", str(folder)]
    process = slurm.start(script, *options)
    wait_until(lambda: len(list(folder.glob("0*.npz"))) >= 2, "nothing is drawn")
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=180)
    assert process.returncode not in (0, 128 + signal.SIGUSR1), said
    finished = contents(folder)
    assert not Manifest.read(folder).complete
    assert not [name for name in finished if ".tmp" in name]
    process = slurm.start(script, *options)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert verify(folder, progress=False).ok and Manifest.read(folder).complete
    assert {name: finished[name] for name in finished if name.endswith(".npz")}.items() <= contents(folder).items()


@pytest.mark.long
def test_training_by_the_script_of_slurm(slurm, tmp_path):
    import_peer("sklearn")
    script, weights = EXAMPLES / "slurm_train.sh", tmp_path / "digits.safetensors"
    options = ["digits-ddpm", "--batch-size", "8", "--model-channels", "16", "--out", str(weights), "--steps"]
    for steps in ("2", "4"):  # the second goes on from the checkpoint of the first
        process = slurm.start(script, *options, steps)
        said, _ = process.communicate(timeout=180)
        assert process.returncode == 0, said
    assert UNet.load(weights).config["model_channels"] == 16
    assert "steps 2 to 4, 2 ranks" in said


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_the_commands_of_a_manifest_are_understood(manifest):
    ((job, container, command),) = commands(manifest)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert container["name"] == "pytorch"
    args = understood(command)
    assert manifest.stem == f"kubernetes_{args.command}"
    (volume,) = {mount["mountPath"] for mount in container["volumeMounts"]} - {"/dev/shm"}
    assert str(args.out).startswith(f"{volume}/")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_what_a_manifest_names_is_there(manifest):
    yaml = pytest.importorskip("yaml")
    claim, job = yaml.safe_load_all(manifest.read_text(encoding="utf-8"))
    assert (claim["kind"], claim["spec"]["accessModes"]) == ("PersistentVolumeClaim", ["ReadWriteMany"])
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == set(volumes)
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "emptyDir" not in volume]
    assert claims == [claim["metadata"]["name"]]
    elastic = job["spec"]["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert job["spec"]["nprocPerNode"] == str(limits["nvidia.com/gpu"])
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in pod["containers"][0]["env"]


def test_there_are_examples_for_both():
    assert [path.stem for path in SCRIPTS] == ["slurm_sample", "slurm_train"]
    assert [path.stem for path in MANIFESTS] == ["kubernetes_sample", "kubernetes_train"]
