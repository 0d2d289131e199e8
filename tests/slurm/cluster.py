"""A temporary SLURM cluster on this machine: munge, a controller and two nodes, without systemd, run by any user."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from tests.integration import jobs

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("node-0", "node-1")
CPUS_OF_A_NODE = 4
GPUS_OF_A_NODE = 2
"""Empty files that stand for the GPUs of a node."""
SECONDS_TO_START = 120
SEARCHED = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
"""The daemons' folders are not in every user's PATH."""

# linuxproc and task/none need neither cgroups nor root. All other settings save time.
SETTINGS = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
SlurmctldTimeout=600
SlurmdTimeout=600
MessageTimeout=60
KillWait=30
ReturnToService=2
MinJobAge=86400
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=60 OverSubscribe=NO
"""


def missing_programs():
    return [name for name in DAEMONS if shutil.which(name, path=SEARCHED) is None]


class Cluster:
    """A running cluster, which SLURM's commands find by `environment`."""

    def __init__(self, folder):
        self.folder = folder
        # The tests may be a job of another cluster themselves.
        inherited = {name: os.environ[name] for name in os.environ if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = inherited | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCHED}
        self._daemons = []

    def start(self):
        self._write_settings()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {name: f"--{name}-file={self.folder / f'munge.{name}'}" for name in ("key", "log", "pid", "seed")}
        # --force: others may write to the parent of a temporary folder.
        self._spawn("munged", "--foreground", "--force", f"--socket={self.folder / 'munge.socket'}", *files.values())
        self.wait("munge answers", (self.folder / "munge.socket").is_socket, SECONDS_TO_START)
        self._spawn("slurmctld", "-D")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node)
        idle = f"{len(NODES)} idle"
        self.wait("both nodes are idle", lambda: self.client("sinfo", "-h", "-o", "%D %T") == idle, SECONDS_TO_START)

    def _write_settings(self):
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        common = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={CPUS_OF_A_NODE} Gres=gpu:{GPUS_OF_A_NODE}"
        nodes = "\n".join(f"NodeName={node} Port={jobs.free_port()} {common}" for node in NODES)
        settings = SETTINGS.format(host=host, user=user, port=jobs.free_port(), folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(settings)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS_OF_A_NODE - 1}]\n")
        for number in range(GPUS_OF_A_NODE):
            (self.folder / f"gpu{number}").touch()
        for name in ("state", *NODES):
            (self.folder / name).mkdir()

    def _spawn(self, program, *options):
        found = shutil.which(program, path=SEARCHED)
        with (self.folder / f"{program}.out").open("ab") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            self._daemons.append(subprocess.Popen([found, *options], env=self.environment, **streams))

    def client(self, *command):
        """Return what one of SLURM's commands prints; nothing if it fails."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""

    def submit(self, *arguments, folder):
        """Queue a job with sbatch from a folder and return its id."""
        command = ["sbatch", "--parsable", *arguments]
        result = subprocess.run(command, cwd=folder, env=self.environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, name):
        """Return the fields of `scontrol show job`, cut at spaces. An array's job has a name such as 1_2."""
        words = self.client("scontrol", "show", "job", name).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, what, happened, seconds=jobs.TIMEOUT_SECONDS):
        """Fail if it does not happen, or if a daemon ends."""
        deadline = time.monotonic() + seconds
        while not happened():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            assert not dead and time.monotonic() < deadline, f"{what}: no. Ended: {dead}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self):
        paths = sorted(self.folder.glob("*.out"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)

    def processes(self):
        """Return every live process of the cluster and of its jobs."""
        settings = self.environment["SLURM_CONF"]
        return jobs.live_processes(lambda process: process.environ().get("SLURM_CONF") == settings)

    def stop(self):
        """Kill all processes."""
        while left := self.processes():
            jobs.kill(left)
        for daemon in self._daemons:
            daemon.wait()


@contextmanager
def running_cluster():
    # Not pytest's folder: the path of a Unix socket is limited to 107 bytes.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
