"""`rayllm completion SHELL`: a script that lets bash, zsh or fish complete commands, flags and their values.

It is made from the parsers themselves, so that it knows what they know.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

from rayllm.cli.flags import Parser
from rayllm.cli.main import COMMANDS

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Option:
    """A flag by all its names; `values` where only these are taken."""

    names: tuple[str, ...]
    text: str
    takes_value: bool
    values: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """What stands after `rayllm`: one word, or two for a subcommand. `subcommands` are those it has, or the words
    that its argument may be."""

    words: str
    text: str
    options: tuple[Option, ...]
    subcommands: tuple[tuple[str, str], ...] = ()


def parser() -> Parser:
    made = Parser(
        prog="rayllm completion",
        description='Print a shell\'s completion script: eval "$(rayllm completion bash)" in ~/.bashrc, the same with '
        "zsh in ~/.zshrc, rayllm completion fish | source in fish's config.",
    )
    made.add_argument("shell", metavar="|".join(SHELLS), choices=SHELLS)
    return made


def run(argv: Sequence[str]) -> int:
    """Prints the script."""
    shell = parser().parse(argv)["shell"]
    print({"bash": bash, "zsh": zsh, "fish": fish}[shell](list(commands())), end="")
    return 0


def commands() -> Iterator[Command]:
    """Every command and subcommand."""
    for command, (name, text) in COMMANDS.items():
        module = import_module(name)
        subcommands = getattr(module, "SUBCOMMANDS", {})
        if not subcommands:
            made = module.parser()
            yield Command(command, text, _options(made), _choices(made))
            continue
        yield Command(command, text, (), tuple((sub, what) for sub, (_, what) in subcommands.items()))
        for sub, (path, what) in subcommands.items():
            yield Command(f"{command} {sub}", what, _options(import_module(path).parser()))


def _choices(parser: Parser) -> tuple[tuple[str, str], ...]:
    """What the command's argument may be, where it is one of a few words."""
    arguments = [action for action in parser._actions if not action.option_strings]
    return tuple((str(word), "") for action in arguments for word in action.choices or ())


def _options(parser: Parser) -> tuple[Option, ...]:
    found = []
    for action in parser._actions:
        if action.option_strings and action.help is not argparse.SUPPRESS:
            text = " ".join((action.help or "").replace("%%", "%").split())
            found.append(Option(tuple(action.option_strings), text, action.nargs != 0, _values(action)))
    return tuple(found)


def _values(action: argparse.Action) -> tuple[str, ...]:
    """Of its choices, or of a metavar that lists them: `{auto,cpu}`."""
    if action.choices:
        return tuple(map(str, action.choices))
    shown = action.metavar if isinstance(action.metavar, str) else ""
    return tuple(shown[1:-1].split(",")) if shown.startswith("{") else ()


def _top_level(found: Sequence[Command]) -> list[tuple[str, str]]:
    return [(command.words, command.text) for command in found if " " not in command.words]


def _parents(found: Sequence[Command]) -> list[Command]:
    return [command for command in found if command.subcommands]


def _flag_values(found: Sequence[Command]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """`serve:--dtype` and what may follow it."""
    for command in found:
        for option in command.options:
            if option.values:
                yield "|".join(shlex.quote(f"{command.words}:{name}") for name in option.names), option.values


def bash(found: Sequence[Command]) -> str:
    parents = "|".join(command.words for command in _parents(found))
    values = "\n".join(
        f"        {flags}) words={shlex.quote(' '.join(given))} ;;" for flags, given in _flag_values(found)
    )
    options = "\n".join(
        f"            {shlex.quote(command.words)}) words={shlex.quote(' '.join(_words_of(command)))} ;;"
        for command in found
    )
    return f"""\
_rayllm() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" cmd="${{COMP_WORDS[1]}}" words=""
    COMPREPLY=()
    case "$cmd" in
        {parents}) (( COMP_CWORD > 2 )) && cmd="$cmd ${{COMP_WORDS[2]}}" ;;
    esac
    if (( COMP_CWORD == 1 )); then
        words={shlex.quote(" ".join(name for name, _ in _top_level(found)))}
    else case "$cmd:$prev" in
{values}
        *) case "$cmd" in
{options}
        esac ;;
    esac; fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _rayllm rayllm
"""


def _words_of(command: Command) -> list[str]:
    """What may follow a command: its subcommands or its flags."""
    if command.subcommands:
        return [name for name, _ in command.subcommands]
    return [name for option in command.options for name in option.names]


def zsh(found: Sequence[Command]) -> str:
    parents = "|".join(command.words for command in _parents(found))
    subcommands = "\n".join(
        f"            {command.words}) what=({_described(command.subcommands)}) ;;" for command in _parents(found)
    )
    values = "\n".join(
        f"        {flags}) compadd -- {' '.join(map(shlex.quote, given))}; return ;;"
        for flags, given in _flag_values(found)
    )
    options = "\n".join(
        f"        {shlex.quote(command.words)}) what=({_described(_named(command))}) ;;"
        for command in found
        if not command.subcommands
    )
    return f"""\
#compdef rayllm
_rayllm() {{
    local -a what
    local cmd="${{words[2]}}"
    if (( CURRENT == 2 )); then
        what=({_described(_top_level(found))})
        _describe 'command' what
        return
    fi
    if [[ "$cmd" == ({parents}) ]]; then
        if (( CURRENT == 3 )); then
            case "$cmd" in
{subcommands}
            esac
            _describe 'what' what
            return
        fi
        cmd="$cmd ${{words[3]}}"
    fi
    case "$cmd:${{words[CURRENT-1]}}" in
{values}
    esac
    case "$cmd" in
{options}
    esac
    if [[ "$PREFIX" == -* ]]; then _describe -o 'option' what; else _files; fi
}}
if [[ "$funcstack[1]" == _rayllm ]]; then _rayllm "$@"; else compdef _rayllm rayllm; fi
"""


def _named(command: Command) -> list[tuple[str, str]]:
    return [(name, option.text) for option in command.options for name in option.names]


def _described(pairs: Sequence[tuple[str, str]]) -> str:
    """zsh's `name:description` words."""
    return " ".join(shlex.quote(f"{name}:{text}") for name, text in pairs)


def fish(found: Sequence[Command]) -> str:
    lines = [
        "function __rayllm_at",
        "    set -l words (commandline -opc)",
        "    string match -q -- \"$argv[1] *\" (string join ' ' -- $words[2..-1])' '",
        "end",
        "function __rayllm_first",
        "    test (count (commandline -opc)) -eq $argv[1]",
        "end",
    ]
    for name, text in _top_level(found):
        lines.append(f"complete -c rayllm -n '__rayllm_first 1' -f -a {name} -d {_fish_quoted(text)}")
    for command in found:
        at = f"__rayllm_at {_fish_quoted(command.words)}"
        for name, text in command.subcommands:
            when = _fish_quoted(f"{at}; and __rayllm_first 2")
            lines.append(f"complete -c rayllm -n {when} -f -a {name} -d {_fish_quoted(text)}")
        for option in command.options:
            lines.append(f"complete -c rayllm -n {_fish_quoted(at)} {_fish_option(option)}")
    return "\n".join(lines) + "\n"


def _fish_option(option: Option) -> str:
    words = []
    for name in option.names:
        kind = "-l" if name.startswith("--") else "-s" if len(name) == 2 else "-o"
        words.append(f"{kind} {name.lstrip('-')}")
    if option.values:
        words.append(f"-x -a {_fish_quoted(' '.join(option.values))}")
    elif option.takes_value:
        words.append("-r")
    return " ".join([*words, f"-d {_fish_quoted(option.text)}"])


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
