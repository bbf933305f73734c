"""One worker among the workers: rank and device, collectives, watchdog, failure report, command-line entry.

Imports `config`, `errors` and `state`.
"""
