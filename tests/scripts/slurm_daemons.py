"""A real Slurm of one node, from Debian's packages, with its own munge, ports and folders: started and stopped here."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun", "munged")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=300
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def missing() -> str | None:
    """Why a Slurm cannot be started here, or None."""
    absent = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if absent:
        packages = "slurmctld slurmd slurm-client munge"
        return f"not installed: {', '.join(absent)} (Debian: apt-get install {packages})"
    return None if os.geteuid() == 0 else "slurmd needs root"


@contextlib.contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """Yields the environment in which sbatch and the others find this cluster."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # munge refuses group-writable parents
    folder.chmod(0o755)
    host = socket.gethostname()
    daemons: list[subprocess.Popen] = []
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    for name in [name for name in environment if name.startswith(("SLURM_JOB", "SLURM_STEP"))]:
        del environment[name]

    def start(*command: str) -> None:
        log = (folder / f"{command[0]}.out").open("w")
        daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    try:
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        conf = CONF.format(folder=folder, host=host, ports=_free_ports(2), cpus=os.cpu_count())
        (folder / "slurm.conf").write_text(conf.lstrip())
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        _wait_for(lambda: (folder / "munge.socket").exists(), "munged", folder)
        start("slurmctld", "-D", "-f", environment["SLURM_CONF"])
        start("slurmd", "-D", "-f", environment["SLURM_CONF"], "-N", host)
        _wait_for(lambda: "idle" in _sinfo(environment), "slurmd", folder)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _sinfo(environment: dict[str, str]) -> str:
    command = ["sinfo", "--noheader", "--format=%T"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30).stdout


def _wait_for(ready, name: str, folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            logs = "\n".join(path.read_text(errors="replace")[-800:] for path in folder.glob("*.log"))
            raise RuntimeError(f"{name} did not come up: {logs}")
        time.sleep(0.3)


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
