"""Commands that look at a cache and its runs."""

from lightopd.cli.inspection.doctor import doctor
from lightopd.cli.inspection.report import report
from lightopd.cli.inspection.sql import sql
from lightopd.cli.inspection.view import view

COMMANDS = {"sql": sql, "report": report, "view": view, "doctor": doctor}
