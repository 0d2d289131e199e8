"""A SLURM cluster on this machine, for the length of a test: munge, a controller and two nodes, without systemd.

Runs as any user; jobs are that user's. What it writes is in one temporary folder.
"""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.integration import jobs

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("node-0", "node-1")
CPUS_OF_A_NODE = 4
GPUS_OF_A_NODE = 2
"""Empty files that jobs can ask for."""
SECONDS_TO_START = 120
SEARCHED = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
"""The daemons are not for users, so their folder is not in every PATH."""

# linuxproc and task/none need neither cgroups nor root. Everything else is there to lose no time.
SETTINGS = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
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


def missing_programs() -> list[str]:
    return [name for name in DAEMONS if shutil.which(name, path=SEARCHED) is None]


class Cluster:
    """Clients find it by `environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # The tests may themselves be a job of another cluster.
        inherited = {name: os.environ[name] for name in os.environ if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = inherited | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCHED}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._write_settings()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {name: f"--{name}-file={self.folder / f'munge.{name}'}" for name in ("key", "log", "pid", "seed")}
        # --force: a temporary folder may lie in one that others can write to.
        self._spawn("munged", "--foreground", "--force", f"--socket={self.folder / 'munge.socket'}", *files.values())
        self.wait("munge answers", (self.folder / "munge.socket").is_socket, SECONDS_TO_START)
        self._spawn("slurmctld", "-D")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node)
        idle = f"{len(NODES)} idle"
        self.wait("both nodes are idle", lambda: self.client("sinfo", "-h", "-o", "%D %T") == idle, SECONDS_TO_START)

    def _write_settings(self) -> None:
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={jobs.free_port()} CPUs={CPUS_OF_A_NODE} "
            f"Gres=gpu:{GPUS_OF_A_NODE}"
            for node in NODES
        )
        settings = SETTINGS.format(
            host=host, user=getpass.getuser(), controller_port=jobs.free_port(), folder=self.folder, nodes=nodes
        )
        (self.folder / "slurm.conf").write_text(settings)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS_OF_A_NODE - 1}]\n")
        for number in range(GPUS_OF_A_NODE):
            (self.folder / f"gpu{number}").touch()
        for name in ("state", *NODES):
            (self.folder / name).mkdir()

    def _spawn(self, program: str, *options: str) -> None:
        found = shutil.which(program, path=SEARCHED)
        assert found, f"{program} is installed"
        with (self.folder / f"{program}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    [found, *options], env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )
            )

    def client(self, *command: str) -> str:
        """What one of SLURM's commands prints; nothing where it fails."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""

    def submit(self, *arguments: str, folder: Path) -> str:
        """Queue a job with sbatch from a folder. Returns its id."""
        command = ["sbatch", "--parsable", *arguments]
        result = subprocess.run(command, cwd=folder, env=self.environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, name: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of one of an array, such as 1_2. Values are cut at a space."""
        words = self.client("scontrol", "show", "job", name).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, what: str, happened: Callable[[], bool], seconds: float = jobs.TIMEOUT_SECONDS) -> None:
        """Raises where it does not happen, or where a daemon ends."""
        deadline = time.monotonic() + seconds
        while not happened():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            assert not dead and time.monotonic() < deadline, f"{what}: no. Ended: {dead}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        paths = sorted(self.folder.glob("*.out"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)

    def processes(self) -> list[psutil.Process]:
        """Every live process of the cluster: daemons, those that watch over jobs, and the jobs'."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                ours = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def stop(self) -> None:
        """Kill all of it: nothing here is to be kept."""
        while left := self.processes():
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        for daemon in self._daemons:
            daemon.wait()


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    # Not pytest's folder: the path of a Unix socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
