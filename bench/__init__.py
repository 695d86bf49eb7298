"""Benchmarks: whole models against their peers, kernel microbenchmarks, memory, first call, import time.

    python -m bench.models resnet50 resnext50_32x4d --batch 1 16     whole models in turns with their peers
    python -m bench.report bench/results/<file>.json --plot FILE     table and bar chart of a finished run
    python -m bench.import_time                                      what import fast_backbones adds to torch
    pytest bench                                                     kernel microbenchmarks (pytest-benchmark)

Two rules hold everywhere: a candidate whose numbers are wrong gets no time, and candidates that are compared
are timed in turns, inside the same minutes, on the same threads. See README.md beside this file.
"""
