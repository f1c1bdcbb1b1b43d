"""Fault injection: real processes on loopback, killed, cut off, starved of disk, lied to; the weights must not tell.

The oracle is the SHA-256 of the files of weights that an undisturbed run of the same study leaves behind, and its rows
of `rounds.csv` and `sites.csv` but for seconds and bytes. The parts:

    ../zygote.py processes that start in milliseconds: forked from one that has imported TensorFlow
    proxy.py     a TCP proxy that cuts, resets, stalls, half-closes, repeats or corrupts at a byte, throttles and delays
    light.py     `wardround-site` with a worker that computes its update from a hash, without TensorFlow
    arena.py     one study in one folder: starts its processes, again when they die, and compares what they left
    studies.py   the studies that are run
    report.py    tables for the terminal, docs/faults.md and docs/results/

The questions, each a command (`--help` says how to read its table; `--write-docs` puts it into docs/faults.md):

    python -m tests.system.faults.table       killed at each failpoint and started again: the same bits?
    python -m tests.system.faults.power       the power cut at each failpoint: was all on the disk that had to be?
    python -m tests.system.faults.network     each fault of the network: the same bits, and how much was sent again?
    python -m tests.system.faults.schedules   random faults over a study, by seed: how many end, with the same bits?
    python -m tests.system.faults.fifty       fifty sites that come and go: does the study end, and how long are rounds?
    python -m tests.system.faults.messages    malformed messages on every call: is any taken, does memory grow?
    python -m tests.system.faults.disk        a full or read-only disk at each write: said clearly, and nothing lost?

The tests in this folder run a short selection of each.
"""
