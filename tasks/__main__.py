"""Tasks by name, for --config.task.name (docs/tasks.md).

python -m tasks
"""

import sys

import tasks
from naming import listing


def _tables() -> list[listing.Table]:
    found = {name: tasks.find(name) for name in tasks.names()}
    rows = [(name, listing.sentence(task), ", ".join(task.known_options) or "-") for name, task in found.items()]
    return [listing.Table("tasks", ("name", "what is learned", "options"), rows)]


if __name__ == "__main__":
    sys.exit(listing.command("python -m tasks", str(__doc__), _tables))
