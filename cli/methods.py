"""`lightopd methods`: the recipes, what they need, and whether a cache can serve them."""

import typer

app = typer.Typer(no_args_is_help=True, help="List, show and check method recipes.", rich_markup_mode=None)
