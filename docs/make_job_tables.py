"""Put the figures of benchmarks/jobs/results into docs/jobs.md, after the programs that measure them, with `--out` that folder.

`python -m benchmarks.jobs.store_load` in a network of its own, as its docstring says; `file_operations`; `throughput`.
"""

from _pages import replace_part

from benchmarks.jobs import figures, file_operations, store_load, throughput

PROGRAMS = {"store_load": store_load, "file_operations": file_operations, "throughput": throughput}


def main() -> None:
    for name, program in PROGRAMS.items():
        document = figures.load(name)
        if document is None:
            print(f"{name}: not measured yet, its part of the page stays as it is")
            continue
        text = f"{program.markdown(document['figures'])}\n{figures.made_on(document)}"
        replace_part("jobs.md", name.replace("_", " "), text)


if __name__ == "__main__":
    main()
