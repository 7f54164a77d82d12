"""Do the tests notice when the source changes? Each mutant is one small change, and a test has to fail at it.

    python -m tests.mutation.run --output benchmarks/results/mutation.md

`explained.py` says of each mutant that survives why that is no gap in the tests.
"""
