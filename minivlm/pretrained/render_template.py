"""Renders a chat template in a process of its own: it is a program, so it runs where it can do no harm, in Jinja's sandbox,
with little memory and little time.

    python -I render_template.py DIRECTORY_OF_JINJA2 < {"source": …, "tokens": …, "probes": […]} > [string or null, …]

It imports nothing of minivlm. See `template_sandbox`, which starts it.
"""

import json
import sys


def limit(resource_name: str, most: int) -> None:
    try:
        import resource

        resource.setrlimit(getattr(resource, resource_name), (most, most))
    except (ImportError, OSError, ValueError):  # Windows; a limit that is lower already
        pass


def environment():
    """Jinja as transformers sets it up."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):  # transformers marks with it what the assistant says
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def refuse(message=""):
        raise ValueError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = lambda value, **settings: json.dumps(value, ensure_ascii=False)
    made.globals["raise_exception"] = refuse
    return made


def main() -> None:
    limit("RLIMIT_AS", 1 << 30)
    limit("RLIMIT_CPU", 5)
    sys.path[:0] = sys.argv[1:]
    given = json.load(sys.stdin)
    template = environment().from_string(given["source"])
    answers = []
    for probe in given["probes"]:
        try:
            text = template.render(**given["tokens"], **probe)
            answers.append(text if len(text) < 1 << 20 else None)
        except Exception:
            answers.append(None)
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
