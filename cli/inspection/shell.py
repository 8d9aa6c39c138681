"""`lightopd sql CACHE` without a query: a shell that needs no manual."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightopd.cli.inspection.look import warn_without_tokenizer
from lightopd.cli.inspection.rows import FORMATS, rows_of, write_rows
from lightopd.cli.output import say
from lightopd.text_tables import table_lines

if TYPE_CHECKING:
    from lightopd.inspection.opened import OpenedCache

HELP = """\
SQL ends with ; and may run over several lines. Ctrl-C stops a query, Ctrl-D ends the shell.
  .tables             the views and tables
  .schema [NAME]      columns, of all or of one
  .queries            the named queries, with their parameters
  .run NAME [k=v ...] run a named query
  .show NAME          the SQL of a named query
  .format NAME        table, markdown, csv or json
  .out FILE FORMAT    write the next result into a file
  .help  .exit"""


class Shell:
    """The state of one session: the cache, a format, and where the next result goes."""

    def __init__(self, opened: "OpenedCache", say: Callable[[str], None] = say) -> None:
        self.opened, self.say = opened, say
        self.format = "table"
        self.out: tuple[Path, str] | None = None
        self.is_over = False

    def do(self, text: str) -> None:
        """One command or one statement; a mistake is told in a line and the shell stays."""
        from lightopd.errors import LightopdError

        try:
            if text.startswith("."):
                self._command(*shlex.split(text))
            else:
                self._run(text.rstrip().rstrip(";"), {})
        except (LightopdError, ValueError, OSError) as error:
            say(f"error: {error}", err=True)
        except KeyboardInterrupt:
            say("stopped", err=True)

    def _command(self, name: str, *words: str) -> None:
        from lightopd.errors import ConfigError

        commands: dict[str, Callable[..., None]] = {
            ".tables": self._tables,
            ".schema": self._schema,
            ".queries": self._queries,
            ".run": self._named,
            ".show": self._show,
            ".format": self._format,
            ".out": self._out,
            ".help": lambda: self.say(HELP),
            ".exit": self._exit,
            ".quit": self._exit,
        }
        if name not in commands:
            raise ConfigError(f"there is no {name}; there are: {', '.join(commands)}")
        try:
            commands[name](*words)
        except TypeError as error:
            if "positional argument" not in str(error):
                raise
            raise ConfigError(f"{name} takes other words; see .help") from None

    def _tables(self) -> None:
        for name in dict.fromkeys(row["view"] for row in self.opened.columns()):
            self.say(name)

    def _schema(self, name: str = "") -> None:
        from lightopd.errors import ConfigError

        rows = [row for row in self.opened.columns() if name in ("", row["view"])]
        if not rows:
            raise ConfigError(f"there is no view {name!r}; see .tables")
        for line in table_lines(["view", "column", "type"], iter([list(row.values()) for row in rows])):
            self.say(line)

    def _queries(self) -> None:
        from lightopd.inspection.queries import named_queries

        for name, query in named_queries().items():
            takes = " ".join(f"{each.name}={each.default}" for each in query.parameters)
            self.say(f"{name:<19} {query.purpose}{f'  [{takes}]' if takes else ''}")

    def _named(self, name: str, *words: str) -> None:
        from lightopd.inspection.queries import named_query, parse_assignments

        query = named_query(name)
        self._run(query.sql, query.values(parse_assignments(list(words))))

    def _show(self, name: str) -> None:
        from lightopd.inspection.queries import named_query

        self.say(named_query(name).sql.rstrip())

    def _format(self, name: str) -> None:
        from lightopd.errors import ConfigError

        if name not in FORMATS or name == "parquet":
            raise ConfigError("on the screen there are table, markdown, csv and json; .out writes files")
        self.format = name

    def _out(self, file: str, format: str) -> None:
        from lightopd.errors import ConfigError

        if format not in FORMATS:
            raise ConfigError(f"no format {format!r}; there are: {', '.join(FORMATS)}")
        self.out = Path(file), format

    def _exit(self) -> None:
        self.is_over = True

    def _run(self, sql: str, values: dict[str, Any]) -> None:
        if not sql.strip():
            return
        warn_without_tokenizer(self.opened, sql)
        with self.opened.stream(sql, values) as reader:
            if self.out is not None:
                (path, format), self.out = self.out, None
                self.say(f"{write_rows(reader, format, path):,} rows written to {path}")
            elif self.format == "table" and sys.stdout.isatty():
                _page(table_lines(reader.schema.names, rows_of(reader)))
            else:
                write_rows(reader, self.format, None)


def run_shell(opened: "OpenedCache") -> None:
    """Read and run until the end: with completion and history on a terminal, line by line from a pipe."""
    shell = Shell(opened)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for text in statements(sys.stdin):
            shell.do(text)
            if shell.is_over:
                return
        return
    say(f"{opened}\n.help for help, .queries for the named queries")
    session = _prompt_session(opened)
    while not shell.is_over:
        try:
            shell.do(session.prompt("lightopd> ").strip())
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def statements(lines: Iterator[str] | Any) -> Iterator[str]:
    """Commands, and statements that end with a semicolon or with the input."""
    held = ""
    for line in lines:
        held += line
        text = held.strip()
        if text and is_whole(text):
            held = ""
            yield text
    if held.strip():
        yield held.strip()


def is_whole(text: str) -> bool:
    """Whether the text can be run: a dot command, or SQL that ends with a semicolon outside quotes."""
    if not text or text.startswith("."):
        return True
    return text.rstrip().endswith(";") and text.count("'") % 2 == 0


def completions(opened: "OpenedCache", text: str) -> list[str]:
    """Words that may come next: commands, query names after .run, else views, columns and functions."""
    from lightopd.inspection.queries import named_queries

    words = text.split()
    last = "" if not words or text.endswith(" ") else words[-1]
    if text.startswith("."):
        if len(words) <= 1 and not text.endswith(" "):
            known = [line.split()[0] for line in HELP.splitlines() if line.startswith("  .")] + [".exit"]
        elif words[0] in (".run", ".show"):
            query = named_queries().get(words[1] if len(words) > 1 else "")
            named = len(words) > 2 or (len(words) == 2 and text.endswith(" "))
            known = [f"{p.name}=" for p in query.parameters] if query and named else list(named_queries())
        else:
            known = list(FORMATS) if words[0] == ".format" else sorted({r["view"] for r in opened.columns()})
    else:
        columns = opened.columns()
        known = [*{row["view"] for row in columns}, *{row["column"] for row in columns}, "decode(", "token("]
        last = last.rpartition("(")[2].rpartition(",")[2].rpartition(".")[2]
    return sorted(word for word in known if word.startswith(last) and word != last)


_WORD = re.compile(r"[.\w=]+")


def _prompt_session(opened: "OpenedCache") -> Any:
    """A prompt with history, colours, several lines and completion."""
    from lightopd.errors import ConfigError

    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.lexers import PygmentsLexer
        from pygments.lexers.sql import SqlLexer
    except ImportError as error:
        raise ConfigError(
            f"the shell needs {error.name}, which is not installed; pip install "
            "'lightopd[shell]', or give a query"
        ) from None

    class Words(Completer):  # type: ignore[misc]
        def get_completions(self, document: Any, complete_event: Any) -> Iterator[Any]:
            word = document.get_word_before_cursor(pattern=_WORD)
            for found in completions(opened, document.text_before_cursor):
                yield Completion(found, start_position=-len(word))

    place = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state")) / "lightopd"
    place.mkdir(parents=True, exist_ok=True)
    session: Any = PromptSession(
        history=FileHistory(str(place / "sql_history")),
        lexer=PygmentsLexer(SqlLexer),
        completer=Words(),
        complete_while_typing=False,
        multiline=Condition(lambda: not is_whole(session.default_buffer.text.strip())),
    )
    return session


def _page(lines: Iterator[str]) -> None:
    """Lines through $PAGER, as they come; `less -FRSX` when it is not set."""
    command = shlex.split(os.environ.get("PAGER") or "less -FRSX")
    if shutil.which(command[0]) is None:
        for line in lines:
            say(line)
        return
    pager = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, encoding="utf-8")
    assert pager.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # the pager was left before the end
            for line in lines:
                pager.stdin.write(line + "\n")
            pager.stdin.flush()
    finally:
        with contextlib.suppress(BrokenPipeError):
            pager.stdin.close()
        pager.wait()
