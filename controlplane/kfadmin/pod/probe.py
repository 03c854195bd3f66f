"""What the probes of a node's pod ask, several times a minute: so it imports next to nothing, and takes 20 ms.

    python -m controlplane.kfadmin.pod.probe live|ready

live   the launcher's process of this node runs, or the group does not want it any more. The launcher starts a dead one
       again by itself, and a hung one ends itself: only what goes on dying is never there when it is looked for.
ready  that process has its weights and listens for gateways and links; it asks for its name in the cluster right then.

Exit code 0: yes; 1: no, with a line that says why.
"""

import json
import os
import sys

LISTENS = "0A"  # state of a TCP socket in /proc/net/tcp


def why_not(what: str, run_dir: str, node: str) -> str:
    """ "" for yes."""
    path = os.path.join(run_dir, "nodes", f"{node}.json")
    try:
        with open(path, "rb") as file:
            found = json.load(file)
    except FileNotFoundError:
        return "" if what == "live" else f"{node} has not been started"
    pid = found["pid"]
    if not pid or _start_ticks(pid) != found["start_ticks"]:
        return f"{node} does not run: {found['said'] or 'it has ended'}"
    if what == "ready" and not listens(pid):
        return f"{node} (pid {pid}) does not listen yet: it loads its weights"
    return ""


def listens(pid: int) -> bool:
    """Whether it has a TCP socket that others may connect to."""
    waiting: set[str] = set()
    for family in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{pid}/net/{family}") as table:
                rows = [line.split() for line in table][1:]
        except OSError:
            continue
        waiting.update(f"socket:[{row[9]}]" for row in rows if row[3] == LISTENS)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                if os.readlink(f"/proc/{pid}/fd/{name}") in waiting:
                    return True
            except OSError:  # closed meanwhile
                continue
    except OSError:  # it has ended
        return False
    return False


def _start_ticks(pid: int) -> int:
    """As controlplane/process.py; 0 if it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in ("live", "ready"):
        sys.exit("usage: probe live|ready")
    env = os.environ
    ordinal, stages, stage = env["KF_POD_NAME"].rpartition("-")[2], env["KF_STAGES"], env["KF_STAGE"]
    node = f"n{int(ordinal) * int(stages) + int(stage)}"  # as place.py
    sys.exit(why_not(sys.argv[1], env["KF_RUN_DIR"], node) or 0)


if __name__ == "__main__":
    main()
