import shutil
import subprocess

import pytest

from rayllm.cli.completion import SHELLS, Command, Option, bash, commands, fish, zsh
from rayllm.cli.main import COMMANDS, main

FOUND = [
    Command("serve", "start it's server", (Option(("--dtype", "-d"), "the type", True, ("auto", "bfloat16")),)),
    Command("bench", "measure", (), (("serve", "a server"), ("startup", "the start"))),
    Command("bench serve", "a server", (Option(("--rate",), "requests a second", True, ()),)),
    Command("bench startup", "the start", (Option(("--json",), "as JSON", False, ()),)),
]


def complete_in_bash(script: str, *words: str) -> list[str]:
    ask = 'COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _rayllm; echo "${COMPREPLY[*]}"'
    command = ["bash", "-c", f"{script}\n{ask}", "rayllm", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rayllm", ""], ["serve", "bench"]),
        (["rayllm", "se"], ["serve"]),
        (["rayllm", "serve", "--d"], ["--dtype"]),
        (["rayllm", "serve", "--dtype", ""], ["auto", "bfloat16"]),
        (["rayllm", "serve", "-d", "b"], ["bfloat16"]),
        (["rayllm", "bench", "s"], ["serve", "startup"]),
        (["rayllm", "bench", "serve", "--"], ["--rate"]),
        (["rayllm", "bench", "startup", "--"], ["--json"]),
    ],
)
def test_bash_completes_verbs_flags_and_values(words: list[str], expected: list[str]) -> None:
    assert complete_in_bash(bash(FOUND), *words) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rayllm se", ["serve"]),
        ("rayllm serve --dtype b", ["bfloat16"]),
        ("rayllm bench s", ["serve", "startup"]),
        ("rayllm bench serve --r", ["--rate"]),
        ("rayllm serve --r", []),
    ],
)
@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_verbs_flags_and_values(line: str, expected: list[str]) -> None:
    command = ["fish", "--no-config", "-c", f"{fish(FOUND)}\ncomplete -C '{line}'"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert [found.split("\t")[0] for found in done.stdout.splitlines()] == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_can_read_its_script() -> None:
    subprocess.run(["zsh", "-f", "-n"], input=zsh(list(commands())), text=True, check=True, timeout=20)


def test_the_scripts_know_every_verb_and_flag() -> None:
    found = {command.words: command for command in commands()}
    assert {words.split()[0] for words in found} == set(COMMANDS)
    dtype = next(option for option in found["serve"].options if "--dtype" in option.names)
    assert dtype.values == ("auto", "float32", "bfloat16", "float16")
    assert [word for word, _ in found["completion"].subcommands] == list(SHELLS)
    assert {"config show", "config validate", "bench serve"} < set(found)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_verb_prints_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "run-batch" in capsys.readouterr().out


def test_an_unknown_shell_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "'tcsh'" in capsys.readouterr().err
