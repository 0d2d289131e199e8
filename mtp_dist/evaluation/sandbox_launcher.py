"""Run one untrusted Python program confined by the kernel: `python -I -S -B sandbox_launcher.py < request > result`.

sandbox.py starts this script, which therefore imports nothing but the standard library. Three processes take part:

- this one enters new namespaces, forks, and ends the program when its time is over;
- the forked one is the first process of the new pid namespace: the kernel kills all others when it ends. It leaves the
  file system for a read-only one that has the interpreter and nothing else, gives up its privileges, and becomes
- a fresh interpreter with an empty environment, which executes the program.

`Sandbox.run` in sandbox.py writes the request and reads the result, dictionaries in the format of `marshal`: json,
signal and subprocess would take longer to import than the rest takes to run.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RUNNER = """
import os
with open(0, encoding="utf-8", newline="") as request:
    token, _, program = request.read().partition("\\n")
null = os.open(os.devnull, os.O_RDWR)
channel = os.dup(1)
for descriptor in range(3):
    os.dup2(null, descriptor)
try:
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    verdict = token
except BaseException as error:
    verdict = type(error).__name__[:100]
    try:
        verdict += ": " + str(error)[:200]
    except BaseException:
        pass
os.write(channel, verdict.encode("utf-8", "replace"))
os._exit(0)
"""
"""Executes the program. Only one that reaches its end answers with the token: `os._exit(0)` does not.

A program that searches the interpreter for the token can still forge the answer: it has no process of its own.
"""

CLONE_NEWUSER = 0x10000000
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
CLONE_THREAD = 0x10000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
SIGKILL = 9
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW = 0x80000000, 0x50000, 0x7FFF0000
EPERM, ENOSYS = 1, 38

NOBODY = 65534
PARENT_OF_ROOT = "/tmp"
"""Folder on which the new root is mounted before it becomes the root."""
OLD_ROOT = "/old"
SCRATCH = "/tmp"
"""The program's working directory, the only folder that it can write to."""

MACHINES = ("x86_64", "aarch64")
AUDIT_ARCHITECTURES = (0xC000003E, 0xC00000B7)
X32_SYSTEM_CALLS = 0x40000000
PIVOT_ROOT = (155, 41)
MOUNT_SETATTR = 442
CLONE, CLONE3 = (56, 220), 435
SOCKETPAIR, AF_UNIX = (53, 199), 1
PRCTL = (157, 167)
DENIED = {
    "fork": (57, None),
    "vfork": (58, None),
    "socket": (41, 198),  # some families, such as vsock, are not confined by a network namespace
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "shmget": (29, 194),  # memory that RLIMIT_AS does not count
    "msgget": (68, 186),
    "semget": (64, 190),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "vmsplice": (278, 75),  # a byte in a pipe keeps a huge page that its process has given back
    "add_key": (248, 217),  # the user's keyrings, with tickets and tokens, are not in any namespace
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_setup": (206, 0),  # the number of its requests is limited for the whole machine
    "syslog": (103, 116),  # so is the kernel's log
}
"""Numbers of the system calls that fail, by machine. Threads are permitted, other new processes are not."""

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, action: str) -> None:
    """Raise OSError if a system call failed."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{action}: {os.strerror(number)}")


def prctl(option: int, *values: int | bytes) -> None:
    arguments = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in values]
    check(libc.prctl(option, *arguments, *[ctypes.c_ulong(0)] * (4 - len(values))), f"prctl {option}")


def unshare(flags: int) -> None:
    check(libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = (None if text is None else text.encode() for text in (source, target, kind))
    data = None if options is None else options.encode()
    check(libc.mount(*encoded, ctypes.c_ulong(flags), data), f"mount {target}")


def enter_user_namespace(own_proc: int) -> None:
    """Become `nobody` in a new user namespace, with all privileges there until the next program is executed.

    own_proc: descriptor of this process's folder in /proc.
    """
    ids = {"uid_map": os.geteuid(), "gid_map": os.getegid()}
    unshare(CLONE_NEWUSER)
    lines = {"setgroups": "deny"} | {name: f"{NOBODY} {number} 1" for name, number in ids.items()}
    for name, line in lines.items():
        descriptor = os.open(name, os.O_WRONLY, dir_fd=own_proc)
        os.write(descriptor, line.encode())
        os.close(descriptor)


def can_become_nobody() -> bool:
    """Return whether this is root, and not the only user of a container."""
    with open("/proc/self/uid_map", encoding="utf-8") as ranges:
        firsts_and_counts = [(int(line.split()[0]), int(line.split()[2])) for line in ranges]
    return os.geteuid() == 0 and any(first <= NOBODY < first + count for first, count in firsts_and_counts)


def become_nobody() -> None:
    """Give up root's user id, to which the kernel's limit on processes does not apply in any namespace."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    prctl(PR_SET_DUMPABLE, 1)  # otherwise its folder in /proc is still root's


def replace_root(paths: list[str], scratch_bytes: int) -> None:
    """Make a root directory that has nothing but `paths`, read-only, and an empty scratch folder. Enter the latter."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", PARENT_OF_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    old = PARENT_OF_ROOT + OLD_ROOT
    os.mkdir(old)
    pivot_root = ctypes.c_long(PIVOT_ROOT[MACHINES.index(os.uname().machine)])
    check(libc.syscall(pivot_root, PARENT_OF_ROOT.encode(), old.encode()), "pivot_root")
    os.chdir("/")
    for path in paths:
        bind_mount(path)
    os.makedirs(SCRATCH, exist_ok=True)
    check(libc.umount2(OLD_ROOT.encode(), MNT_DETACH), "umount")
    os.rmdir(OLD_ROOT)
    attributes = struct.pack("=4Q", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    arguments = ctypes.c_int(AT_FDCWD), b"/", ctypes.c_uint(AT_RECURSIVE), attributes, ctypes.c_size_t(len(attributes))
    check(libc.syscall(ctypes.c_long(MOUNT_SETATTR), *arguments), "mount_setattr")
    mount("tmpfs", SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={scratch_bytes},nr_inodes=4096")
    os.chdir(SCRATCH)


def bind_mount(path: str) -> None:
    """Make a folder, file or symbolic link of the old root visible under the same name."""
    source = OLD_ROOT + path
    if os.path.lexists(path) or not os.path.lexists(source):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), path)
        return
    if os.path.isdir(source):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT, 0o644))
    mount(source, path, None, MS_BIND | MS_REC)


def set_limit(kind: int, limit: int) -> None:
    _, hard = resource.getrlimit(kind)
    lowest = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (lowest, lowest))


def deny_system_calls() -> None:
    """Let the calls in DENIED fail from now on, and all privileges that an executable file could give."""
    machine = MACHINES.index(os.uname().machine)
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    fail = (answer, 0, 0, SECCOMP_RET_ERRNO | EPERM)
    program = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCHITECTURES[machine]), (answer, 0, 0, SECCOMP_RET_KILL_PROCESS)]
    program += [(load, 0, 0, 0), (at_least, 0, 1, X32_SYSTEM_CALLS), fail]
    for numbers in DENIED.values():
        if (number := numbers[machine]) is not None:
            program += [(equal, 0, 1, number), fail]
    # The flags of clone3 are out of a filter's reach: without it the C library uses clone.
    program += [(equal, 0, 1, CLONE3), (answer, 0, 0, SECCOMP_RET_ERRNO | ENOSYS)]
    allow = (answer, 0, 0, SECCOMP_RET_ALLOW)
    program += [(equal, 0, 4, CLONE[machine]), (load, 0, 0, 16), (any_bit, 0, 1, CLONE_THREAD), allow, fail]
    # Without its signal the program could outlive this one, and its time.
    program += [(equal, 0, 4, PRCTL[machine]), (load, 0, 0, 16), (equal, 1, 0, PR_SET_PDEATHSIG), allow, fail]
    program += [(equal, 0, 4, SOCKETPAIR[machine]), (load, 0, 0, 16), (equal, 0, 1, AF_UNIX), allow, fail, allow]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header)


def become_program(request: dict[str, Any], program: int, channel: int, is_root: bool) -> None:
    """Confine this process and execute the program, whose text is in the file `program`.

    is_root: the namespaces belong to root, and the process is not in a user namespace of its own yet.
    """
    os.setsid()  # a signal to its process group must not reach the processes outside
    prctl(PR_SET_PDEATHSIG, SIGKILL)
    os.umask(0o022)
    if request["isolated"]:
        own_proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
        replace_root(request["paths"], request["scratch_bytes"])
        if is_root:
            become_nobody()
            enter_user_namespace(own_proc)
            prctl(PR_SET_PDEATHSIG, SIGKILL)  # another user id has reset it
    for name, limit in request["limits"].items():
        set_limit(getattr(resource, name), limit)
    deny_system_calls()
    for target, descriptor in enumerate((program, channel, os.open(os.devnull, os.O_WRONLY))):
        os.dup2(descriptor, target)
    os.execve(request["python"], [request["python"], "-I", "-S", "-B", "-c", RUNNER], {})


def start(request: dict[str, Any], channel: int) -> int:
    """Start the program. Return its process id. Raise OSError if it cannot be confined or started."""
    program = os.memfd_create("program")
    os.write(program, f"{request['token']}\n{request['program']}".encode("utf-8", "replace"))
    os.lseek(program, 0, os.SEEK_SET)
    is_root = can_become_nobody()
    if request["isolated"]:
        if not is_root:
            enter_user_namespace(os.open("/proc/self", os.O_PATH | os.O_DIRECTORY))
        unshare(NAMESPACES)
    problem_reader, problem_writer = os.pipe()  # executing the program closes it
    if child := os.fork():
        os.close(problem_writer)
        if problem := os.read(problem_reader, 4096):
            raise OSError(problem.decode())
        return child
    try:
        become_program(request, program, channel, is_root)
    except BaseException as error:
        os.write(problem_writer, str(error).encode())
    os._exit(1)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run the program until it ends or its time is over."""
    reader, writer = os.pipe()
    try:
        child = start(request, writer)
    except OSError as error:
        return {"refused": str(error)}
    os.close(writer)
    poll = select.poll()
    poll.register(os.pidfd_open(child), select.POLLIN)
    if expired := not poll.poll(request["wall_seconds"] * 1000):
        os.kill(child, SIGKILL)
    _, status, usage = os.wait4(child, 0)
    # The program was the last that could write; one that fills the pipe waits there until its time is over.
    verdict = os.read(reader, 4096).decode("utf-8", "replace")
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {"verdict": verdict, "signal": number, "cpu_seconds": cpu_seconds, "expired": expired}


if __name__ == "__main__":
    prctl(PR_SET_PDEATHSIG, SIGKILL)
    sys.stdout.buffer.write(marshal.dumps(run(marshal.load(sys.stdin.buffer))))
