"""What happens to work in progress when machines die, disks fill up and files rot.

    python -m tests.faults.run --tries 20 --kills 100 --output benchmarks/results/faults.md

Each try runs one of our commands in a process of its own, does it harm, runs the same command again and compares the
folder with that of a run that nothing disturbed. `test_campaign.py` is the short part that runs with the tests.
"""
