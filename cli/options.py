"""Options that several commands share, each defined once."""

from typing import Annotated

import typer

Configs = Annotated[
    list[str] | None,
    typer.Option("--config", "-c", help="YAML file or recipe name; later ones are laid over earlier ones."),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, such as --set optimizer.lr=1e-5; repeatable.")
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow", help="Override a refusal, such as teacher-mismatch; recorded in everything made."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as one JSON line on stdout.")]
Teacher = Annotated[str | None, typer.Option("--teacher", help="Folder or hub id of the teacher.")]
Student = Annotated[str | None, typer.Option("--student", help="Folder or hub id of the student.")]
Prompts = Annotated[str | None, typer.Option("--prompts", help="JSONL or Parquet file of prompts.")]
Cache = Annotated[str | None, typer.Option("--cache", help="Cache folder.")]
Rollouts = Annotated[str | None, typer.Option("--rollouts", help="Cache folder to take the rollouts from.")]
Out = Annotated[str | None, typer.Option("--out", help="Folder of the run.")]
Engine = Annotated[str | None, typer.Option("--engine", help="Engine kind: hf, vllm or server.")]
Server = Annotated[
    list[str] | None, typer.Option("--server", help="Address of a running vLLM server; repeatable.")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Teacher tokens kept at each position.")]
SftTeacher = Annotated[
    str | None,
    typer.Option(
        "--sft-teacher", help="SFT teacher of a student made elsewhere: declared, not proven; or none."
    ),
]
