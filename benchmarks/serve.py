"""The load generator, as ``deltamux bench serve``; see ``load/``.

python -m deltamux.benchmarks.serve --concurrency 16 --requests 64 --adapters 16
"""

from .load.command import serve

if __name__ == "__main__":
    serve(prog_name="python -m deltamux.benchmarks.serve")
