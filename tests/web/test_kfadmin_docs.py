"""Commands that the pages for operators, the chart and the alerts show: kfadmin has these verbs and options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from controlplane.kfadmin.main import app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(
        path for path in (ROOT / "deploy").rglob("*") if path.suffix in (".yaml", ".yml", ".txt", ".tpl")
    ),
    ROOT / "docs" / "monitoring" / "alerts.yml",
]
IN_BACKQUOTES = re.compile(r"`kfadmin ([^`\n]+)`")
AT_A_PROMPT = re.compile(r"^(?:[abc]# |\$ )?(?:sudo )?kfadmin (.+)$", re.M)
ANY = {"VERB", "--context"}  # of docs/kfadmin.md: any verb, and an option of kfadmin itself


def commands_of(text: str) -> list[list[str]]:
    """Words of each command, without what follows it in the shell; "\\|" is "|" in a table."""
    found = IN_BACKQUOTES.findall(text) + AT_A_PROMPT.findall(text)
    words = [re.split(r" [#>|] | && | \|\| ", one.replace("\\|", "|"))[0].split() for one in found]
    return [one for one in words if one and one[0] not in ANY]


def fault_of(words: list[str]) -> str:
    """What kfadmin does not have of a command; "a|b" stands for either."""
    verbs: list[Any] = [get_command(app)]
    words = [word.strip("[],.") for word in words]
    while words and all(hasattr(verb, "commands") for verb in verbs):
        if words[0].startswith("-"):
            break
        names = words.pop(0).split("|")
        verbs = [verb.commands.get(name) for verb in verbs for name in names]
        if None in verbs:
            return f"no verb {names}"
    options = {name for verb in verbs for one in verb.params for name in (*one.opts, *one.secondary_opts)}
    strange = [one for one in words if re.match(r"--?[a-z]", one) and one.split("=")[0] not in options]
    return f"no option {strange}" if set(strange) - {"--help"} else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist(page: Path) -> None:
    faults = {" ".join(words): fault_of(words) for words in commands_of(page.read_text())}
    assert not {command: fault for command, fault in faults.items() if fault}


def test_what_kfadmin_does_not_have_is_found() -> None:
    text = "`kfadmin drian n2` and `kfadmin drain n2 --now`\n```\na# kfadmin etcd status\\|defrg\n```"
    assert [bool(fault_of(words)) for words in commands_of(text)] == [True, True, True]
    text = "`kfadmin drain n2 --dry-run`, `kfadmin etcd status\\|defrag`\nb# kfadmin keys revoke NAME | cat --now\n"
    assert [fault_of(words) for words in commands_of(text)] == ["", "", ""]


def test_every_verb_has_its_place_in_the_pages() -> None:
    """A verb that no page names is found by nobody."""
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs" / "kfadmin.md").read_text()
    verbs: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    names = [
        [name, *rest]
        for name, verb in verbs.items()
        for rest in [[one] for one in getattr(verb, "commands", {})] or [[]]
    ]
    named = {
        " ".join(one) for one in names if all(re.search(rf"\b{re.escape(word)}\b", pages) for word in one)
    }
    shown = {name for name in verbs if re.search(rf"(?:kfadmin |`){re.escape(name)}\b", pages)}
    assert {" ".join(one) for one in names} == named
    assert verbs.keys() == shown
