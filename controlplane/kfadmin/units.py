"""systemd units of a host: one for each part of it, and a target that stands for all of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from controlplane.contract.errors import ConfigError

TARGET = "kevlarflow.target"
VERIFY_LIMIT_S = 60.0
WORDS = {
    "etcd": "etcd member",
    "controller": "controller",
    "nodes": "nodes (launcher and relay)",
    "gateway": "gateway",
}
# Settings of each part beside those of all.
OWN = {
    "etcd": ("Type=notify", "TimeoutStartSec=infinity", "OOMScoreAdjust=-500"),
    "controller": ("Type=exec", "TimeoutStopSec=10"),
    # A launcher that ends by an accident or SIGHUP leaves its nodes running, and the next one adopts them.
    "nodes": ("Type=exec", "KillMode=process", "TimeoutStopSec=30", "ExecReload=/bin/kill -HUP $MAINPID"),
    "gateway": ("Type=exec", "TimeoutStopSec=60"),
}


def unit_name(part: str) -> str:
    return f"kevlarflow-{part}.service"


def render(
    parts: tuple[str, ...], run_dir: Path, command: list[str], user: str, env: dict[str, str]
) -> dict[str, str]:
    """Units by file name. `command`: what `PART` and the run directory are added to; `user` "": root."""
    units = {
        unit_name(part): _service(part, [*command, part, "--run-dir", str(run_dir)], run_dir, user, env)
        for part in parts
    }
    wants = " ".join(unit_name(part) for part in parts)
    units[TARGET] = (
        f"[Unit]\nDescription=KevlarFlow on this host\nWants={wants}\n\n[Install]\nWantedBy=multi-user.target\n"
    )
    return units


def _service(part: str, command: list[str], run_dir: Path, user: str, env: dict[str, str]) -> str:
    lines = [
        "[Unit]",
        f"Description=KevlarFlow: {WORDS[part]}",
        "After=network-online.target",
        "Wants=network-online.target",
        f"PartOf={TARGET}",
        # It is started again for as long as it is wanted: what keeps it from running may be mended elsewhere.
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        f"ExecStart={' '.join(quote(word) for word in command)}",
        *OWN[part],
        "Restart=always",
        "RestartSec=1",
        f"WorkingDirectory={str(run_dir).replace('%', '%%')}",
        *(f"Environment={quote(f'{name}={value}', expands=False)}" for name, value in env.items()),
        *((f"User={user}",) if user else ()),
        "UMask=0077",
        "LimitNOFILE=1048576",
        "LimitMEMLOCK=infinity",
        "NoNewPrivileges=yes",
        "",
    ]
    return "\n".join(lines)


def quote(word: str, expands: bool = True) -> str:
    """As systemd.service(5) has it; `expands`: where "$" names variables. Raises ConfigError."""
    if any(ord(sign) < 32 for sign in word):
        raise ConfigError(f"{word!r} cannot stand in a unit")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    escaped = escaped.replace("$", "$$") if expands else escaped
    return f'"{escaped}"' if escaped != word or any(sign in word for sign in " '") else word


def verify(files: list[Path]) -> str:
    """What `systemd-analyze verify` has against them; "": nothing, or it is not installed here."""
    program = shutil.which("systemd-analyze")
    if program is None:
        return ""
    command = [program, "verify", "--man=no", "--recursive-errors=no", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=VERIFY_LIMIT_S)
    return done.stderr.strip() if done.returncode else ""
