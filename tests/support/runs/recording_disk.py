"""What a program asks of the disk, in order, and what would be there after the power failed."""

import os
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class RecordingDisk:
    """Stands before `os.fsync`, `os.replace` and `os.rename`; everything is really done, too."""

    events: list = field(default_factory=list)
    """`("fsync", path, bytes)` with what a flushed file held, `("fsync", path, None)` for a folder,
    `("rename", old, new)`."""

    def install(self, monkeypatch):
        fsync, replace, rename = os.fsync, os.replace, os.rename

        def recorded_fsync(descriptor):
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self.events.append(("fsync", path, path.read_bytes() if path.is_file() else None))
            fsync(descriptor)

        def recorded(move):
            def moved(old, new, **more):
                self.events.append(("rename", Path(old), Path(new)))
                move(old, new, **more)

            return moved

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "replace", recorded(replace))
        monkeypatch.setattr(os, "rename", recorded(rename))
        return self

    def check_survives(self, path):
        """Everything at `path` was flushed before it got its name, and the name was flushed after."""
        (name,) = [n for n, event in enumerate(self.events) if event[0] == "rename" and event[2] == path]
        old = self.events[name][1]
        before = {event[1]: event[2] for event in self.events[:name] if event[0] == "fsync"}
        inside = [path] if path.is_file() else [path, *path.rglob("*")]
        for inner in inside:
            written = inner.read_bytes() if inner.is_file() else None
            part = old / inner.relative_to(path)
            assert part in before, f"{part} was not flushed before it was renamed"
            assert before[part] == written, f"{part} was flushed before it was whole"
        folders = [event[1] for event in self.events[name + 1 :] if event[0] == "fsync"]
        assert path.parent in folders, f"{path.parent} was not flushed after {path.name} got its name"
