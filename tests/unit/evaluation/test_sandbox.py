"""Programs that attack: each is contained by the sandbox, and by its two layers alone as far as each reaches."""

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

from mtp_dist.errors import LaunchError
from mtp_dist.evaluation import sandbox as sandbox_module
from mtp_dist.evaluation import sandbox_launcher
from mtp_dist.evaluation.sandbox import Sandbox, run_programs

PASSES = "passed"
TIMED_OUT = "timed out"
NOT_PERMITTED = "PermissionError: [Errno 1] Operation not permitted"
READ_ONLY = "OSError: [Errno 30] Read-only file system"
ABSENT = "FileNotFoundError: [Errno 2] No such file or directory"
FORK_BOMB = "import os\nwhile True:\n    try:\n        os.fork()\n    except BlockingIOError:\n        pass"
CONNECT = "import socket; socket.create_connection(('{}', 9), timeout=1)"
WRAPPED = """
socket ptrace process_vm_readv process_vm_writev shmget msgget semget memfd_create vmsplice unshare setns klogctl
"""
"""Functions of the C library for system calls that the filter denies."""
OTHERS = """
memfd_secret add_key request_key keyctl perf_event_open bpf userfaultfd io_uring_setup io_setup
"""
"""Such system calls without a function."""
MACHINE = sandbox_launcher.MACHINES.index(os.uname().machine)
NUMBERS = [sandbox_launcher.DENIED.get(name, (-1, -1))[MACHINE] for name in OTHERS.split()]
CALL = f"""
import ctypes, functools
libc = ctypes.CDLL(None, use_errno=True)
calls = [getattr(libc, name) for name in {WRAPPED.split()}]
calls += [functools.partial(libc.syscall, ctypes.c_long(number)) for number in {NUMBERS}]
for call in calls:
    assert call(*[ctypes.c_long(-1)] * 6) == -1 and ctypes.get_errno() == 1, call
"""

LIMITS = {
    "end": ("x = 1", PASSES),
    "main": ("assert __name__ == '__main__'", PASSES),
    "files in its folder": ("open('a', 'w').write('b'); assert open('a').read() == 'b'", PASSES),
    "threads": ("import threading; t = threading.Thread(target=print); t.start(); t.join()", PASSES),
    "exception": ("assert 1 == 2, 'wrong'", "AssertionError: wrong"),
    "exit": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "exit at once": ("import os; os._exit(0)", "exited"),
    "syntax": ("def f(:", "SyntaxError"),
    "crash": ("import ctypes; ctypes.string_at(0)", "killed by signal 11"),
    "infinite loop": ("while True: pass", TIMED_OUT),
    "output": ("import os\nwhile True: os.write(1, b'x' * 100000)", TIMED_OUT),
    "memory bomb": ("x = bytearray(2**31)", "MemoryError"),
    "memory bomb in pieces": ("x = []\nwhile True: x.append(bytearray(2**24))", "MemoryError"),
    "memory of a file": ("import os; os.memfd_create('x')", NOT_PERMITTED),
    "large file": ("f = open('x', 'wb')\nwhile True: f.write(bytes(2**20))", "OSError: [Errno 27] File too large"),
    "fork bomb": (FORK_BOMB, NOT_PERMITTED),
    "another program": ("import subprocess; subprocess.run(['/bin/true'])", NOT_PERMITTED),
    "socket": (CONNECT.format("127.0.0.1"), NOT_PERMITTED),
    "pairs of sockets": ("import socket; socket.socketpair(); socket.socketpair(socket.AF_INET)", NOT_PERMITTED),
    "interfaces of the kernel": (CALL, PASSES),
    "outlive the parent": (
        "import ctypes; call = ctypes.CDLL(None).prctl; assert (call(1, 0), call(15, b'name')) == (-1, 0)",
        PASSES,
    ),
    "control characters": ("raise type('\\x1b[1m', (Exception,), {})('\\n')", "?[1m: ?"),
}
"""Programs that end the same way with and without namespaces, and how."""

BLOCKED = {
    "sleep": ("import time; time.sleep(1000)", TIMED_OUT),
    "answer": ("import os\nfor i in range(3, 9):\n    while True: os.write(i, b'x' * 100000)", TIMED_OUT),
}
"""Programs that take no processor time."""

ISOLATION = {
    "disk": (
        "for i in range(10**6):\n    with open(str(i), 'wb') as f: f.write(bytes(2**20))",
        "OSError: [Errno 28] No space left on device",
    ),
    "many files": ("for i in range(10**6): open(str(i), 'w').close()", "OSError: [Errno 28] No space left on device"),
    "write outside": ("open('/x', 'w')", READ_ONLY),
    "write to the system": ("open('/usr/x', 'w')", READ_ONLY),
    "write to the interpreter": ("import os; assert not os.access(os.__file__, os.W_OK)", PASSES),
    "processes of others": ("import os; assert os.getpid() == 1 and os.getppid() == 0", PASSES),
    "kill the parent": ("import os; os.kill(os.getppid(), 9)", PASSES),
    "kill all": ("import os; os.kill(-1, 9)", "ProcessLookupError"),
    "thread bomb": (
        "import threading, time; threading.stack_size(2**16)\n"
        "for _ in range(100): threading.Thread(target=time.sleep, args=(1,)).start()",
        "RuntimeError: can't start new thread",
    ),
    "environment": ("import os; assert set(os.environ) <= {'LC_CTYPE'}, os.environ", PASSES),
    "privileges": (
        "import ctypes\nassert ctypes.CDLL(None).umount2(b'/tmp', 2) == -1\nassert ctypes.CDLL(None).setuid(0) == -1",
        PASSES,
    ),
    "another namespace": ("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == -1", PASSES),
    "folders": (
        "import os; assert set(os.listdir('/')) & {'proc', 'sys', 'run', 'var', 'home', 'mnt'} == set()",
        PASSES,
    ),
    "an empty folder": ("import os; assert os.listdir() == []", PASSES),
}
"""Programs that only namespaces contain."""

WITHOUT_FILTER = {
    "end": ("", PASSES),
    "socket": (CONNECT.format("127.0.0.1"), "OSError: [Errno 101] Network is unreachable"),
    "internet": (CONNECT.format("1.1.1.1"), "OSError: [Errno 101] Network is unreachable"),
    "process that stays": ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)", PASSES),
}
"""Programs that namespaces and limits contain without the filter of system calls."""


PATIENT = 30
"""Seconds of wall-clock time per second of processor time for programs that do not wait, on a very busy machine."""


def unexpected(sandbox, programs, monkeypatch, wall_factor=PATIENT):
    """Return the outcomes that do not begin as expected."""
    monkeypatch.setattr(sandbox_module, "WALL_FACTOR", wall_factor)
    found = run_programs(sandbox, [program for program, _ in programs.values()], 4, lambda done, total: None)
    pairs = zip(programs.items(), found, strict=True)
    return {name: outcome.reason for (name, (_, expected)), outcome in pairs if not outcome.reason.startswith(expected)}


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox(timeout_s=1, memory_bytes=2**28)
    try:
        sandbox.check()
    except LaunchError as error:
        pytest.skip(str(error))
    return sandbox


@pytest.fixture
def without_filter(sandbox, tmp_path, monkeypatch):
    """Remove the filter of system calls. Return words that only the command lines of this test's programs contain."""
    marker = uuid.uuid4().hex
    source = sandbox_module.LAUNCHER.read_text()
    call = "    deny_system_calls()\n    for"
    assert call in source
    launcher = Path(tempfile.mkdtemp(dir=tmp_path)) / "launcher.py"
    launcher.write_text(source.replace(call, "    for").replace('RUNNER = """', f'RUNNER = """# {marker}'))
    monkeypatch.setattr(sandbox_module, "LAUNCHER", launcher)
    return marker.encode()


def test_limits(sandbox, monkeypatch):
    assert unexpected(sandbox, LIMITS, monkeypatch) == {}
    assert unexpected(sandbox, BLOCKED, monkeypatch, 2) == {}


def test_isolation(sandbox, tmp_path, monkeypatch):
    with tempfile.NamedTemporaryFile(dir=Path.home()) as secret:
        hidden = {
            "home": (f"open({secret.name!r})", ABSENT),
            "temporary files": (f"import os; os.stat({str(tmp_path)!r})", ABSENT),
            "this project": (f"open({__file__!r})", ABSENT),
        }
        assert unexpected(sandbox, ISOLATION | hidden, monkeypatch) == {}


def test_namespaces_alone(sandbox, without_filter, monkeypatch):
    assert unexpected(sandbox, WITHOUT_FILTER, monkeypatch) == {}
    assert unexpected(sandbox, {"fork bomb": (FORK_BOMB, TIMED_OUT)}, monkeypatch, 2) == {}
    lines = [line.read_bytes() for line in Path("/proc").glob("[0-9]*/cmdline") if line.exists()]
    assert not any(without_filter in line for line in lines), "processes of a program are still there"


def test_limits_alone(monkeypatch):
    """Without namespaces, as --unsafe-no-sandbox runs programs."""
    sandbox = Sandbox(timeout_s=1, memory_bytes=2**28, is_isolated=False)
    sandbox.check()
    assert unexpected(sandbox, LIMITS, monkeypatch) == {}


CHECK = """
import sys
from mtp_dist.evaluation.sandbox import Sandbox
sandbox = Sandbox(1)
try:
    sandbox.check()
    print(sandbox.run("import os; os.kill(0, 15); raise Exception(os.getuid(), os.listdir('/tmp'))").reason)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        ("true", "Exception: (65534, [])"),
        ("echo 0 > /proc/sys/user/max_user_namespaces", "LaunchError this machine does not permit the sandbox ("),
    ],
    ids=["user of a container", "no namespaces"],
)
def test_root_without_other_users(sandbox, prepare, expected):
    if not shutil.which("unshare"):
        pytest.skip("needs unshare of util-linux")
    command = ["unshare", "--map-root-user", "sh", "-c", f'{prepare} && exec "$@"', "sh", sys.executable, "-c", CHECK]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert run.stdout.startswith(expected), run.stdout + run.stderr
    assert "LaunchError" not in expected or "--unsafe-no-sandbox" in run.stdout


def test_home_inside_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("HOME", f"{sys.base_prefix}/share")
    with pytest.raises(LaunchError, match="cannot hide the home folder"):
        Sandbox().check()
