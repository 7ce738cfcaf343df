"""Specialists as people read them: who is a member, what is shared, and what was measured of their routing."""

from pathlib import Path
from typing import Any

from perdure.core.manifests import LEARNER, RECORD, Checkpoint, read_record, read_specialists, whole
from perdure.formatting import command, human_bytes, printable, shortened
from perdure.storage import schema
from perdure.storage.files import in_use, tensor_shapes, write_page
from perdure.storage.schema import Damaged, MemberFacts, RoutingTable

TABLE = "routing.json"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .75rem; text-align: right }
th { border-bottom: 1px solid #888 } th:first-child, td:first-child { text-align: left }
td.text { text-align: left; font-family: monospace }
</style></head><body>
<h1>{{ name }}</h1>
<p>{{ found.members | length }} specialists; what is asked goes to one of them by <code>{{ found.route }}</code>,
which looks with <code>{{ found.gate }}</code>. The pool holds {{ classes }} classes in {{ size }}.</p>
<table><tr><th>member</th><th>learns</th><th>tasks</th><th>method</th><th>backbone</th><th>now</th></tr>
{% for each in found.members %}<tr><td>{{ each.name }}</td><td>{{ each.gives }}</td><td>{{ each.learnt }}</td>
<td class="text">{{ each.method }}</td><td class="text">{{ each.backbone }}</td><td>{{ each.state }}</td></tr>
{% endfor %}</table>
{% if found.measured %}<h2>Measured</h2>
{% set things = found.measured.things or "images" %}{% set words = things == "questions" %}
<table><tr><th></th><th>accuracy</th><th>asked</th><th>ms/{{ things[:-1] }}</th><th>stored</th></tr>
{% for row in found.measured.rows %}<tr><td>{{ row.who }}</td><td>{{ "%.1f" | format(100 * row.accuracy) }} %</td>
<td>{{ "%g" | format(row.asked) }}</td>
<td>{% if row.milliseconds is not none %}{{ "%.1f" | format(row.milliseconds) }}{% endif %}</td>
<td>{{ bytes(row.bytes) }}</td></tr>
{% endfor %}</table>
<p>On {{ found.measured.images }} test {{ things }}.{% if found.measured.routing_accuracy is not none %}
{{ "%.1f" | format(100 * found.measured.routing_accuracy) }} % were routed to a member that was taught
their {{ "task" if words else "class" }}.{% endif %}
Asked: members {{ "a question" if words else "an image" }}. The oracle is the best choice there
could be.</p>
{% else %}<p>Nothing was measured yet: <code>perdure eval</code> does.</p>{% endif %}
</body></html>
"""


def team_contents(folder: Path) -> dict[str, Any]:
    """What a folder of specialists says of itself, as JSON; tensors are counted and not read.

    Raises:
        ValueError: when it is damaged.
    """
    record = read_specialists(folder)
    pool = folder / f"pool-{record['sha256'][:16]}.safetensors"
    members = [{**each, "state": _state(each, folder)} for each in record["members"]]
    return {
        "route": record["route"],
        "gate": record["gate"].get("spec", ""),
        "created": record["created"],
        "members": members,
        "classes": [[member, name] for member, name in record["classes"]],
        "pool_bytes": pool.stat().st_size if pool.is_file() else None,
        "pool_limit": record["pool_bytes"],
        "exemplars": _exemplars(pool),
        "measured": read_routing(folder),
    }


def told_team(folder: Path, found: dict[str, Any]) -> list[str]:
    """The same for people, line by line."""
    lines = [f"{folder}: {len(found['members'])} specialists, chosen by {found['route']}, seen by {found['gate']}"]
    for each in found["members"]:
        what = f"{each['gives']} in {_tasks(each['learnt'])} by {each['method']} on {each['backbone']}"
        lines.append(printable(shortened(f"  {each['name']}: {what}; {each['state']}")))
    size = "missing" if found["pool_bytes"] is None else human_bytes(found["pool_bytes"])
    lines.append(
        f"pool: {size} of {human_bytes(found['pool_limit'])}, statistics of {len(found['classes'])} classes, and "
        f"{found['exemplars']} images of what members were taught, which this folder thus shows to whoever has it"
    )
    if measured := found["measured"]:
        routed = next((row for row in measured["rows"] if row["who"].startswith("routed")), None)
        if routed:
            lines.append(
                f"routed: {routed['accuracy']:.1%} right on {measured['images']} {measured.get('things', 'images')}"
            )
    else:
        lines.append(f"not measured yet: {command('eval', folder)} does")
    return lines


def write_team_report(folder: Path, path: Path) -> Path:
    """A page of one file that needs no network."""
    import jinja2

    found = team_contents(folder)
    size = "a file that is missing" if found["pool_bytes"] is None else human_bytes(found["pool_bytes"])
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    shown = page.render(name=folder.name, found=found, classes=len(found["classes"]), size=size, bytes=human_bytes)
    write_page(path, shown)
    return path


def read_routing(folder: Path) -> RoutingTable | None:
    """What was measured last of the specialists in `folder`; None where nothing was."""
    path = folder / TABLE
    if not path.is_file():
        return None
    return schema.read_typed(path, RoutingTable, f"remove it, and measure anew: {command('eval', folder)}", True)


def _state(facts: MemberFacts, folder: Path) -> str:
    there = next((p for p in (Path(facts["folder"]), folder / facts["beside"]) if (p / RECORD).is_file()), None)
    if there is None:
        return "missing"
    try:
        if schema.seal(read_record(there)) != facts["run"]:
            return "another learner"
        if in_use(there):
            return "locked, another process is working in it"
        done = whole(there)
        if done and _cut(done[-1]):
            return "damaged"
    except Damaged:
        return "damaged"
    more = (done[-1].learnt if done else 0) - facts["learnt"]
    return f"there, with {_tasks(more)} more than the pool knows: combine again" if more > 0 else "there"


def _tasks(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"


def _cut(checkpoint: Checkpoint) -> bool:
    """Whether the file of what was learnt is gone or has another size; what is in it is read when it is opened."""
    file = checkpoint.folder / LEARNER
    size = checkpoint.manifest.get("bytes", {}).get(LEARNER)
    return not file.is_file() or (size is not None and file.stat().st_size != size)


def _exemplars(pool: Path) -> int:
    """How many images a pool holds."""
    shapes = tensor_shapes(pool, "combine again")
    return sum(shape[0] for name, shape in shapes.items() if shape and name.startswith("pool.exemplars."))
