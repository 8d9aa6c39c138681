"""What the tests of buckets ask: a command's figures, what travelled, and who won a race."""

import json
from threading import Barrier, Thread


def files_of(folder):
    """Names and bytes of what travels."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith((".", "index.duckdb"))
    }


def figures(done):
    code, out, err = done
    assert code == 0, err
    return json.loads(out)["figures"]


def race(bucket, writers=64):
    """How many of the writers were told that they won; the object is the winner's."""
    ready, won = Barrier(writers), []

    def put(number):
        ready.wait()
        if bucket.put_if_absent("key", b"%d" % number):
            won.append(number)

    threads = [Thread(target=put, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bucket.read("key") in {b"%d" % number for number in won}
    return len(won)
