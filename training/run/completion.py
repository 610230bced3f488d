"""Completion of `train.py` and `eval.py` in a shell: flags, experiments, and keys of the configuration with their
choices.

    eval "$(python train.py --completion=bash)"

What is printed is a script with all words in it, so that a Tab starts no Python; nothing here imports JAX. Both
commands are started by `python`, so the script looks which of them stands on the line; lines of other programs are
completed as before.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping

import configs
from configs import Field

SHELLS = ("bash", "zsh")


def script(shell: str, parser: argparse.ArgumentParser, keys: Mapping[str, Field]) -> str:
    """The script to be evaluated by a shell.

    Args:
      shell: one of `SHELLS`.
      parser: of the command; its `prog` is the name of the file.
      keys: of the configuration that the command takes.
    """
    name = parser.prog.removesuffix(".py")
    lists = {
        "flags": [*_flags(parser), "--config=", "--config."],
        "configs": configs.names(),
        "keys": [f"--config.{key}{'.' if isinstance(field.default, dict) else '='}" for key, field in keys.items()],
        **{key: choices for key, field in keys.items() if (choices := _choices(field))},
    }
    cases = [f'    {shlex.quote(what)}) printf "$lines" {shlex.join(words)} ;;' for what, words in lists.items()]
    lines = [
        f"# Completion of {parser.prog}, written by --completion={shell}.",
        f"_fovea_{name}() {{",
        "  local lines='%s\\n'",
        '  case "$1" in',
        *cases,
        "  esac",
        "}",
    ]
    return "\n".join(lines) + f"\n{_SCRIPTS[shell]}"


def _flags(parser: argparse.ArgumentParser) -> Iterable[str]:
    """Each long flag, with `=` where it takes a value."""
    for action in parser._actions:
        for flag in action.option_strings:
            if flag.startswith("--") and flag != "--config":
                yield flag if action.nargs == 0 else f"{flag}="


def _choices(field: Field) -> list[str]:
    """The values that a key may have, where they can be told one by one."""
    if field.choices:
        return [*map(str, field.choices), *([field.prefix] if field.prefix else [])]
    return ["true", "false"] if isinstance(field.default, bool) else []


_BASH = """
_fovea() {
  local word of= list current value before=
  for word in "${COMP_WORDS[@]:0:COMP_CWORD}"; do
    case "${word##*/}" in train.py) of=_fovea_train ;; eval.py) of=_fovea_eval ;; esac
  done
  COMPREPLY=()
  [ -n "$of" ] && declare -F "$of" >/dev/null || return 0
  current="${COMP_LINE:0:COMP_POINT}"
  current="${current##* }"
  value="${current#*=}"
  case "$current" in
    --config.*=*) word="${current%%=*}"; list=$("$of" "${word#--config.}") ;;
    --config=*) list=$("$of" configs) ;;
    --*=*) return 0 ;;
    --config.*) list=$("$of" keys) ;;
    -*) list=$("$of" flags) ;;
    *) return 0 ;;
  esac
  # bash takes what follows the = for a word of its own, unless it was told otherwise.
  case "$COMP_WORDBREAKS$current" in *=*=*) ;; *=*) before="${current%"$value"}" ;; esac
  [ "$value" = "$current" ] && before=
  COMPREPLY=($(compgen -P "$before" -W "$list" -- "$value"))
  case "${COMPREPLY[*]}" in *[=.:]) compopt -o nospace 2>/dev/null ;; esac
}
complete -o bashdefault -o default -F _fovea python python3"""

_ZSH = """
_fovea() {
  local word of
  for word in "${(@)words[1,CURRENT-1]}"; do
    case "${word:t}" in train.py) of=_fovea_train ;; eval.py) of=_fovea_eval ;; esac
  done
  if [[ -z "$of" ]] || (( ! $+functions[$of] )); then
    if (( $+functions[_python] )); then _python "$@"; else _files; fi
    return
  fi
  case "$PREFIX" in
    --config.*=*)
      word="${${PREFIX%%=*}#--config.}"
      compset -P '*='
      compadd -- ${(f)"$($of "$word")"} ;;
    --config=*) compset -P '*='; compadd -- ${(f)"$($of configs)"}; _files -g '*.py' ;;
    --*=*) compset -P '*='; _files ;;
    --config.*) compadd -S '' -- ${(f)"$($of keys)"} ;;
    -*)
      compadd -S '' -- ${(M)${(f)"$($of flags)"}:#*[=.]}
      compadd -- ${${(f)"$($of flags)"}:#*[=.]} ;;
    *) _files ;;
  esac
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _fovea python python3"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH}
